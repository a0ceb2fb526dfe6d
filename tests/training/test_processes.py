"""Training in several processes: as one process would, and none of them without the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from test_trainer import fingerprint, records

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.launch import Place
from diffussm.training.trainer import split

# Such a small learning rate that rounding is not blown up within 50 steps.
STEADY = ("optimizer.lr=1e-4", "trainer.log_every_images=16", "trainer.total_images=800")


def train(path: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(path, *overrides), capture_output=True, text=True, timeout=300, check=False, **options
    )


def command(path: Path, *overrides: str) -> list[str]:
    overrides = (*SMALL_RUN, f"run_dir={path}", "name=run", *overrides)
    return [sys.executable, "-m", "diffussm", "train", *overrides]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "one"
    assert train(path, *STEADY).returncode == 0
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
def test_processes_have_the_losses_of_one(tmp_path, one, overrides):
    result = train(tmp_path, *STEADY, *overrides)
    assert result.returncode == 0, result.stderr
    ours, theirs = records(tmp_path), records(one)
    assert len(ours) == len(theirs) == 50
    for mine, whole in zip(ours, theirs, strict=True):
        assert mine.keys() == whole.keys()
        for key in (key for key in mine if key.startswith("loss")):
            assert mine[key] == pytest.approx(whole[key], rel=1e-6, abs=1e-6), key
        assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_under_torchrun_it_is_the_same_run_and_without_gradients_of_nothing(tmp_path):
    ours = train(tmp_path / "ours", "trainer.num_processes=2")
    assert ours.returncode == 0, ours.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launcher, *command(tmp_path / "theirs")[1:]], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "theirs")
    assert result.stdout.count("finished at 128 images") == 1 and result.stderr.count(" parameters, ") == 1


def wait_for_images(path: Path, images: int) -> None:
    log = path / "metrics.jsonl"
    while not (log.exists() and records(path) and records(path)[-1]["images"] >= images):
        time.sleep(0.02)


def ranks(launcher: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_process_that_is_killed_or_stopped_costs_nothing(tmp_path, number):
    many = ("trainer.num_processes=2", "trainer.total_images=1600", "trainer.log_every_images=16")
    assert train(tmp_path / "whole", *many).returncode == 0
    path = tmp_path / "run"
    launcher = subprocess.Popen(command(path, *many), stderr=subprocess.PIPE, text=True)
    wait_for_images(path, 320)
    os.kill(ranks(launcher)[1], number)
    said = launcher.communicate()[1]
    if number == signal.SIGKILL:
        assert launcher.returncode == 0 and "starting all 2 again" in said
    else:
        status = json.loads((path / "status.json").read_text())
        assert launcher.returncode == status["exit_code"] == 75 and status["state"] == "preempted"
        assert said.count("stopped by signal") == 1
        assert train(path, *many).returncode == 0
    assert fingerprint(path) == fingerprint(tmp_path / "whole")
    assert records(path) == records(tmp_path / "whole")


def test_a_stop_during_the_pictures_loses_neither_steps_nor_pictures(tmp_path):
    """Of the process that is not the first; pictures that are due are drawn when the run goes on."""
    many = ("trainer.num_processes=2", "trainer.sample_every_images=64", "sampler.num_steps=400", "sampler=ddpm")
    launcher = subprocess.Popen(command(tmp_path, *many), stderr=subprocess.PIPE, text=True)
    wait_for_images(tmp_path, 64)
    time.sleep(0.5)
    os.kill(ranks(launcher)[1], signal.SIGUSR1)
    said = launcher.communicate()[1]
    assert launcher.returncode == 75 and "stopped by signal at 64 images" in said, said
    assert not list(tmp_path.glob("samples/*.png"))
    state = json.loads(sorted(tmp_path.glob("checkpoints/step-*"))[-1].joinpath("train_state.json").read_text())
    assert state["images"] == 64 and state["pending"] == ["samples"]
    assert train(tmp_path, *many, "sampler.num_steps=2").returncode == 0
    assert [path.name for path in sorted(tmp_path.glob("samples/*.png"))] == [
        "images-000000000064.png",
        "images-000000000128.png",
    ]


def test_bad_input_is_one_line_of_one_process(tmp_path):
    result = train(
        tmp_path / "run", "trainer.num_processes=2", "trainer.batch_size=17", "trainer.device_batch_size=1"
    )
    assert result.returncode == 2
    assert result.stderr.count("trainer.batch_size=17: cannot be shared by 2 processes, 1 at a time") == 1
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
