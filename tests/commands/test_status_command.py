"""`diffussm status`: every state that a run can be in, from whatever its directory holds."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import SMALL_RUN

from diffussm.cli import main
from diffussm.runtime.run_dir import TIME_FORMAT, RunDirectory
from diffussm.runtime.run_status import describe_duration, read_report

RECORD = {"images": 64, "step": 4, "loss": 0.5, "loss_q0": 0.9, "grad_norm": 1.5, "images_per_second": 123.4,
          "data_wait": 0.25, "mfu": None, "memory_gib": 1.5}  # fmt: skip


@pytest.fixture
def directory(tmp_path) -> Path:
    """A run that goes on, in this process."""
    path = tmp_path / "run"
    path.mkdir()
    facts = {"images": 64, "total_images": 128, "eta_seconds": 65.0, "limit_seconds": 300.0, "doing": "training"}
    RunDirectory(path).write_status("running", restarts=2, skipped_steps=1, processes=8, **facts)
    evaluation = {"images": 32, "evaluation": {"FID-digits": 5.7}}
    failed = {"images": 48, "event": "failed save"}
    lines = [json.dumps(line) for line in (evaluation, failed, RECORD)]
    (path / "metrics.jsonl").write_text("\n".join([lines[0], "damaged", *lines[1:], '{"images": 96, "lo']))
    for step in (2, 4):
        checkpoint = path / "checkpoints" / f"step-{step:012d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    (path / "checkpoints" / ".tmp-step-000000000006").mkdir()
    return path


def change(path: Path, **facts) -> None:
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps({**status, **facts}))


def shown(path: Path, capsys) -> tuple[int, str]:
    code = main(["status", str(path)])
    return code, capsys.readouterr().out


def test_a_run_that_goes_on_shows_everything(directory, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    code, text = shown(directory, capsys)
    assert code == 0
    for promise in (
        "run: running, 64 of 128 images (50 %), 0:01:05 left",
        "123 images/s, 25 % of the time waiting for data, 1.5 GiB at most",
        "loss 0.5   loss_q0 0.9   grad_norm 1.5",
        "FID-digits 5.7 (at 32 images)",
        "step-000000000004 (0:00:0",
        "2 restarts, 1 skipped step, 1 failed save, 1 damaged line of metrics.jsonl",
        f"process {os.getpid()} on {socket.gethostname()}, 8 processes",
    ):
        assert promise in text
    assert sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*")) == before  # reads only


def test_a_run_whose_process_is_no_more_is_gone(directory, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    change(directory, pid=ended.pid)
    code, text = shown(directory, capsys)
    assert (
        code == 1 and "run: gone, " in text and f"process {ended.pid} no longer exists: the same command" in text
    )
    change(directory, host="elsewhere")  # where nothing is known of its processes
    assert shown(directory, capsys)[0] == 0


def test_a_run_that_is_silent_for_longer_than_it_said_is_stalled(directory, capsys):
    silent = datetime.now(timezone.utc) - timedelta(seconds=200)
    change(directory, updated=silent.strftime(TIME_FORMAT))
    assert shown(directory, capsys)[0] == 0
    change(directory, limit_seconds=100.0)
    code, text = shown(directory, capsys)
    assert code == 1 and "run: stalled, " in text and f"since {silent:%Y-%m-%d %H:%M:%S}" in text


@pytest.mark.parametrize(
    ("facts", "code", "says"),
    [
        ({"state": "finished", "exit_code": 0}, 0, "run: finished, 64 of 128"),
        ({"state": "imported", "exit_code": 0}, 0, "run: imported"),
        ({"state": "preempted", "exit_code": 75, "message": "stopped by signal"}, 75, "stopped by signal"),
        ({"state": "failed", "exit_code": 70, "message": "not finite"}, 70, "not finite"),
        ({"state": "failed", "message": "boom"}, 1, "boom"),
        ({"doing": "evaluation"}, 0, "doing        evaluation"),
    ],
)
def test_every_state_has_its_exit_code(directory, capsys, facts, code, says):
    change(directory, **facts)
    found, text = shown(directory, capsys)
    assert found == code and says in text


@pytest.mark.parametrize("content", [None, b"", b"\xff{", b"[]", b'{"pid": 1}'])
def test_without_a_status_the_rest_is_told(directory, capsys, content):
    (directory / "status.json").unlink()
    if content is not None:
        (directory / "status.json").write_bytes(content)
    (directory / "config.yaml").write_text("trainer:\n  total_images: 256\n")
    code, text = shown(directory, capsys)
    assert code == 1 and "unknown, 64 of 256 images (25 %)" in text and "loss 0.5" in text
    assert "there is no status.json" in text if content is None else "status.json is damaged" in text


def test_several_runs_and_what_is_none(directory, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code = main(["status", str(tmp_path / "empty"), str(tmp_path / "nowhere"), str(directory)])
    captured = capsys.readouterr()
    assert code == 73 and "run: running" in captured.out
    assert "empty: holds no run" in captured.err and "nowhere: no such directory" in captured.err


def test_json_is_a_line_for_each(directory, capsys):
    assert main(["status", "--json", str(directory), str(directory)]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    document = json.loads(first)
    assert document["state"] == "running" and document["record"]["loss"] == 0.5
    assert document["status"]["images"] == document["images"] == 64 and document["exit_code"] == 0


def test_a_file_is_no_run(directory, capsys):
    assert main(["status", str(directory / "status.json")]) == 73
    assert "status.json: a file: give run directories" in capsys.readouterr().err


def test_it_loads_nothing_heavy(directory):
    code = (
        "import sys; from diffussm.cli import main; main(['status', sys.argv[1]]); "
        "print(sorted({'torch', 'numpy', 'hydra', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_real_run_tells_its_status_while_it_goes_on_and_after(in_tmp, capsys):
    arguments = ["train", *SMALL_RUN, "run_dir=run", "trainer.total_images=1M", "trainer.num_processes=2"]
    process = subprocess.Popen([sys.executable, "-m", "diffussm", *arguments], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (Path("run/status.json").exists() and read_report(Path("run")).record):
        time.sleep(0.05)
    report = read_report(Path("run"))
    assert (report.state, report.total_images, report.status["processes"]) == ("running", 1_000_000, 2)
    assert 0 < report.images < 1_000_000 and report.status["eta_seconds"] > 0
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert "16 images = 2 processes x 1 pass x 8 images" in said and "run          run (new)" in said
    report = read_report(Path("run"))
    assert (report.state, report.exit_code) == ("preempted", 75) and "stopped by signal" in report.message
    images = report.images
    assert main([*arguments[:-2], f"trainer.total_images={images + 64}"]) == 0
    said = capsys.readouterr().err
    assert f"run (continues from step-{images // 16:012d}, at {images:,} images)" in said
    report = read_report(Path("run"))
    assert (report.state, report.images, report.status["restarts"]) == ("finished", images + 64, 1)
    assert report.events == {"resume": 1} and report.exit_code == 0 and "message" not in report.status


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (3725, "1:02:05"), (47 * 3600, "47:00:00"), (200_000, "2 days 7 h")]
)
def test_durations(seconds, text):
    assert describe_duration(seconds) == text
