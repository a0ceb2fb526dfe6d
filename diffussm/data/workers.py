"""Processes that prepare the batches of coming steps in shared memory, each replaced where it died.

Every worker has a pipe and slots of memory of its own, so that no worker can hold up another by its death, and
a death is seen as the end of its pipe: by whoever waits for it, not by a signal that interrupts something
else. What it had finished is still in the slots; what it had not is given to its successor.
"""

import atexit
import contextlib
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffussm.runtime.errors import DataError, OutOfMemoryError, UserError

SLOTS = 2  # of each worker: one to fill while the other is read
MAX_DEATHS = 5  # of one worker and its successors before the same step
PARENT_CHECK_SECONDS = 5.0
POLL_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A thread pool does not survive the fork, but locks that its threads held do: workers use one thread each.
_FORK = multiprocessing.get_context("fork")

Slot = TypeVar("Slot")


class Workers(Generic[Slot]):
    """`fill(step, slot)` for the steps from `first` on, ahead of time, in `num_workers` processes.

    Use it as a context manager: leaving it kills the processes, whatever they are at.

    Args:
        fill: writes the result into the slot; what it returns is pickled. Its UserErrors reappear in `take`.
        make_slot: a slot of tensors in shared memory, such as `shared_empty` makes.
        warn: is told of each process that had to be replaced.
        poll: called every POLL_SECONDS while `take` waits, which it ends by raising.
    """

    def __init__(
        self,
        fill: Callable[[int, Slot], Any],
        make_slot: Callable[[], Slot],
        num_workers: int,
        first: int,
        warn: Callable[[str], None],
        poll: Callable[[], object] = lambda: None,
    ) -> None:
        self._next = first
        self._workers: list[_Worker[Slot]] = []
        atexit.register(self.close)  # ahead of multiprocessing's own, which asks politely and waits for ever
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(fill, [make_slot() for _ in range(SLOTS)], warn, poll))
        except BaseException:
            self.close()
            raise
        for step in range(first, first + SLOTS * num_workers):
            self._worker(step).submit(step)

    def _worker(self, step: int) -> "_Worker[Slot]":
        return self._workers[step % len(self._workers)]

    def take(self, read: Callable[[Slot, Any], Any]) -> Any:
        """What `read(slot, returned)` makes of the next step, after which the slot is filled anew."""
        worker = self._worker(self._next)
        result = read(*worker.receive())
        worker.submit(self._next + SLOTS * len(self._workers))
        self._next += 1
        return result

    def close(self) -> None:
        """Kill the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> "Workers[Slot]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Worker(Generic[Slot]):
    """One process after the other, with the work they have in hand."""

    def __init__(
        self,
        fill: Callable[[int, Slot], Any],
        slots: Sequence[Slot],
        warn: Callable[[str], None],
        poll: Callable[[], object],
    ) -> None:
        self.fill, self.slots, self.warn, self.poll = fill, slots, warn, poll
        self._in_hand: deque[tuple[int, int]] = deque()  # step and slot, oldest first
        self._free = deque(range(len(slots)))
        self._deaths = 0  # since something was received
        self._start()

    def _start(self) -> None:
        self._connection, theirs = _FORK.Pipe()
        arguments = (theirs, self._connection, os.getpid(), self.fill, self.slots)
        self._process = _FORK.Process(target=_serve, args=arguments, daemon=True, name="loader worker")
        # Ctrl-C, timeout and SLURM signal every process of a run: workers must outlast that, or the last save
        # fails. Blocked from before the fork on, for else there is a moment at which a signal ends a worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def submit(self, step: int) -> None:
        """Have `step` prepared after what is in hand."""
        task = step, self._free.popleft()
        self._in_hand.append(task)
        self._send(task)

    def _send(self, task: tuple[int, int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` finds out
            self._connection.send(task)

    def receive(self) -> tuple[Slot, Any]:
        """The oldest step in hand; its slot stays as it is until the next `submit`."""
        while True:
            # Storage that does not answer holds a worker for ever, and who waits for it would hear no signal.
            while not self._connection.poll(POLL_SECONDS):
                self.poll()
            try:
                result = self._connection.recv()
                break
            except (EOFError, OSError):
                self._replace()
        self._deaths = 0
        _, slot = self._in_hand.popleft()
        self._free.append(slot)
        if isinstance(result, UserError):
            raise result
        if isinstance(result, _Failure):
            raise RuntimeError(f"in a loader worker:\n{result.text}")
        return self.slots[slot], result

    def _replace(self) -> None:
        self._process.join(1.0)  # for its exit code
        code, step = self._process.exitcode, self._in_hand[0][0]
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended (exit code {code})"
        self.kill()
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            is_kill = code == -signal.SIGKILL
            raise (OutOfMemoryError if is_kill else DataError)(
                f"a loader worker {how} {self._deaths} times in a row before the batch of step {step} was ready: "
                + (
                    "memory has probably run out: lower num_workers"
                    if is_kill
                    else "set num_workers=0 to see what it fails at, which may be a damaged file"
                )
            )
        self.warn(f"a loader worker {how} before step {step}: another takes its place, nothing is lost")
        self._start()
        for task in self._in_hand:
            self._send(task)

    def kill(self) -> None:
        """End the process without asking."""
        self._process.kill()
        self._process.join(1.0)
        self._connection.close()


class _Failure:
    """The traceback of an error that is no UserError."""

    def __init__(self, text: str) -> None:
        self.text = text


def _serve(
    connection: Connection, parents_end: Connection, parent: int, fill: Callable[[int, Any], Any], slots: Sequence
) -> None:
    """Work off what comes through the pipe, until the parent is gone."""
    parents_end.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            # Workers that were forked later hold this pipe open too, when the parent has been killed.
            while not connection.poll(PARENT_CHECK_SECONDS):
                if os.getppid() != parent:
                    return
            step, slot = connection.recv()
            try:
                result = fill(step, slots[slot])
            except UserError as error:
                result = error
            except Exception:
                result = _Failure(traceback.format_exc())
            connection.send(result)


def shared_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that forked processes share. Anonymous memory: /dev/shm, often small in containers, has no say."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(*shape)
