"""A logger in a process of its own, behind a queue that never waits: nothing that becomes of it reaches training.

A thread is not enough: a client may hold the interpreter, install signal handlers, or, as wandb does, wait for its
server when the interpreter exits. A process can be left behind.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from diffussm.runtime.errors import note
from diffussm.training.loggers import Backend, numbers

CAPACITY = 1000  # messages that wait for a slow backend
PATIENCE_SECONDS = 10.0  # at the end, for what is still to be delivered
TOLD = 3  # exit code of a process that has said why it ends
_SERVE = "import sys; sys.path[:] = {path!r}; from diffussm.training.relay import serve; serve()"


class Relay:
    """What a backend is told, in the order in which it happened, as long as it listens.

    Messages that it is too slow for, or dead for, are dropped, counted and told of once.

    Args:
        directory, name, config: of the run.
        say: told, in a line, what a person should know.
    """

    def __init__(
        self,
        key: str,
        backend: Backend,
        directory: Path,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None] = note,
        capacity: int = CAPACITY,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.key, self.backend, self.directory, self.name, self.config = key, backend, directory, name, config
        self.say, self.patience = say, patience
        self.num_dropped = 0
        self._is_broken = False
        self._queue: queue.Queue[tuple[str, tuple] | None] = queue.Queue(capacity)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, images: int) -> None:
        """Start the process, which begins to show a run that has seen so many images."""
        command = [sys.executable, "-c", _SERVE.format(path=sys.path)]
        try:
            # In a session of its own, so that Ctrl-C leaves it the last records.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            self.say(f"logger {self.key}: cannot be started ({error.strerror}); metrics.jsonl has everything")
            return
        pipe = self._process.stdin
        assert pipe is not None
        self._send((self.key, self.backend, str(self.directory)))
        self._send(("start", (self.directory, self.name, images, self.config)))
        self._thread = threading.Thread(
            target=self._deliver, args=(self._process, pipe), name=self.key, daemon=True
        )
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand on the numbers of a record."""
        self._send(("write", (record["images"], numbers(record))))

    def show(self, images: int, name: str, picture: Path) -> None:
        """Hand on a picture."""
        self._send(("show", (images, name, picture)))

    def close(self) -> None:
        """Let the backend end by itself for some seconds; then it ends all the same."""
        if self._process is None:
            return
        deadline, was_late = time.monotonic() + self.patience, False
        if not self._is_broken:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=self.patience)
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            was_late = True
            self._process.kill()
            self._process.wait()
        self._process = None
        self._thread.join()  # whose pipe has lost its other end
        self.num_dropped += sum(message is not None for message in self._queue.queue)
        facts = [f"{self.num_dropped:,} records dropped"] if self.num_dropped else []
        if was_late:
            facts.append(f"not ready after {self.patience:g} s, so left behind")
        if facts:
            self.say(f"logger {self.key}: {', '.join(facts)}; metrics.jsonl has everything")

    def _send(self, message: Any) -> None:
        if self._process is None:
            return
        if self._is_broken:
            self.num_dropped += 1
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self.num_dropped += 1
            if self.num_dropped == 1:
                self.say(f"logger {self.key}: too slow, dropping records; metrics.jsonl has all of them")

    def _deliver(self, process: "subprocess.Popen[bytes]", pipe: BinaryIO) -> None:
        """What the thread does: it may wait for the backend, for nobody waits for it."""
        try:
            with pipe:
                for message in iter(self._queue.get, None):
                    pickle.dump(message, pipe)
                    pipe.flush()
        except OSError:
            self._is_broken = True
            self.num_dropped += 1
            if (code := process.wait()) not in (TOLD, -signal.SIGKILL):
                self.say(f"logger {self.key}: its process has ended (exit code {code}); metrics.jsonl goes on")


def serve() -> None:
    """What the process does: call the backend as stdin says, until that ends. What fails is told of once."""
    say = _take_stderr()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are meant for training, which closes stdin when it stops
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    key, backend, directory = pickle.load(sys.stdin.buffer)
    _write_output_to(Path(directory) / key / "output.log")
    num_calls = num_failed = 0
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # also in the middle of a message
            name, arguments = "close", ()
        try:
            num_calls += 1
            if remark := getattr(backend, name)(*arguments):
                say(f"logger {key}: {remark}")
        except Exception as error:
            num_failed += 1
            print(f"{name}: {error!r}", flush=True)
            if name == "start":
                say(f"logger {key}: does not start ({_describe(error)}); metrics.jsonl has everything")
                os._exit(TOLD)  # whatever it has registered for the end
            if num_failed == 1:
                say(f"logger {key}: {name} failed ({_describe(error)}); metrics.jsonl has everything")
        if name == "close":
            break
    if num_failed:
        say(f"logger {key}: {num_failed} of {num_calls} calls failed, see {directory}/{key}/output.log")
    sys.stdout.flush()
    os._exit(0)  # without what clients do when the interpreter exits, such as waiting for a server


def _describe(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _take_stderr() -> Callable[[str], None]:
    """`note` to what is stderr now, whatever becomes of that."""
    stderr = os.fdopen(os.dup(2), "w")
    return lambda line: print(f"diffussm: {line}", file=stderr, flush=True)


def _write_output_to(file: Path) -> None:
    """What the backend prints goes to a file; only what we say goes where training says things."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _end_with(parent: int) -> None:
    """End when training has, however that came, after the time for the last records."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)
