"""A command as a process of its own, which a file can ask to stop: one job of many."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from diffussm.runtime.errors import Preempted
from diffussm.runtime.signals import StopRequest

POLL_SECONDS = 0.1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def run_job(command: Sequence[str], directory: Path, log: Path, stop: Path, *, is_worker: bool) -> int:
    """Run `command` in `directory`, its output added to `log`; returns the exit code, 128 + N after signal N.

    Once the file `stop` exists it is sent SIGTERM, waited for, and not started at all. It does not outlive this
    process: whatever ends the wait, such as a scheduler's own signal, ends it in the same good order.

    Args:
        is_worker: whether this process works for another, which alone decides about stopping: signals that a
            terminal sends to both are left to it, and its end is a reason to stop.
    """
    parent = os.getppid()
    if is_worker:
        for number in StopRequest.SIGNALS:  # the handlers of a scheduler stay, and a child inherits none
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, lambda number, frame: None)
    if stop.exists():
        return Preempted.exit_code
    asked, log = False, directory / log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_end_with_parent,
        )
        try:
            while process.poll() is None:
                if not asked and (stop.exists() or (is_worker and os.getppid() != parent)):
                    process.terminate()
                    asked = True
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    code = process.returncode
    if asked and code == -signal.SIGTERM:
        return Preempted.exit_code  # it had not begun
    return 128 - code if code < 0 else code


def _end_with_parent() -> None:
    """Leave a terminal's signals and a scheduler's warning to the parent; end in good order when that is lost."""
    os.setpgrp()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if _libc is not None:
        _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
