"""A disk that is full, for a while or for good: nothing that was safe is lost, nothing half-written is left."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import checkpoints, command, fingerprint, records, status

from diffussm.training.checkpoint import Checkpoint

slow = pytest.mark.slow
FILES = ("model", "ema_0.998", "optimizer", "train_state", "config", "manifest")


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("storage") / "whole"
    nursery.run(*command(path))
    return path


def partial(path: Path) -> list[Path]:
    """What a write that failed may have left; checkpoints are whole, or this fails."""
    for found in checkpoints(path):
        Checkpoint(found)
    return [*path.rglob(".tmp-*"), *path.rglob(".*.tmp")]


@pytest.mark.fault("G4")
@pytest.mark.parametrize(
    ("name", "failures"),
    [(name, 2) if name == "manifest" else pytest.param(name, 2, marks=slow) for name in FILES] + [("model", 1)],
)
def test_a_file_of_a_checkpoint_that_finds_no_room_costs_that_checkpoint(
    jobs, tmp_path, whole, figure, name, failures
):
    file = f"{name}.json" if name in ("train_state", "config", "manifest") else f"{name}.safetensors"
    job = jobs.run(*command(tmp_path / "run"), faults=[("full_disk", file, 4, failures)])
    said = [line for line in job.said.splitlines() if "saving failed" in line]
    left = partial(tmp_path / "run")
    figure(f"/dev/full for {file} {failures} times: {len(left)} partial files, run to its end")
    assert len(said) == failures and all(
        "No space left on device: the checkpoints before" in line for line in said
    )
    assert fingerprint(tmp_path / "run") == fingerprint(whole) and records(tmp_path / "run") == records(whole)
    assert not left


@pytest.mark.fault("G4")
@pytest.mark.parametrize("processes", ["null", pytest.param("2", marks=slow)])
def test_a_limit_on_files_is_survived_twice_and_ends_the_run_the_third_time(jobs, tmp_path, figure, processes):
    path, faults = tmp_path / "run", [("small_files", 20_000, 4, 10**6)]
    overrides = (f"trainer.num_processes={processes}", "trainer.total_images=1600")
    job = jobs.run(*command(path, *overrides), faults=faults, code=74)
    assert job.said.count("saving failed") == 6 and "Traceback" not in job.said
    last = [line for line in job.said.splitlines() if line.startswith("diffussm: ") and "File too large" in line]
    assert len(last) == 1, job.said
    assert [found.name for found in checkpoints(path)] == ["step-000000000002", "step-000000000004"]
    assert status(path)["exit_code"] == 74 and not partial(path)
    figure(f"RLIMIT_FSIZE, {processes} processes: exit 74 after 3 saves, {len(checkpoints(path))} older intact")
    jobs.run(*command(path, *overrides, "trainer.total_images=160"))  # once there is room again


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Take all the room that is left."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path
    raise AssertionError("there is always room")


def end_at_a_page(path: Path) -> None:
    """Add a line of no meaning, so that the next one needs more room than the file has."""
    start, stop = '{"images": 0, "event": "', '"}\n'
    rest = -(path.stat().st_size + len(start + stop)) % 4096
    with path.open("a") as file:
        file.write(start + rest * "x" + stop)


@pytest.mark.fault("G4")
@pytest.mark.parametrize("is_freed", [True, pytest.param(False, marks=slow)], ids=["for a while", "for good"])
def test_a_full_disk_costs_no_record_and_no_older_checkpoint(jobs, disk, tmp_path, figure, is_freed):
    path, held = disk / "run", [tmp_path / "filled", tmp_path / "freed"]
    faults = [("hold", 12, str(held[0])), ("hold", 16, str(held[1]))]
    overrides = ("trainer.total_images=384", "trainer.log_every_images=16")
    job = jobs.start(*command(path, *overrides), faults=faults)
    job.wait_for("BEGIN hold 12")
    end_at_a_page(path / "metrics.jsonl")
    before, filler = checkpoints(path), fill(disk / "filler")
    held[0].touch()
    job.wait_for("BEGIN hold 16")  # with two saves that failed in between, and records that wait
    assert job.said.count("saving failed") == 4 and checkpoints(path) == before
    assert 12 <= len(records(path)) < 16
    if is_freed:
        filler.unlink()
    held[1].touch()
    if is_freed:
        assert job.wait() == 0, job.said
        jobs.run(*command(tmp_path / "whole", *overrides))
        assert fingerprint(path) == fingerprint(tmp_path / "whole")
        assert records(path) == records(tmp_path / "whole")
        figure(f"tmpfs: {len(partial(path))} partial files, 0 of {len(records(path))} records lost")
    else:
        assert job.wait() == 74 and "Traceback" not in job.said, job.said
        lines = [line for line in job.said.splitlines() if line.startswith("diffussm: ")]
        # That who looks from outside sees less is said once; then why it ended.
        assert ["/status.json: " in line for line in lines] == [True, False], job.said
        assert checkpoints(path) == before
        figure(f"tmpfs for good: exit 74, {len(partial(path))} partial files, {len(before)} checkpoints intact")
    assert not partial(path)
