"""The far side of `jobs`: forks processes that have imported everything already, and tells what becomes of them.

Reads one JSON request per line from stdin; writes {"id", "pid"} when a process has started and {"id", "code"} when
it has ended. It adopts what its children leave behind, so that whoever is there besides them is an orphan.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
import torch._dynamo  # seconds, and an optimiser needs it
import torch.distributed.distributed_c10d
from faults import injections

import diffussm.build
import diffussm.commands.encode
import diffussm.commands.evaluate
import diffussm.commands.sample
import diffussm.commands.train
import diffussm.runtime.distributed
import diffussm.runtime.launch
import diffussm.runtime.signals
from diffussm.cli import main

PRELOADED = (sklearn.datasets, torch, diffussm)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def run(request: Mapping[str, Any]) -> int:
    """What a started process does: with the request's faults in it, the command line."""
    sys.argv = ["diffussm", *request["arguments"]]
    # What a launcher within starts need not import everything anew either.
    diffussm.runtime.launch.subprocess = Forking(request)
    for name, *arguments in request["faults"]:
        getattr(injections, name)(*arguments)
    return main(request["arguments"])


def fork(work: Callable[[], int]) -> int:
    """The pid of a process that does this and ends with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forking:
    """What a launcher needs of `subprocess`."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request

    def Popen(self, command: list[str], env: Mapping[str, str], preexec_fn: Callable[[], None]) -> "Forked":
        return Forked(self.request, env, preexec_fn)


class Forked:
    """What a launcher needs of subprocess.Popen, for a process that runs the launcher's own command as a rank."""

    def __init__(self, request: Mapping[str, Any], env: Mapping[str, str], preexec_fn: Callable[[], None]) -> None:
        def work() -> int:
            for number in diffussm.runtime.launch.FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            os.environ.clear()
            os.environ.update(env)
            return main(request["arguments"])  # its faults are there, inherited

        self.pid, self.returncode = fork(work), None

    def poll(self) -> int | None:
        return self.returncode if self.returncode is not None else self._reap(os.WNOHANG)

    def wait(self) -> int:
        return self.returncode if self.returncode is not None else self._reap(0)

    def _reap(self, options: int) -> int | None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def serve() -> None:
    """Work off requests until there are no more; nothing outlives this process."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    ended, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(tell)
    names: dict[int, int] = {}
    answer({"ready": os.getpid()})
    while True:
        readable, _, _ = select.select([0, ended], [], [])
        if ended in readable:
            os.read(ended, 1000)
            reap(names)
        if 0 in readable:
            line = sys.stdin.readline()
            if not line:
                break
            request = json.loads(line)
            pid = fork(lambda request=request: begin(request))
            names[pid] = request["id"]
            answer({"id": request["id"], "pid": pid})


def begin(request: Mapping[str, Any]) -> int:
    """What a request asks for, in a fresh child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(request["environment"])
    os.chdir(Path(request["out"]).parent)
    return run(request)


def reap(names: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in names:
            answer({"id": names.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def answer(message: Mapping[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(message) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    serve()
