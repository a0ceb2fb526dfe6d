"""Who this process is in its job, as launchers say it in the environment; and a launcher for one machine.

torchrun and srun start jobs of several machines. `launch` starts the processes of a job on this one, from within
any process: it forwards signals and waits for the checkpoint that follows, however long that takes; starts all of
them again when one is lost; and ends with the exit code that says why.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from diffussm.runtime.errors import ConfigError, Preempted, note

# Rank, number of processes and rank on this machine, as torchrun and as SLURM name them.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 5.0  # for the others to notice that one is lost, and to say so
PARTING_SECONDS = 120.0  # for the others to end when one has ended in good order, after the last that it waits for
POLL_SECONDS = 0.05
LASTING_SECONDS = 600.0  # a job that ran so long has got somewhere: its losses are counted anew
# A process that ends with one of these has said why, and would say it again (or was asked to stop).
FINAL_CODES = frozenset({ConfigError.exit_code, *range(64, 80)})
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Place:
    """This process among those of its job; the defaults are a process on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None  # host:port where the processes meet
    attempt: str | None = None  # how often the launcher has started its processes again; None: it does not


def find_place() -> Place:
    """What torchrun, srun or `launch` has set; MASTER_ADDR and MASTER_PORT make one job of srun's tasks."""
    for names in LAUNCHERS:
        wanted = (*names, "MASTER_ADDR", "MASTER_PORT")
        if all(name in os.environ for name in wanted):
            rank, world_size, local_rank, port = (_integer(name) for name in (*names, "MASTER_PORT"))
            address = f"{os.environ['MASTER_ADDR']}:{port}"
            # A launcher that starts its processes again keeps its store, with what the dead ones left in it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
            return Place(rank, world_size, local_rank, address, attempt)
    task = os.environ.get("SLURM_PROCID", "0")
    if task != "0":
        raise ConfigError(
            f"SLURM_PROCID={task}: a task of srun that cannot find the others: export MASTER_ADDR and "
            "MASTER_PORT, as scripts/slurm/train.sbatch does"
        )
    return Place()


def become(place: Place) -> None:
    """Set what torch.distributed reads when processes meet, whoever launched them."""
    if place.address is not None:
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))


def _integer(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ConfigError(f"{name}={value}: the launcher must set it to a number")
    return int(value)


def num_to_launch(wanted: int | None, key: str) -> int:
    """How many processes are to be started of the `wanted`; 0 if this one, or those of a launcher, do the work."""
    place = find_place()
    if wanted is None:
        return 0
    if place.address is None:
        return wanted if wanted > 1 else 0
    if wanted != place.world_size:
        raise ConfigError(f"{key}={wanted}: the launcher has started {place.world_size}: leave it at null")
    return 0


def launch(command: Sequence[str], num_processes: int, max_restarts: int = 0) -> int:
    """Run `command` in this many processes, and again when one is lost; returns the exit code of the job.

    SIGTERM, SIGUSR1 and SIGINT are handed on to all of them. None of them outlives this process.

    Args:
        max_restarts: how often in a row, unless the job has lasted for `LASTING_SECONDS` in between.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in FORWARDED}
    try:
        attempt = restarts = 0
        while True:
            started = time.monotonic()
            job = _Job(command, num_processes, attempt, received)
            code = job.wait()
            if received.count(code - 128) == 1:
                return Preempted.exit_code  # they had not begun: it ended them before they could ask what it was
            if code in (0, *FINAL_CODES) or received:
                return code
            if time.monotonic() - started > LASTING_SECONDS:
                restarts = 0
            if restarts == max_restarts:
                return code
            note(f"{job.loss}: starting all {num_processes} again")
            attempt, restarts = attempt + 1, restarts + 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """One attempt: all processes from their start to the end of the last."""

    def __init__(self, command: Sequence[str], num_processes: int, attempt: int, received: Sequence[int]) -> None:
        self.received = received
        self.loss = ""  # what became of the first that did not end well, for a person
        port = _free_port()
        self.processes: list[subprocess.Popen] = []
        try:
            for rank in range(num_processes):
                environment = _environment(rank, num_processes, port, attempt)
                self.processes.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))
        except BaseException:
            self.send(signal.SIGKILL)
            raise

    def wait(self) -> int:
        """Hand on signals until all have ended; returns what the first to fail ended with, or a reason given."""
        failure, deadline, forwarded = 0, math.inf, 0
        try:
            while None in [process.poll() for process in self.processes]:
                for number in self.received[forwarded:]:
                    forwarded += 1
                    self.send(number)
                if not failure:
                    failure = self._first_failure()
                    # A stop in good order takes the time that it takes. One that is lost leaves others waiting.
                    if failure not in (0, Preempted.exit_code):
                        deadline = time.monotonic() + GRACE_SECONDS
                    elif {0, Preempted.exit_code} & {process.returncode for process in self.processes}:
                        deadline = min(deadline, time.monotonic() + PARTING_SECONDS)
                if time.monotonic() > deadline:
                    self.send(signal.SIGKILL)
                time.sleep(POLL_SECONDS)
        finally:
            self.send(signal.SIGKILL)
        codes = [process.wait() for process in self.processes]
        told = [code for code in codes if code in FINAL_CODES]
        return told[0] if told else failure or self._first_failure()

    def _first_failure(self) -> int:
        """The exit code of a process that has failed, 128 + N after signal N; 0 if none has."""
        # Of several: first those that were killed, whom the others may have missed.
        failed = sorted(
            (process.returncode, rank) for rank, process in enumerate(self.processes) if process.returncode
        )
        if not failed:
            return 0
        code, rank = failed[0]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.loss = f"process {rank} of {len(self.processes)} is lost ({how})"
        return 128 - code if code < 0 else code

    def send(self, number: int) -> None:
        """A signal to all that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _environment(rank: int, world_size: int, port: int, attempt: int) -> Mapping[str, str]:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores // world_size))),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Leave the parent's process group, for it hands on signals; ask Linux for death when it ends in any way."""
    os.setpgrp()
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
