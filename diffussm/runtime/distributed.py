"""The processes of one job: who this one is among them, and how they come to agree.

What they tell each other about the run goes through the store that they meet at, which needs no device: a process
that waits there can do other things meanwhile, and sees when another has failed. Tensors go through
torch.distributed. With one process everything is there and nothing is waited for.
"""

import contextlib
import math
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.runtime.errors import ConfigError, PeerError, Preempted, UserError, note
from diffussm.runtime.launch import Place, become, find_place

MEETING_SECONDS = 300
LONGEST_POLL_SECONDS = 0.1
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

T = TypeVar("T")


class Processes:
    """This process among those of its job; a context manager that `start` prepares.

    Args:
        place: rank, number of processes, and where they meet.
        timeout_seconds: what no process is waited for longer than; None: as long as it takes.
    """

    def __init__(self, place: Place = Place(), timeout_seconds: float | None = None) -> None:  # noqa: B008
        self.place, self.timeout_seconds = place, timeout_seconds
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self._store: dist.Store = dist.HashStore()
        self._agreements = 0

    @classmethod
    def from_environment(cls, timeout_seconds: float | None = None) -> "Processes":
        """What a launcher has set."""
        return cls(find_place(), timeout_seconds)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and writes for all."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """`cuda` without a number is the GPU of this process."""
        if device.type != "cuda" or device.index is not None or self.world_size == 1:
            return device
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ConfigError(
                f"process {self.local_rank} of this machine has no GPU, there are {count}: start no more"
            )
        return torch.device("cuda", self.local_rank)

    def share(self, count: int) -> range:
        """This process's part of `count` things, in the order of ranks; sizes differ by at most one."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def start(self, device: torch.device) -> "Processes":
        """Meet the others and make torch.distributed ready: nccl for a GPU, gloo for a CPU.

        ConfigError if they do not come, PeerError where the launcher can start them again.
        """
        if self.world_size == 1:
            return self
        become(self.place)
        try:
            store, *_ = next(
                dist.rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=MEETING_SECONDS))
            )
            store = dist.PrefixStore(f"diffussm/attempt_{self.place.attempt or 0}", store)
            self._store = store if self.timeout_seconds is None else _TimedStore(store, self)  # type: ignore[assignment]
            if device.type == "cuda":
                torch.cuda.set_device(device)
            limit = None if self.timeout_seconds is None else timedelta(seconds=self.timeout_seconds)
            dist.init_process_group(
                BACKENDS[device.type],
                store=dist.PrefixStore("group", store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=limit,
            )
        except (dist.DistError, RuntimeError) as error:
            if self.place.attempt is not None:  # whoever set the address right starts them again
                raise self._lost(str(error).splitlines()[0]) from error
            raise ConfigError(
                f"process {self.rank} of {self.world_size} does not reach the others at {self.place.address} "
                f"({str(error).splitlines()[0]}): start all of them, or set MASTER_ADDR and MASTER_PORT right"
            ) from error
        return self

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter that all processes share; returns the sum."""
        return self._store.add(counter, amount)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in each of them; in place."""
        if self.world_size > 1:
            with self.noticing_losses():
                dist.all_reduce(tensor)
        return tensor

    def barrier(self, poll: Callable[[], object] = lambda: None) -> None:
        """Wait until every process is here; meanwhile `poll`, which may raise, is called."""
        name = self._next_name()
        self.add(name, 1)
        self._wait(lambda: self.add(name, 0) >= self.world_size, poll)

    def broadcast_object(self, value: Any, poll: Callable[[], object] = lambda: None) -> Any:
        """The first process's `value`, in every process; `poll` as in `barrier`."""
        name = self._next_name()
        if self.is_first:
            self._store.set(name, pickle.dumps(value).hex())
            return value
        self._wait(lambda: self._store.check([name]), poll)
        return pickle.loads(bytes.fromhex(self._store.get(name).decode()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """The first process's CPU tensors and their names, in every process, one after the other."""
        if self.world_size == 1:
            yield from (tensors or {}).items()
            return
        described = {name: (tuple(t.shape), t.dtype) for name, t in (tensors or {}).items()}
        for name, (shape, dtype) in self.broadcast_object(described).items():
            tensor = tensors[name].contiguous() if tensors is not None else torch.empty(shape, dtype=dtype)
            with self.noticing_losses():
                dist.broadcast(tensor, 0)
            yield name, tensor

    def gather_objects(self, value: T) -> list[T]:
        """The values of all processes by rank, in the first process; elsewhere this process's alone."""
        name = self._next_name()
        self._store.set(f"{name} of {self.rank}", pickle.dumps(value).hex())
        if not self.is_first:
            return [value]
        names = [f"{name} of {rank}" for rank in range(self.world_size)]
        self._wait(lambda: self._store.check(names), lambda: None)
        return [pickle.loads(bytes.fromhex(self._store.get(each).decode())) for each in names]

    def told_by_first(self, error: UserError) -> UserError:
        """An error that all processes meet at the same time, to be reported by one."""
        error.is_reported = not self.is_first
        return error

    def on_first(self, work: Callable[[], T], poll: Callable[[], object] = lambda: None) -> T:
        """What `work` returns in the first process, in every process; a UserError there ends them all."""
        outcome: T | UserError | None = None
        if self.is_first:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.broadcast_object(outcome, poll)
        if isinstance(outcome, UserError):
            raise self.told_by_first(outcome)
        return outcome

    def on_all(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once all have done it; the first UserError of any of them ends them all."""
        mine: T | None = None
        failure: UserError | None = None
        try:
            mine = work()
        except UserError as error:
            failure = error
        found = self.gather_objects(failure)
        failure = self.broadcast_object(next((error for error in found if error is not None), None))
        if failure is not None:
            raise self.told_by_first(failure)
        return mine  # type: ignore[return-value]

    @contextlib.contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """What torch.distributed raises when other processes are gone or late becomes a PeerError."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
                raise
            raise self._lost(re.sub(r"\[[^]]*\] ?", "", text.strip().splitlines()[0]).split(".")[0]) from error

    def undertake(self, stop: Callable[[], object] = lambda: False) -> "Undertaking":
        """Begin something long that all processes do; `stop` becomes true when this one has been asked to stop."""
        return Undertaking(self, self._next_name(), stop)

    def close(self) -> None:
        """Part from the others; the first, which may hold the store, goes last."""
        if self.world_size == 1:
            return
        if self.add("closed", 1) < self.world_size and self.is_first:
            with contextlib.suppress(PeerError):  # the work is done, whatever became of them
                self._wait(lambda: self.add("closed", 0) >= self.world_size, lambda: None)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _next_name(self) -> str:
        self._agreements += 1
        return f"agreement {self._agreements}"

    def _wait(self, is_there: Callable[[], bool], poll: Callable[[], object]) -> None:
        started, pause = time.monotonic(), 0.001
        while True:
            with self.noticing_losses():
                if is_there():
                    return
            poll()
            if self.timeout_seconds is not None and time.monotonic() - started > self.timeout_seconds:
                raise self._lost(f"no answer for {self.timeout_seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def _lost(self, how: str) -> PeerError:
        return PeerError(
            f"process {self.rank} of {self.world_size}: another process of this job has ended or stalled ({how}): "
            "the same command continues from the newest checkpoint"
        )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All stop together. After an error nobody can be waited for: the launcher ends the others.
        if kind is None or issubclass(kind, Preempted):
            self.close()


class _TimedStore:
    """A store with which this process ends where a call does not return in time.

    A process that hosts the store and stalls leaves the others in a call that no error and no signal ends.
    """

    def __init__(self, store: dist.Store, processes: Processes) -> None:
        assert processes.timeout_seconds is not None
        self._store, self._processes, self._seconds = store, processes, processes.timeout_seconds
        self._due = math.inf
        threading.Thread(target=self._watch, daemon=True).start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self._due = time.monotonic() + self._seconds
            try:
                return method(*arguments)
            finally:
                self._due = math.inf

        return call

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 4))
            if time.monotonic() > self._due:
                note(str(self._processes._lost(f"no answer for {self._seconds:g} s")))
                os._exit(PeerError.exit_code)


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """An undertaking that was given up, by all processes."""


class Undertaking:
    """Something long that all processes do, and that all give up if one is asked to stop before all have done it.

    The first process decides which of both it was. There is no time limit: their work may differ in size.
    """

    def __init__(self, processes: Processes, name: str, stop: Callable[[], object]) -> None:
        self.processes, self.name, self.stop = processes, name, stop
        self._is_done = processes.world_size == 1

    def check(self) -> None:
        """To be called now and then during the work; raises Interrupted if it is given up."""
        if self.processes.world_size == 1:
            if self.stop():
                raise Interrupted
            return
        with self.processes.noticing_losses():
            self._exchange()

    def finish(self) -> None:
        """Say that this process has done its part, and wait for the others; raises Interrupted like `check`."""
        if self._is_done:
            return
        self.processes.add(f"{self.name} done", 1)
        while not self._is_done:
            with self.processes.noticing_losses():
                self._is_done = self._exchange()
            time.sleep(LONGEST_POLL_SECONDS / 10)

    def _exchange(self) -> bool:
        """Whether all have done it; raises Interrupted if not all will."""
        count = self.processes.add
        if self.stop():
            count(f"{self.name} stop", 1)
        if self.processes.is_first and not count(f"{self.name} verdict", 0):
            if count(f"{self.name} done", 0) == self.processes.world_size:
                count(f"{self.name} verdict", 1)
            elif count(f"{self.name} stop", 0):
                count(f"{self.name} verdict", 2)
        verdict = count(f"{self.name} verdict", 0)
        if verdict == 2:
            raise Interrupted
        return verdict == 1
