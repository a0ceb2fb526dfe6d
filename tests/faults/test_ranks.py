"""Ranks that die, stall or compute nonsense: the job goes on by itself, and to the same result."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults.jobs import TESTS, Job
from faults.runs import checkpoints, command, fingerprint, records, status, train_state
from safetensors.torch import load_file

slow = pytest.mark.slow
MANY = ("trainer.num_processes=2", "trainer.total_images=480", "trainer.save_every_images=64")


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory) -> Path:
    """What two processes make of 30 steps undisturbed."""
    path = tmp_path_factory.mktemp("ranks") / "whole"
    nursery.run(*command(path, *MANY))
    return path


def seconds_lost(said: str) -> float:
    """From the end of a rank to the end of the first step after it."""
    lines = [line.split() for line in said.splitlines()]
    lost = max(float(words[-1]) for words in lines if words[:1] == ["LOST"])
    return (
        min(float(words[-1]) for words in lines if words[:1] == ["STEP"] and float(words[-1]) > lost + 0.5) - lost
    )


@pytest.mark.fault("G3")
@pytest.mark.parametrize(
    ("number", "steps"),
    [
        (signal.SIGKILL, [9]),
        (signal.SIGSTOP, [16]),
        pytest.param(signal.SIGKILL, [0, 1, 3, 5, 6, 11, 13, 19, 23, 29], marks=slow),
        pytest.param(signal.SIGSTOP, [0, 5, 8, 12, 27], marks=slow),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else f"{len(value)}",
)
def test_a_rank_that_dies_or_stalls_costs_a_restart(jobs, tmp_path, whole, figure, number, steps):
    identical, longest = 0, 0.0
    timeout = "trainer.timeout_seconds=4" if number == signal.SIGSTOP else "trainer.timeout_seconds=120"
    for step in steps:
        path = tmp_path / str(step)
        faults = [("tell_steps",), ("end", step % 2, step, int(number))]
        job = jobs.run(*command(path, *MANY, timeout), faults=faults)
        assert job.said.count("starting all 2 again") == 1, job.said
        longest = max(longest, seconds_lost(job.said))
        identical += fingerprint(path) == fingerprint(whole) and records(path) == records(whole)
    figure(f"{number.name}: {identical}/{len(steps)} identical, at most {longest:.1f} s to the next step")
    assert identical == len(steps)


@pytest.mark.fault("G3")
@pytest.mark.parametrize("losses", [pytest.param(3, marks=slow)])
def test_torchrun_starts_a_job_again(tmp_path, whole, figure, losses):
    """In processes of their own that import everything: the time is that of a user."""
    identical, longest = 0, 0.0
    for number in range(losses):
        path = tmp_path / str(number)
        script = (
            "import sys; from faults import injections; injections.tell_steps(); "
            f"injections.end(1, {7 + number}, 9); from diffussm.cli import main; sys.exit(main())"
        )
        (tmp_path / "main.py").write_text(script)
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
        arguments = [override for override in command(path, *MANY) if "num_processes" not in override]
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-m", *launcher, str(tmp_path / "main.py"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        longest = max(longest, seconds_lost(result.stderr))
        identical += fingerprint(path) == fingerprint(whole) and records(path) == records(whole)
    figure(f"torchrun: {identical}/{losses} identical, at most {longest:.1f} s to the next step")
    assert identical == losses


@pytest.mark.fault("G3")
def test_a_rank_that_is_lost_for_ever_ends_the_job(jobs, tmp_path, figure):
    faults = [("end", 1, 5, int(signal.SIGKILL), attempt) for attempt in range(3)]
    job = jobs.run(*command(tmp_path, *MANY, "trainer.max_restarts=2"), faults=faults, code=137)
    assert job.said.count("starting all 2 again") == 2 and "killed by SIGKILL" in job.said
    figure("lost for ever: ends after trainer.max_restarts")


def start_ranks(jobs, path: Path, *overrides: str, faults=()) -> list[Job]:
    """Two ranks without a launcher of ours, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        jobs.start(
            *command(path, *overrides), faults=faults, environment={**place, "RANK": str(rank), "LOCAL_RANK": "0"}
        )
        for rank in range(2)
    ]


def weights_by_step(job: Job) -> dict[str, list[str]]:
    """Skipped steps and hashes of the weights and averages after every step."""
    return {step: values for step, _, *values in job.lines("WEIGHTS")}


@pytest.mark.fault("G9")
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(jobs, tmp_path, figure):
    faults = [("poison", 1, 3, 3), ("poison", 0, 5, 5), ("tell_weights",)]
    ranks = start_ranks(jobs, tmp_path / "run", faults=faults)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    one, other = map(weights_by_step, ranks)
    equal = sum(one[step] == other[step] for step in one)
    figure(f"{equal}/{len(one)} steps with equal ranks, {train_state(tmp_path / 'run')['skipped_steps']} skipped")
    assert one == other and len(one) == 8
    assert one["3"][1] == one["4"][1] != one["5"][1] == one["6"][1] and one["8"][0] == "2"
    assert records(tmp_path / "run")[-1]["skipped_steps"] == 2


@pytest.mark.fault("G9")
def test_steps_that_are_never_finite_again_end_the_job_before_anything_bad_is_saved(jobs, tmp_path, figure):
    path = tmp_path / "run"
    many = ("trainer.num_processes=2", "trainer.total_images=1M", "trainer.save_every_images=32")
    job = jobs.run(*command(path, *many), faults=[("poison", 1, 6, 10**6), ("tell_steps",)], code=70)
    assert (
        status(path)["exit_code"] == 70 and job.said.count("gradients were not finite in 20 steps in a row") == 1
    )
    steps = max(int(step) for step, *_ in job.lines("STEP")) - 6
    bad = [
        name
        for folder in checkpoints(path)
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if not tensor.isfinite().all()
    ]
    figure(f"stopped after {steps + 1} bad steps, {len(bad)} tensors saved that are not finite")
    assert steps < 20 and not bad and checkpoints(path)
