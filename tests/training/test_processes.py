"""Training in several processes: as one process would, and none of them without the others."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from test_trainer import fingerprint, records

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.launch import Place
from diffussm.training.parallel import split

# Such a small learning rate that rounding is not blown up within 50 steps.
STEADY = ("optimizer.lr=1e-4", "trainer.log_every_images=16", "trainer.total_images=800")


def command(path: Path, *overrides: str) -> list[str]:
    return ["train", *SMALL_RUN, f"run_dir={path}", "name=run", *overrides]


def train(*arguments: str) -> subprocess.CompletedProcess:
    """In processes of its own, which import everything: as from a terminal, or under torchrun."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def one(nursery, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "one"
    nursery.run(*command(path, *STEADY))
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.num_processes=2",),
        ("trainer.num_processes=2", "trainer.device_batch_size=3"),
        ("trainer.num_processes=3",),
        ("trainer.num_processes=2", "model.activation_checkpointing=true"),
        ("trainer.num_processes=2", "model.activation_checkpointing=true", "trainer.device_batch_size=3"),
    ],
    ids=["2", "2 accumulating", "3 of unequal shares", "2 recomputing", "2 recomputing and accumulating"],
)
def test_processes_have_the_losses_of_one(jobs, tmp_path, one, overrides):
    jobs.run(*command(tmp_path, *STEADY, *overrides))
    ours, theirs = records(tmp_path), records(one)
    assert len(ours) == len(theirs) == 50
    for mine, whole in zip(ours, theirs, strict=True):
        assert mine.keys() == whole.keys()
        for key in (key for key in mine if key.startswith("loss")):
            assert mine[key] == pytest.approx(whole[key], rel=1e-6, abs=1e-6), key
        assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_a_resume_on_as_many_processes_is_bit_exact(jobs, tmp_path, count):
    """With four, sums of gradients are rounded by where in a bucket they are, which the first passes decide."""
    many = (f"trainer.num_processes={count}", "model.depth=2")
    jobs.run(*command(tmp_path / "whole", *many))
    jobs.run(*command(tmp_path / "run", *many, "trainer.total_images=64"))
    jobs.run(*command(tmp_path / "run", *many))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_under_torchrun_it_is_the_same_run_and_without_gradients_of_nothing(tmp_path):
    ours = train("diffussm", *command(tmp_path / "ours", "trainer.num_processes=2"))
    assert ours.returncode == 0, ours.stderr
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    result = train(*launcher, "diffussm", *command(tmp_path / "theirs"))
    assert result.returncode == 0, result.stderr
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "theirs")
    assert result.stdout.count("finished at 128 images") == 1 and result.stderr.count(" parameters, ") == 1


@pytest.mark.fault("G2")
def test_a_stop_during_the_pictures_loses_neither_steps_nor_pictures(jobs, tmp_path, figure):
    """Of the process that is not the first; pictures that are due are drawn when the run goes on."""
    many = ("trainer.num_processes=2", "trainer.sample_every_images=64", "sampler.num_steps=100", "sampler=ddpm")
    job = jobs.start(*command(tmp_path, *many), faults=[("slow_pictures", 0.1)])
    job.wait_for("BEGIN pictures", times=4)
    os.kill(job.children()[1], signal.SIGUSR1)
    assert job.wait() == 75 and "stopped by signal at 64 images" in job.said, job.said
    assert not list(tmp_path.glob("samples/*.png"))
    state = json.loads(sorted(tmp_path.glob("checkpoints/step-*"))[-1].joinpath("train_state.json").read_text())
    assert state["images"] == 64 and state["pending"] == ["samples"]
    jobs.run(*command(tmp_path, *many, "sampler.num_steps=2"))
    drawn = [path.name for path in sorted(tmp_path.glob("samples/*.png"))]
    figure(f"{len(drawn)}/2 pictures drawn after a stop in the first")
    assert drawn == ["images-000000000064.png", "images-000000000128.png"]


@pytest.mark.fault("G2")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_that_reaches_every_process_twice_is_one_request(jobs, tmp_path, number, figure):
    """As srun's, or a terminal's, which the launcher hands on besides."""
    many = ("trainer.num_processes=2", "trainer.total_images=1M", "trainer.log_every_images=16")
    job = jobs.start(*command(tmp_path, *many), faults=[("slow_steps", 0.1)])
    job.wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(records(tmp_path)) > 1)
    for pid in [*job.children(), job.pid]:
        os.kill(pid, number)
    code, status = job.wait(), json.loads((tmp_path / "status.json").read_text())
    figure(f"exit code {code}, {status['state']}")
    assert code == status["exit_code"] == 75 and status["state"] == "preempted", job.said
    state = json.loads(sorted(tmp_path.glob("checkpoints/step-*"))[-1].joinpath("train_state.json").read_text())
    assert state["images"] == records(tmp_path)[-1]["images"] and "Traceback" not in job.said


def test_bad_input_is_one_line_of_one_process(jobs, tmp_path):
    many = ("trainer.num_processes=2", "trainer.batch_size=17", "trainer.device_batch_size=1")
    job = jobs.run(*command(tmp_path / "run", *many), code=2)
    assert job.said.count("trainer.batch_size=17: cannot be shared by 2 processes, 1 at a time") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("batch_size", "world_size", "device_batch_size", "expected"),
    [
        (16, 1, None, [[16]]),
        (16, 1, 5, [[4, 4, 4, 4]]),
        (16, 2, 3, [[2, 3, 3], [2, 3, 3]]),
        (7, 3, 2, [[1, 1], [1, 1], [1, 2]]),
        (9, 2, 4, [[2, 2], [2, 3]]),
    ],
)
def test_every_process_has_as_many_parts(batch_size, world_size, device_batch_size, expected):
    def parts(rank: int) -> list[range]:
        return split(batch_size, Processes(Place(rank, world_size)), device_batch_size)

    assert [[len(part) for part in parts(rank)] for rank in range(world_size)] == expected
    assert [i for rank in range(world_size) for part in parts(rank) for i in part] == list(range(batch_size))


def test_an_empty_part_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=3: cannot be shared by 4 processes"):
        split(3, Processes(Place(0, 4)), None)
