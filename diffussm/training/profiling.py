"""Where the time of a training step goes: a trace of a few steps by torch's profiler, and a table of its parts.

A GPU works behind the program that drives it. So the steps of the table are others than those of the trace: in
them every part waits for the device, which costs some speed and puts each part's work where it belongs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from diffussm.runtime.errors import StorageError
from diffussm.runtime.run_dir import write_atomically

WARM_UP_STEPS, TRACED_STEPS, TIMED_STEPS = 5, 3, 10
PARTS = (
    "data wait", "host to device", "latents", "draws", "forward", "backward", "loss reduction", "metrics",
    "clipping", "optimizer", "EMA", "logging",
)  # fmt: skip
# The collective operations of gradients, as the backends name them in a trace; they overlap the backward pass.
REDUCTIONS = ("gloo:all_reduce", "nccl:all_reduce", "ncclDevKernel_AllReduce", "nccl:_all_reduce")
NUM_OPERATORS = 12
_NOTHING: AbstractContextManager = contextlib.nullcontext()


class NoProfile:
    """What a trainer that is not profiled tells about its parts: nothing."""

    def span(self, name: str) -> AbstractContextManager:
        """Encloses the part of this name."""
        return _NOTHING

    def end_step(self, say: Callable[[str], None]) -> None:
        """Comes after every step."""

    def close(self, say: Callable[[str], None]) -> None:
        """Comes after the last."""


class Profile(NoProfile):
    """Writes trace.json and profile.md to a directory, once, after some steps; the steps after these run freely.

    Args:
        about: the first lines of the table's file.
    """

    def __init__(self, directory: Path, device: torch.device, about: Mapping[str, str]) -> None:
        self.directory, self.device, self.about = directory, device, about
        self.table = directory / "profile.md"
        self.is_over = self.table.exists()
        self.num_steps = 0
        self._trace: profile | None = None
        self._operators = ""
        self._times: dict[str, float] = {}  # of this step's parts
        self._totals: dict[str, float] = {}  # of all timed steps
        self._num_timed = 0
        self._started = 0.0

    def span(self, name: str) -> AbstractContextManager:
        """Part of the trace, or of the table."""
        if self.is_over or self.num_steps < WARM_UP_STEPS:
            return _NOTHING
        return record_function(name) if self._trace is not None else self._time(name)

    def end_step(self, say: Callable[[str], None]) -> None:
        """Go on to what is to be done with the next step; what cannot be written is said."""
        if self.is_over:
            return
        self.num_steps += 1
        try:
            if self.num_steps == WARM_UP_STEPS:
                self._trace = profile(activities=_activities(self.device))
                self._trace.start()
            elif self._trace is not None:
                if self.num_steps == WARM_UP_STEPS + TRACED_STEPS:
                    self._end_trace()
                    self._start_step()
            elif self.num_steps > WARM_UP_STEPS:
                self._end_step()
                if self._num_timed == TIMED_STEPS:
                    self._write(say)
        except (OSError, RuntimeError, StorageError) as error:
            self.is_over = True
            say(f"profiling ended: {str(error).splitlines()[0]}")

    def close(self, say: Callable[[str], None]) -> None:
        """Write what there is, if the run ends before all of it is there."""
        if self.is_over:
            return
        self.is_over = True
        if self._trace is not None:
            self._trace.stop()
        if self._num_timed:
            self._write(say)
        else:
            needed = WARM_UP_STEPS + TRACED_STEPS + 1
            say(f"no profile: the run has ended after {self.num_steps} steps, and it takes {needed}")

    @contextlib.contextmanager
    def _time(self, name: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start_step(self) -> None:
        self._wait()
        self._times = {}
        self._started = time.perf_counter()

    def _end_step(self) -> None:
        """Count the step, unless it did what few steps do, such as saving."""
        self._wait()
        if self._times.keys() <= set(PARTS):
            self._times["other"] = time.perf_counter() - self._started - sum(self._times.values())
            for name, seconds in self._times.items():
                self._totals[name] = self._totals.get(name, 0.0) + seconds
            self._num_timed += 1
        self._start_step()

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        self._wait()
        trace.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.directory / "trace.json"))
        averages = [event for event in trace.key_averages() if event.key not in PARTS]
        attribute = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        averages.sort(key=lambda event: -getattr(event, attribute))
        reductions = sum(
            max(event.cpu_time_total, event.device_time_total)
            for event in averages
            if event.key.startswith(REDUCTIONS)
        )
        rows = [
            f"| {event.key[:60].replace('|', '/')} | {event.count / TRACED_STEPS:,.0f} | "
            f"{getattr(event, attribute) / 1e3 / TRACED_STEPS:,.2f} |"
            for event in averages[:NUM_OPERATORS]
        ]
        self._operators = "\n".join(["| operator | calls | own ms |", "| --- | ---: | ---: |", *rows])
        if reductions:
            per_step = reductions / 1e3 / TRACED_STEPS
            self._operators = (
                f"Reductions over the processes: {per_step:,.2f} ms of a step, most of them during backward.\n\n"
                + self._operators
            )

    def _write(self, say: Callable[[str], None]) -> None:
        self.is_over = True
        total = sum(self._totals.values())
        parts = {name: self._totals[name] for name in (*PARTS, "other") if name in self._totals}
        rows = [
            f"| {name} | {1e3 * seconds / self._num_timed:,.2f} | {100 * seconds / total:.1f} |"
            for name, seconds in {**parts, "a step": total}.items()
        ]
        lines = [
            "# Where the time of a training step goes",
            "",
            *(f"- {key}: {value}" for key, value in self.about.items()),
            f"- mean of {self._num_timed} steps in the first process, which waits for its device after every part",
            "",
            "| part | ms | % |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            f"The most expensive operators of a step, from the {TRACED_STEPS} steps of `trace.json` "
            "(open it at ui.perfetto.dev):",
            "",
            self._operators,
            "",
        ]
        write_atomically(self.table, "\n".join(lines).encode())
        say(f"profile: {self.table}")


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
