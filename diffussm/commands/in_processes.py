"""One command on any number of processes, which stops when it is asked to and continues when it is run again."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from diffussm.build import choose_device
from diffussm.compose import override_value
from diffussm.runtime.distributed import Interrupted, Processes, Undertaking
from diffussm.runtime.errors import ConfigError, Preempted, UserError
from diffussm.runtime.launch import launch, num_to_launch
from diffussm.runtime.signals import StopRequest
from diffussm.runtime.work_list import Tell, WorkList
from diffussm.training.logging import Progress

MAX_RESTARTS = 3  # when a process is lost
FAILED = 1  # what a command found did not pass
FAILED_TOGETHER = 79  # the same, of one of several: to the launcher, an exit code of 1 is a process that was lost


@dataclass(frozen=True)
class Job:
    """This process among those that do a command together."""

    processes: Processes
    device: torch.device
    stop: Callable[[], object]

    @classmethod
    def alone(cls, device: str) -> "Job":
        """This process by itself, which signals end as they usually do."""
        return cls(Processes(), choose_device(device), lambda: False)

    @contextmanager
    def undertake(self, work: WorkList) -> Iterator[tuple[Undertaking, Tell]]:
        """Something long that a signal ends with exit code 75, and what shows how many images of it are done."""
        undertaking = self.processes.undertake(self.stop)
        before = work.count - sum(len(work.indices(number)) for number in work.missing())
        progress = Progress(work.count, before, "img", is_shown=self.processes.is_first)
        try:
            yield undertaking, lambda done: progress.advance(before + done - progress.done)
        except Interrupted:
            finished = len(work) - len(work.missing())
            raise self.processes.told_by_first(
                Preempted(f"stopped by signal with {finished:,} of {len(work):,} ranges finished: run it again")
            ) from None
        finally:
            progress.close()


def in_processes(options: argparse.Namespace, command: Callable[[Job], int]) -> int:
    """Run a command in this process, with others that a launcher has started, or in num_processes new ones."""
    wanted = override_value(options.overrides, "num_processes")
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise ConfigError(f"num_processes={wanted}: must be at least 1, or null")
    if count := num_to_launch(wanted, "num_processes"):
        again = [sys.executable, "-m", "diffussm", options.verb, *options.overrides]
        if options.config_dir:
            again += ["--config-dir", str(options.config_dir)]
        code = launch(again, count, MAX_RESTARTS)
        return FAILED if code == FAILED_TOGETHER else code
    processes = Processes.from_environment()
    try:
        device = choose_device(str(override_value(options.overrides, "device") or "auto"))
    except UserError as error:
        raise processes.told_by_first(error) from error
    device = processes.own_device(device)
    with StopRequest() as stop, processes.start(device):
        code = command(Job(processes, device, lambda: stop))
    return FAILED_TOGETHER if code == FAILED and processes.world_size > 1 else code
