"""A job of many: its exit code and output, and that it ends in good order whoever asks for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffussm.runtime.jobs import run_job

SAVES = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path("saved").touch(), sys.exit(75)))
Path("begun").touch()
time.sleep(60)
"""


def job(path: Path, code: str) -> int:
    return run_job([sys.executable, "-c", code], path, Path("logs/log"), path / "stop", is_worker=False)


def when(path: Path, do) -> threading.Thread:
    """A thread that does something once a file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("exit(65)", 65), ("import os; os.abort()", 134)])
def test_its_exit_code_is_told(tmp_path, code, expected):
    assert job(tmp_path, code) == expected


def test_its_output_is_added_to_the_log(tmp_path):
    job(tmp_path, "print('one')")
    job(tmp_path, "import sys; print('two', file=sys.stderr)")
    assert (tmp_path / "logs" / "log").read_text() == "one\ntwo\n"


def test_a_request_to_stop_lets_it_save(tmp_path):
    when(tmp_path / "begun", (tmp_path / "stop").touch)
    assert job(tmp_path, SAVES) == 75
    assert (tmp_path / "saved").exists()


def test_nothing_begins_after_a_request_to_stop(tmp_path):
    (tmp_path / "stop").touch()
    assert job(tmp_path, SAVES) == 75
    assert not (tmp_path / "begun").exists()


def test_what_cannot_save_yet_is_told_as_preempted(tmp_path):
    when(tmp_path / "begun", (tmp_path / "stop").touch)
    assert job(tmp_path, SAVES.replace("signal.signal(", "print(")) == 75


def test_a_schedulers_own_way_out_lets_it_save(tmp_path):
    """submitit leaves by SystemExit from the handler of its signal, once it has queued the job again."""

    def leave(number: int, frame: object) -> None:
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, leave)
    try:
        when(tmp_path / "begun", lambda: os.kill(os.getpid(), signal.SIGUSR2))
        with pytest.raises(SystemExit):
            job(tmp_path, SAVES)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_it_saves_when_its_parent_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from diffussm.runtime.jobs import run_job; path = Path(sys.argv[1])"
    )
    code += "; run_job([sys.executable, '-c', sys.argv[2]], path, Path('log'), path / 'stop', is_worker=False)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), SAVES])
    when(tmp_path / "begun", parent.kill).join(120)
    parent.wait()
    deadline = time.monotonic() + 60
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
