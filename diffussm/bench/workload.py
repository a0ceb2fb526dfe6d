"""From subjects to measurements: what a forward pass and a training step are, and how a group is measured."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffussm.bench.memory import measured_peak, predicted_peak
from diffussm.bench.timing import Timing, alternate
from diffussm.models.complexity import Complexity, measure_module

Phase = Literal["forward", "training step", "loading", "features", "distance"]
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """How everything in one run is measured.

    lengths: tokens, squares of even numbers. repetitions, seconds: at most, of every case. A case is skipped
    when it is predicted to hold more than `memory_limit_gib`, or to take more than `call_limit_seconds`.
    """

    lengths: tuple[int, ...]
    batch_size: int
    hidden_size: int
    d_state: int
    depth: int
    repetitions: int
    seconds: float
    call_limit_seconds: float
    memory_limit_gib: float
    device: torch.device
    precision: str
    compile: bool
    keep_freed_memory: bool = False
    resolutions: tuple[int, ...] = (256, 512, 1024, 2048)  # of images, in pixels; of the suite scaling

    @property
    def is_reference(self) -> bool:
        """Whether the goals, stated for one setting, apply."""
        sizes = (self.batch_size, self.hidden_size, self.d_state, self.depth)
        return self.device.type == "cpu" and self.precision == "fp32" and sizes == (4, 384, 64, 13)


@dataclass(frozen=True)
class Subject:
    """Something to measure: `build(device)` makes a module and its inputs."""

    name: str
    build: Callable[[torch.device], tuple[nn.Module, Sequence[Tensor]]]


@dataclass(frozen=True)
class Measurement:
    """One subject in one phase. `flops` are those of dense layers and attention, `items` images, in one call.

    blocks: that were measured, where the rest of a model is extrapolated; 0: all.
    """

    suite: str
    phase: Phase
    subject: str
    length: int
    timing: Timing
    peak_bytes: int
    parameters: int
    flops: int
    items: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Skip:
    """A case that was not measured, and why."""

    suite: str
    phase: Phase
    subject: str
    length: int
    reason: str


class Workload:
    """A module with inputs, and the calls that are timed."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], setup: Setup) -> None:
        self.module, self.inputs, self.setup = module, inputs, setup
        is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
        # A compiled layer keeps no spectra, which is what frozen subjects are there to show.
        self.call = torch.compile(module) if setup.compile and not is_frozen else module
        self._grad: Tensor | None = None
        with torch.no_grad():
            # Gates that begin at zero would make gradients zero, and zeros are cheap on some hardware.
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)

    def run(self, phase: Phase) -> None:
        """One call of the phase, finished when it returns."""
        if phase == "forward":
            with torch.no_grad(), self._autocast():
                self.call(*self.inputs)
        else:
            self._training_step()
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize(self.setup.device)

    def _training_step(self) -> None:
        """Forward and backward, to the parameters and to inputs that want it; no optimiser."""
        with self._autocast():
            y = self.call(*self.inputs)
        if not y.requires_grad:  # the matrix product, which sets the scale of a group
            return
        if self._grad is None:
            self._grad = torch.randn_like(y)
        y.backward(self._grad)
        for tensor in (*self.module.parameters(), *self.inputs):
            tensor.grad = None

    def _autocast(self) -> contextlib.AbstractContextManager:
        is_bf16 = self.setup.precision == "bf16"
        return torch.autocast(self.setup.device.type, dtype=torch.bfloat16, enabled=is_bf16)


def measure_group(
    suite: str, phase: Phase, length: int, subjects: Sequence[Subject], setup: Setup
) -> Iterator[Measurement | Skip]:
    """Measure the subjects in turns; one that would not fit into memory is skipped."""
    workloads: dict[str, Workload] = {}
    peaks: dict[str, int] = {}
    costs: dict[str, Complexity] = {}
    for subject in subjects:
        need = predicted_peak(partial(_fake_call, subject, setup, phase)) / GIB
        if need > setup.memory_limit_gib:
            reason = f"would need {need:.1f} GiB, memory_limit_gib={setup.memory_limit_gib:g}"
            yield Skip(suite, phase, subject.name, length, reason)
            continue
        workload = Workload(*subject.build(setup.device), setup)
        costs[subject.name] = measure_module(workload.module, *workload.inputs)
        peaks[subject.name] = warm_peak(workload, phase)
        workloads[subject.name] = workload
    calls = {name: partial(workload.run, phase) for name, workload in workloads.items()}
    if not calls:
        return
    for name, timing in alternate(calls, setup.repetitions, setup.seconds).items():
        flops = costs[name].flops * (3 if phase == "training step" and costs[name].parameters else 1)
        yield Measurement(suite, phase, name, length, timing, peaks[name], costs[name].parameters, flops)


def _fake_call(subject: Subject, setup: Setup, phase: Phase) -> Callable[[], None]:
    """The call on fake tensors of the CPU, in fp32: an upper bound for what other settings hold."""
    fake = replace(setup, device=torch.device("cpu"), precision="fp32", compile=False)
    workload = Workload(*subject.build(fake.device), fake)
    workload.module.requires_grad_(True)  # frozen layers keep spectra by address, which fake tensors do not have
    return lambda: workload.run(phase)


def warm_peak(workload: Workload, phase: Phase) -> int:
    """Peak memory of the second call; of the first, where that was slow enough to be warm-up and measurement."""
    start = time.perf_counter()
    peak = measured_peak(lambda: workload.run(phase), workload.setup.device)
    if time.perf_counter() - start < workload.setup.seconds or workload.setup.compile:
        peak = measured_peak(lambda: workload.run(phase), workload.setup.device)
    return peak
