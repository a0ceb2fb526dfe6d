"""SIGKILL at any time: the same command continues, and ends in the weights of a run that was never killed."""

import random
import time

import pytest
from faults.runs import command, fingerprint, images, records

slow = pytest.mark.slow
SAVE_SECONDS = 0.06  # for each of the seven files of a checkpoint


@pytest.mark.fault("G1")
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=slow)])
def test_a_run_killed_again_and_again_ends_in_the_same_weights(jobs, tmp_path, figure, kills):
    draws, path = random.Random(1), tmp_path / "run"
    faults = [("slow_saves", SAVE_SECONDS), ("slow_steps", 0.005)]
    resumed = within = 0
    for _ in range(kills):
        before = images(path)
        job = jobs.start(*command(path, "trainer.total_images=1M", "trainer.save_every_images=128"), faults=faults)
        job.wait_for("BEGIN save")
        time.sleep(draws.uniform(0.02, 0.6))
        job.kill()
        within += job.said.count("BEGIN save") > job.said.count("END save")
        resumed += (
            "(new)" in job.said
            if before is None
            else f"(continues from step-{before // 16:012d}, at {before:,} images)" in job.said
        )
    end = f"trainer.total_images={images(path) + 64}"
    jobs.run(*command(path, end))
    jobs.run(*command(tmp_path / "whole", end))
    is_same = fingerprint(path) == fingerprint(tmp_path / "whole")
    figure(f"{resumed}/{kills} resume, {within} killed in a save, tensors {'identical' if is_same else 'DIFFER'}")
    assert is_same and records(path) == records(tmp_path / "whole")
    assert resumed == kills and within >= kills // 3
    assert not list(path.rglob(".tmp-*")) and not list(path.rglob(".*.tmp"))
