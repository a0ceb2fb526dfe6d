"""A job of several processes here: signals reach all, a loss starts all again, the exit code says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffussm.runtime.launch import Place, find_place, launch

WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, attempt, out = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], Path(sys.argv[1])
(out / f"{rank} {attempt}").write_text(str(os.getpid()))
"""
ENDS = "sys.exit({}) if rank == '1' else time.sleep(60)"


@pytest.fixture
def command(tmp_path):
    def make(code: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(WORKER + code)
        out = tmp_path / "out"
        out.mkdir()
        return [sys.executable, str(script), str(out)]

    return make


def started(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def alive(tmp_path: Path) -> list[str]:
    pids = [path.read_text() for path in (tmp_path / "out").iterdir()]
    return [pid for pid in pids if pid and "worker.py" in command_line(pid)]


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_all_that_end_well_is_0(command, tmp_path):
    assert launch(command(""), 3) == 0
    assert started(tmp_path) == ["0 0", "1 0", "2 0"]


def test_processes_learn_their_place(command, tmp_path):
    code = "from diffussm.runtime.launch import find_place; (out / rank).write_text(repr(find_place()))"
    assert launch(command(code), 2) == 0
    text = (tmp_path / "out" / "1").read_text()
    assert (
        text.startswith("Place(rank=1, world_size=2, local_rank=1, address='127.0.0.1:") and "attempt='0'" in text
    )


@pytest.mark.parametrize("code", [2, 65, 70, 74])
def test_a_reason_is_final_whoever_gives_it(command, tmp_path, monkeypatch, code):
    monkeypatch.setattr("diffussm.runtime.launch.GRACE_SECONDS", 0.3)
    assert launch(command(ENDS.format(code)), 2, max_restarts=3) == code
    assert started(tmp_path) == ["0 0", "1 0"] and not alive(tmp_path)


def test_a_reason_counts_more_than_what_became_of_those_left_behind(command):
    code = "time.sleep(0.5 if rank == '1' else 0); sys.exit(65 if rank == '1' else 1)"
    assert launch(command(code), 2, max_restarts=3) == 65


@pytest.mark.parametrize(("end", "expected"), [("sys.exit(1)", 1), ("os.kill(os.getpid(), 9)", 137)])
def test_a_lost_process_starts_all_again_and_not_for_ever(command, tmp_path, monkeypatch, capfd, end, expected):
    monkeypatch.setattr("diffussm.runtime.launch.GRACE_SECONDS", 0.3)
    code = f"time.sleep(60) if rank == '0' else {end}"
    assert launch(command(code), 2, max_restarts=2) == expected
    assert started(tmp_path) == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"] and not alive(tmp_path)
    said = capfd.readouterr().err
    assert said.count("process 1 of 2 is lost") == 2 and ("SIGKILL" in said) == (expected == 137)


def test_a_job_that_recovers_ends_well(command):
    assert launch(command("sys.exit(1 if attempt == '0' else 0)"), 2, max_restarts=1) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_all_and_a_stop_in_good_order_takes_its_time(command, tmp_path, number):
    """Also longer than what a lost process is allowed."""
    code = (
        "signal.signal(int(sys.argv[2]), lambda *_: (time.sleep(0.2 + 1.5 * int(rank)), os._exit(75)))\n"
        "(out / f'ready {rank}').touch()\n"
        "time.sleep(60)"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, diffussm.runtime.launch as l; l.GRACE_SECONDS = 0.5; sys.exit(l.launch(sys.argv[1:], 2))",
            *command(code),
            str(int(number)),
        ]
    )
    while sum("ready" in name for name in started(tmp_path)) < 2:
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(20) == 75


def test_a_signal_before_there_is_anybody_to_heed_it_is_a_stop_too(command, tmp_path):
    """Of processes that are still importing: nothing is lost, and the scheduler may run it again."""
    code = "import sys, diffussm.runtime.launch as l; sys.exit(l.launch(sys.argv[1:], 2, 3))"
    launcher = subprocess.Popen([sys.executable, "-c", code, *command("time.sleep(60)")])
    while len([path for path in (tmp_path / "out").iterdir() if path.read_text()]) < 2:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(20) == 75 and started(tmp_path) == ["0 0", "1 0"]


def test_no_process_outlives_a_launcher_that_is_killed(command, tmp_path):
    code = "from diffussm.runtime.launch import launch; import sys; launch(sys.argv[1:], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, *command("time.sleep(60)")])
    while len([path for path in (tmp_path / "out").iterdir() if path.read_text()]) < 2:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path)


def test_a_process_on_its_own_has_no_address(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert find_place() == Place() and Place().address is None
    assert "RANK" not in os.environ
