"""SIGTERM and SIGUSR1, whoever gets them and when: a full checkpoint of the last step, exit 75, nobody left."""

import os
import shutil
import signal
from itertools import product
from pathlib import Path

import pytest
from faults.runs import command, images, status, train_state

from diffussm.training.checkpoint import find_checkpoint

PHASES = {
    "load": [("slow_load", 0.5)],
    "save": [("slow_saves", 0.05)],
    "pictures": [("slow_pictures", 0.1)],
}
TARGETS = ("process", "launcher", "rank")
NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
# Whom, when and what at least once; all together where there is more time.
FEW = {
    ("process", "load", signal.SIGUSR1),
    ("process", "save", signal.SIGTERM),
    ("launcher", "save", signal.SIGUSR1),
    ("rank", "pictures", signal.SIGTERM),
}


CASES = [
    pytest.param(*case, marks=[] if case in FEW else [pytest.mark.slow], id=f"{case[0]}-{case[1]}-{case[2].name}")
    for case in product(TARGETS, PHASES, NUMBERS)
]


@pytest.fixture(scope="module")
def begun(nursery, tmp_path_factory) -> Path:
    """A run that has a checkpoint at 64 images."""
    path = tmp_path_factory.mktemp("stops") / "run"
    nursery.run(*command(path, "trainer.total_images=64"))
    return path


@pytest.mark.fault("G2")
@pytest.mark.parametrize(("target", "phase", "number"), CASES)
def test_a_signal_costs_no_step(jobs, begun, tmp_path, figure, target, phase, number):
    path = tmp_path / "run"
    shutil.copytree(begun, path)
    overrides = ["trainer.total_images=1M", "trainer.sample_every_images=128", "sampler.num_steps=50"]
    if target != "process":
        overrides.append("trainer.num_processes=2")
    faults = [*PHASES[phase], ("tell_steps",), ("slow_steps", 0.005)]
    job = jobs.start(*command(path, *overrides, pictures=phase == "pictures"), faults=faults)
    # All ranks, for one that has not got so far may not know what to do with a signal.
    job.wait_for(f"BEGIN {phase}", times=2 if phase == "load" and target != "process" else 1)
    os.kill(job.children()[1] if target == "rank" else job.pid, number)
    assert job.wait() == 75, job.said
    done = max((int(step) for step, *_ in job.lines("STEP")), default=4)
    found, state = status(path), train_state(path)
    assert (found["state"], found["exit_code"], found["images"]) == ("preempted", 75, images(path))
    assert find_checkpoint(path).path.name == f"step-{done:012d}" and state["step"] == done
    assert job.said.count("stopped by signal at") == 1 and "Traceback" not in job.said
    assert state["pending"] == (["samples"] if phase == "pictures" else [])
    assert not list(path.rglob(".tmp-*")) and not jobs.orphans()
    figure(f"{target}, {phase}, {number.name}: {done - state['step']} steps lost, {len(jobs.orphans())} orphans")
