"""`diffussm encode`: one result on any number of processes and through any kills, refusals before any work."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from data.stand_ins import PatchProjection, crop_photographs, damage

from diffussm.cli import main
from diffussm.commands.encode import _summarize
from diffussm.data import images
from diffussm.data.encoding import Encoding
from diffussm.data.fake import Fake
from diffussm.data.latents import LatentSet
from diffussm.runtime.distributed import Processes
from diffussm.runtime.launch import Place

TESTS = Path(__file__).resolve().parents[1]
GROUPS = {
    "autoencoder/patches": "_target_: data.stand_ins.PatchProjection\nscale: 2.0\ndelay: 0.0\ntile: null\n",
    "data/unanswered": "_target_: data.stand_ins.Unanswered\npath: ???\nresolution: 32\nfirst: 9\n"
    "max_bad_fraction: 0.1\n",
}
OPTIONS = ("autoencoder=patches", "device=cpu", "batch_size=3", "shard_size=4", "num_workers=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 images in two classes, three of them damaged, and a configuration directory that knows the stand-ins."""
    root = tmp_path_factory.mktemp("encode")
    crop_photographs(root / "images", 40)
    damage(root / "images")
    for name, content in GROUPS.items():
        path = root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def arguments(folder: Path, to: Path | str, *more: str) -> list[str]:
    configs = f"--config-dir={folder / 'configs'}"
    images = [f"data.path={folder / 'images'}", "data.resolution=32", "data.max_bad_fraction=0.1"]
    return ["encode", configs, *images, *OPTIONS, f"to={to}", *more]


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """What one process encodes without interruption."""
    assert main(arguments(folder, folder / "whole")) == 0
    return folder / "whole"


def manifest_hash(path: Path) -> str:
    LatentSet(path, verify=True)
    return hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def start(command: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "diffussm", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finished_shards(path: Path) -> int:
    return len(list(path.glob("shards/*.json")))


def wait_for_shards(process: subprocess.Popen, path: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while finished_shards(path) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_a_set_holds_what_is_promised_and_the_same_command_again_only_reports(folder, whole, capsys):
    names = {path.name for path in whole.iterdir()}
    assert names == {".lock", "request.json", "manifest.json", "labels.npy", "bad_files.jsonl", "shards"}
    assert len(list((whole / "shards").iterdir())) == 20
    latents = LatentSet(whole)
    assert len(latents) == 37 and latents.class_names == ["china", "flower"]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(arguments(folder, whole)) == 0
    shown = capsys.readouterr()
    assert "37 images as latents of (4, 4, 4)" in shown.out and "nothing to do" in shown.out
    assert "3 images that could not be read" in shown.out and shown.err == ""
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert main(arguments(folder, whole, "num_workers=0", "data.max_bad_fraction=0.5")) == 0  # not of the result


def test_two_processes_encode_the_same_set_byte_for_byte(folder, whole, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    process = start(arguments(folder, tmp_path / "set"), launcher)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "processes    2" in said and out.count("37 images as latents") == 1
    assert manifest_hash(tmp_path / "set") == manifest_hash(whole)
    records = (json.loads(path.read_text()) for path in (tmp_path / "set/shards").glob("*.json"))
    assert [record["process"] for record in records].count(1) == 5
    assert (tmp_path / "set/bad_files.jsonl").read_text() == (whole / "bad_files.jsonl").read_text()


def test_processes_without_a_shard_are_told_of(tmp_path, capsys):
    for world_size, said in ((3, ""), (5, "diffussm: 2 of 5 processes find nothing to do: lower shard_size=4\n")):
        processes = Processes(Place(0, world_size))
        encoding = Encoding(Fake(10, resolution=8), PatchProjection(), tmp_path, shard_size=4, processes=processes)
        _summarize(encoding, 0)
        shown = capsys.readouterr().err
        assert f"processes    {world_size}, the first on cpu, with one thread each" in shown
        assert shown.endswith(said) and ("nothing to do" in shown) == bool(said)


def test_two_processes_report_too_many_bad_images_and_end(folder, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    process = start(arguments(folder, tmp_path / "set", "data.max_bad_fraction=0.05"), launcher)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "3 of 40 images cannot be read so far" in said
    assert "exitcode  : 65" in said
    assert len((tmp_path / "set/bad_files.jsonl").read_text().splitlines()) >= 1


@pytest.mark.fault("G19")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_still_makes_the_same_set(jobs, folder, whole, tmp_path, figure, kills):
    path, chance = tmp_path / "set", random.Random(0)
    for kill in range(kills):
        job = jobs.start(*arguments(folder, path, "autoencoder.delay=0.2"))
        job.wait_until(lambda kill=kill: finished_shards(path) >= 9 * kill // kills)
        job.wait_for("processes    1, the first on")
        time.sleep(chance.uniform(0.02, 0.4))
        job.kill()  # its workers live on for a while, and hold no lock
        assert not (path / "manifest.json").exists()
    before = {file: file.stat().st_mtime_ns for file in path.glob("shards/*.json")}
    assert main(arguments(folder, path)) == 0
    redone = sum(file.stat().st_mtime_ns != time for file, time in before.items())
    is_same = manifest_hash(path) == manifest_hash(whole)
    figure(
        f"{kills} kills, {redone} of {len(before)} shards done again, hash {'the same' if is_same else 'ANOTHER'}"
    )
    assert is_same and not redone
    assert not list(path.rglob(".*.tmp"))


def test_sigterm_ends_it_at_once_and_it_continues(folder, whole, tmp_path):
    process = start(arguments(folder, tmp_path / "set", "autoencoder.delay=0.2"))
    wait_for_shards(process, tmp_path / "set", 1)
    os.killpg(process.pid, signal.SIGTERM)  # workers too, as schedulers do
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "of 10 shards finished: run it again" in said.splitlines()[-1]
    finished = finished_shards(tmp_path / "set")
    assert 1 <= finished < 10 and f"with {finished} of 10" in said
    assert main(arguments(folder, tmp_path / "set")) == 0
    assert manifest_hash(tmp_path / "set") == manifest_hash(whole)


def test_sigterm_is_heard_while_storage_does_not_answer(folder, tmp_path):
    process = start(arguments(folder, tmp_path / "set", "data=unanswered"))
    wait_for_shards(process, tmp_path / "set", 2)
    readers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "with 2 of 10 shards finished: run it again" in said
    assert readers and not any(Path(f"/proc/{pid}").exists() for pid in readers)


def test_a_killed_reader_is_replaced_and_the_set_is_the_same(folder, whole, tmp_path):
    process = start(arguments(folder, tmp_path / "set", "autoencoder.delay=0.2"))
    wait_for_shards(process, tmp_path / "set", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "was killed by SIGKILL" in said, said
    assert manifest_hash(tmp_path / "set") == manifest_hash(whole)


@pytest.mark.fault("G19")
def test_a_second_writer_is_refused(folder, whole, capsys):
    with (whole / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(folder, whole)) == 73
    shown = capsys.readouterr().err
    assert "another process is using it" in shown and shown.count("\n") == 1


def test_images_that_are_decoded_otherwise_make_another_set(folder, whole, capsys, monkeypatch):
    assert json.loads((whole / "manifest.json").read_text())["source"]["crop"] == images.CROP
    monkeypatch.setattr(images, "CROP", "adm_center v2")
    assert main(arguments(folder, whole)) == 73
    assert "source.crop: adm_center v1 there, adm_center v2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("autoencoder.scale=3", "scale: 2.0 there, 3.0 here"),
        ("data.resolution=24", "image_shape: [3, 32, 32] there, [3, 24, 24] here"),
        ("data.horizontal_flip=false", "flips: True there, False here"),
        ("autoencoder.tile=32", "encoding.tile: None there, 32 here"),
        ("dtype=fp32", "dtype: fp16 there, fp32 here"),
        ("shard_size=8", "shard_size: 4 there, 8 here"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_another_request_is_refused_before_any_work(folder, whole, tmp_path, capsys, override, says, is_complete):
    shutil.copytree(whole, tmp_path / "set")
    if not is_complete:
        (tmp_path / "set" / "manifest.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(arguments(folder, tmp_path / "set", override)) == 73
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_not_ours_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(arguments(folder, tmp_path)) == 73
    assert "exists and is no latent set" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damage_is_found_when_it_is_run_again_and_can_be_mended(folder, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "set")
    shard = tmp_path / "set" / "shards" / "000003.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(arguments(folder, tmp_path / "set")) == 65
    assert "000003.npy: truncated" in capsys.readouterr().err
    (tmp_path / "set" / "shards" / "000005.npy").unlink()
    (tmp_path / "set" / "manifest.json").unlink()
    assert main(arguments(folder, tmp_path / "set")) == 0
    assert manifest_hash(tmp_path / "set") == manifest_hash(whole)


def test_a_full_disk_is_one_line(folder, tmp_path):
    """As a limit on the size of files, which root cannot escape."""
    command = [sys.executable, "-m", "diffussm", *arguments(folder, tmp_path / "set", "data.resolution=256")]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    script = f"trap '' XFSZ; ulimit -f 100; exec {' '.join(command)}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 74 and last.startswith("diffussm: ") and "File too large" in last
    assert not list(tmp_path.rglob(".*.tmp")) and not (tmp_path / "set" / "manifest.json").exists()


def test_labels_are_optional(folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in sorted((folder / "images" / "flower").iterdir())[5:9]:
        shutil.copy(path, tmp_path / "flat")
    assert main(arguments(folder, tmp_path / "set", f"data.path={tmp_path / 'flat'}")) == 0
    latents = LatentSet(tmp_path / "set")
    assert (len(latents), latents.num_classes, latents.class_names) == (4, None, [])
    assert latents.labels(range(4)).tolist() == [-1] * 4
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["num_bad_files"] == 0
