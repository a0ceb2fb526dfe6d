"""The processes of one job: who this one is among them, and how they come to agree.

torchrun and srun say it in the environment. What the processes tell each other here
goes through the store that they meet at: it needs no device, and waiting for others has no time limit. With one
process everything is there and nothing is waited for.
"""

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from diffussm.runtime.errors import ConfigError

# Rank, number of processes and rank on this machine, as torchrun and as SLURM name them.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
MEETING_SECONDS = 300
POLL_SECONDS = 0.1


class Processes:
    """This process among those of its job; a context manager that `start` prepares.

    Args:
        rank: 0 .. world_size - 1.
        local_rank: the rank among those on this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._store: dist.Store = dist.HashStore()
        self._agreements = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """What torchrun or srun has set. Under srun, MASTER_ADDR and MASTER_PORT make one job of the tasks."""
        for names in LAUNCHERS:
            wanted = (*names, "MASTER_ADDR", "MASTER_PORT")
            if all(name in os.environ for name in wanted):
                numbers = [_integer(name) for name in (*names, "MASTER_PORT")]
                return cls(*numbers[:3])
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and writes for all."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """`cuda` without a number is the GPU of this process."""
        if device.type != "cuda" or device.index is not None or self.world_size == 1:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def start(self, device: torch.device) -> "Processes":
        """Meet the others and make torch.distributed ready: nccl for a GPU, gloo otherwise.

        ConfigError if they do not come.
        """
        if self.world_size == 1:
            return self
        try:
            store, *_ = next(
                dist.rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=MEETING_SECONDS))
            )
            # A launcher that restarts its processes keeps its store, with what the dead ones left in it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"diffussm/attempt_{attempt}", store)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
            )
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"process {self.rank} of {self.world_size} does not reach the others at {place} "
                f"({str(error).splitlines()[0]}): start all of them, or set MASTER_ADDR and MASTER_PORT right"
            ) from error
        return self

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter that all processes share; returns the sum."""
        return self._store.add(counter, amount)

    def barrier(self, poll: Callable[[], object] = lambda: None) -> None:
        """Wait until every process is here, however long; meanwhile `poll`, which may raise, is called."""
        self._agreements += 1
        name = f"barrier {self._agreements}"
        self.add(name, 1)
        while self.add(name, 0) < self.world_size:
            poll()
            time.sleep(POLL_SECONDS)

    def broadcast_object(self, value: Any, poll: Callable[[], object] = lambda: None) -> Any:
        """The first process's `value`, in every process; `poll` as in `barrier`."""
        self._agreements += 1
        name = f"broadcast {self._agreements}"
        if self.is_first:
            self._store.set(name, pickle.dumps(value).hex())
            return value
        while not self._store.check([name]):
            poll()
            time.sleep(POLL_SECONDS)
        return pickle.loads(bytes.fromhex(self._store.get(name).decode()))

    def close(self) -> None:
        """Part from the others; the first, which may hold the store, goes last."""
        if self.world_size == 1:
            return
        if self.add("closed", 1) < self.world_size and self.is_first:
            while self.add("closed", 0) < self.world_size:
                time.sleep(POLL_SECONDS)
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # after an error nobody can be waited for: the launcher ends the others
            self.close()


def _integer(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ConfigError(f"{name}={value}: the launcher must set it to a number")
    return int(value)
