"""A run of the benchmark as JSON and as Markdown: comparisons with their goals, measurements, the machine."""

import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffussm.bench.scaling import Cost
from diffussm.bench.suites import COMPARISONS, Comparison
from diffussm.bench.timing import Timing, cost_exponent
from diffussm.bench.workload import Measurement, Setup, Skip
from diffussm.runtime.run_dir import write_atomically, write_json

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, as published
EXPONENT_FROM = 1024  # tokens; below, fixed costs decide
ONE_SETTING = ("data", "evaluation")  # suites whose goals always apply
COMPARISON_COLUMNS = ("suite", "phase", "tokens", "compared", "measured", "goal", "")
MEASUREMENT_COLUMNS = (
    "suite", "phase", "tokens", "subject", "parameters", "median ms", "spread", "times", "peak MiB", "images/s",
    "GFLOP/s",
)  # fmt: skip
COST_COLUMNS = (
    "model", "px", "tokens", "parameters", "GMAC", "of it attention", "SSM GFLOP", "scores of a layer", "ms",
    "spread", "peak MiB", "measured",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A comparison carried out at one length (None: over several), with its goal if it has one."""

    comparison: Comparison
    length: int | None
    value: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.comparison.quantity == "exponent" else self.value >= self.goal


class Report:
    """What was measured so far, written anew by `save`."""

    def __init__(self, out: Path, command: str, setup: Setup) -> None:
        self.out, self.command, self.setup = out, command, setup
        self.measurements: list[Measurement] = []
        self.skips: list[Skip] = []
        self.costs: list[Cost] = []
        self.is_complete = False
        self.date = time.strftime("%Y-%m-%d %H:%M %z")

    def add(self, result: Measurement | Skip | Cost) -> None:
        """Take in a result."""
        if isinstance(result, Cost):
            self.costs.append(result)
        elif isinstance(result, Skip):
            self.skips.append(result)
        else:
            self.measurements.append(result)

    def save(self) -> None:
        """Write bench.json and bench.md."""
        write_json(self.out / "bench.json", self.document())
        write_atomically(self.out / "bench.md", self.markdown().encode())

    def verdicts(self) -> list[Verdict]:
        """Every comparison whose subjects were measured together."""
        return list(compare(self.measurements, self.setup))

    def document(self) -> dict[str, Any]:
        """Everything, as JSON; times in seconds, memory in bytes."""
        setup = {**dataclasses.asdict(self.setup), "device": str(self.setup.device)}
        return {
            "command": self.command,
            "date": self.date,
            "complete": self.is_complete,
            "machine": describe_machine(self.setup.device),
            "setup": setup,
            "comparisons": [_verdict_record(verdict) for verdict in self.verdicts()],
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
            "measurements": [dataclasses.asdict(measurement) for measurement in self.measurements],
            "skipped": [dataclasses.asdict(skip) for skip in self.skips],
        }

    def _sizes(self) -> str:
        setup = self.setup
        sizes = f"B={setup.batch_size}, D={setup.hidden_size}, N={setup.d_state}, {setup.precision}"
        compiled = ", compiled" if setup.compile else ""
        return f"{sizes}{compiled}, training steps without optimiser (but for the suite trainer)"

    def _scaling(self) -> str:
        """Costs on paper with what was measured of them."""
        found = {(m.subject, m.length): m for m in self.measurements if m.suite == "scaling"}
        rows = [_cost_cells(cost, found.get((cost.subject, cost.tokens))) for cost in self.costs]
        return (
            "A forward pass of one image, latents an eighth of it a side. GMAC: dense layers and attention. "
            "Scores of a layer: the memory of its attention matrices, where a kernel stores them. Where some "
            "blocks were measured, the time of all is extrapolated from models of that many and of one; memory "
            "is beside the weights.\n\n" + table(COST_COLUMNS, rows)
        )

    def markdown(self) -> str:
        """The tables and what was left out."""
        setup, machine = self.setup, describe_machine(self.setup.device)
        verdicts = self.verdicts()
        allocator = "as `diffussm train` sets it" if setup.keep_freed_memory else "as it comes"
        parts = [
            "# Benchmark" + ("" if self.is_complete else " (stopped before its end)"),
            f"`{self.command}`, {self.date}. "
            + ", ".join(f"{key} {value}" for key, value in machine.items())
            + ".",
            (f"{self._sizes()}, " if any(m.suite not in ("data", "scaling") for m in self.measurements) else "")
            + f"allocator {allocator}. Medians of alternating repetitions in one process. Only ratios carry over "
            "to another machine" + ("; goals are stated for other settings." if _lacks_goals(verdicts) else "."),
            table(
                COMPARISON_COLUMNS,
                [_verdict_cells(verdict) for verdict in verdicts],
            ),
        ]
        if others := [m for m in self.measurements if m.suite != "scaling"]:
            parts.append(table(MEASUREMENT_COLUMNS, [_measurement_cells(measurement) for measurement in others]))
        if self.costs:
            parts.append(self._scaling())
        if self.skips:
            lines = [
                f"- {skip.suite}, {skip.phase}, {skip.length:,} tokens, {skip.subject}: {skip.reason}"
                for skip in self.skips
            ]
            parts.append("Not measured:\n\n" + "\n".join(lines))
        return "\n\n".join(parts) + "\n"


def compare(measurements: Sequence[Measurement], setup: Setup) -> Iterator[Verdict]:
    """Carry out COMPARISONS wherever their subjects were measured; goals apply to their own setting only."""
    found = {(m.suite, m.phase, m.subject, m.length): m for m in measurements}
    lengths = sorted({m.length for m in measurements})
    for comparison in COMPARISONS:
        on_gpu = comparison.suite == "xl" and setup.precision == "bf16"
        applies = on_gpu or setup.is_reference or comparison.suite in ONE_SETTING
        goals = comparison.goals if comparison.goals and applies else {}
        key = comparison.suite, comparison.phase
        ours = [m for n in lengths if (m := found.get((*key, comparison.subject, n)))]
        if comparison.quantity == "exponent":
            long = [m for m in ours if m.length >= EXPONENT_FROM]
            if len(long) > 1:
                exponent = cost_exponent([m.length for m in long], [m.timing.seconds for m in long])
                yield Verdict(comparison, None, exponent, goals.get(0))
            continue
        for subject in ours:
            value = _value(comparison, subject, found.get((*key, comparison.against, subject.length)), setup)
            if value is not None:
                yield Verdict(comparison, subject.length, value, goals.get(subject.length))


def _value(
    comparison: Comparison, subject: Measurement, against: Measurement | None, setup: Setup
) -> float | None:
    peak = peak_flops(setup) if comparison.quantity == "dense rate" and not comparison.against else None
    if peak is not None:
        return _rate(subject) / peak
    if comparison.quantity == "throughput":
        return subject.items / subject.timing.seconds
    if against is None:
        return None
    if comparison.quantity == "dense rate":
        return _rate(subject) / _rate(against)
    if comparison.quantity == "time":
        return against.timing.seconds / subject.timing.seconds
    return against.peak_bytes / max(subject.peak_bytes, 1)


def peak_flops(setup: Setup) -> float | None:
    """The GPU's published dense bf16 rate, None where it is not known or not in use."""
    if setup.device.type != "cuda" or setup.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(setup.device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def describe_machine(device: torch.device) -> dict[str, str]:
    """Processor, cores, threads, GPU, torch and Python, for people who compare."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    return machine | ({"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(measurement: Measurement) -> float:
    return measurement.flops / measurement.timing.seconds


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    record = dataclasses.asdict(verdict.comparison)
    del record["goals"]
    return {**record, "length": verdict.length, "value": verdict.value, "goal": verdict.goal, "met": verdict.met}


def _verdict_cells(verdict: Verdict) -> tuple[str, ...]:
    comparison, quantity = verdict.comparison, verdict.comparison.quantity
    compared = {
        "time": f"{comparison.against} / {comparison.subject}, time",
        "memory": f"{comparison.against} / {comparison.subject}, peak memory",
        "dense rate": f"{comparison.subject}, share of {comparison.against or 'the peak'}'s FLOP/s",
        "exponent": f"{comparison.subject}, exponent of time in length",
        "throughput": comparison.subject,
    }[quantity]

    def show(value: float) -> str:
        if quantity == "dense rate":
            return f"{value:.0%}"
        if quantity == "throughput":
            return f"{value:,.0f}/s"
        return f"{value:.2f}" if quantity == "exponent" else f"{value:.3g}x"

    sign = "<=" if quantity == "exponent" else ">="
    return (
        comparison.suite,
        comparison.phase,
        "all" if verdict.length is None else f"{verdict.length:,}",
        compared,
        show(verdict.value),
        "" if verdict.goal is None else f"{sign} {show(verdict.goal)}",
        {None: "", True: "met", False: "missed"}[verdict.met],
    )


def _cost_cells(cost: Cost, measurement: Measurement | None) -> tuple[str, ...]:
    measured = ("", "", "", "no")
    if measurement is not None:
        extent = f"{measurement.blocks} blocks" if measurement.blocks else "whole"
        timing, mib = measurement.timing, measurement.peak_bytes / 2**20
        measured = (f"{1e3 * timing.seconds:,.0f}", _spread(timing), f"{mib:,.0f}", extent)
    return (
        cost.subject,
        str(cost.pixels),
        f"{cost.tokens:,}",
        f"{cost.parameters:,}",
        f"{cost.macs / 1e9:,.1f}",
        f"{cost.attention_macs / cost.macs:.0%}" if cost.attention_macs else "",
        f"{cost.ssm_flops / 1e9:,.1f}" if cost.ssm_flops else "",
        _size(cost.score_bytes) if cost.score_bytes else "",
        *measured,
    )


def _lacks_goals(verdicts: Sequence[Verdict]) -> bool:
    """Whether something was compared that has goals, and none of them applies."""
    have = any(verdict.comparison.goals for verdict in verdicts)
    return have and not any(verdict.goal for verdict in verdicts)


def _spread(timing: Timing) -> str:
    return f"{timing.spread / timing.seconds:.0%}" if timing.repetitions > 1 else "-"


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _measurement_cells(measurement: Measurement) -> tuple[str, ...]:
    timing = measurement.timing
    has_rate = any(c.quantity == "dense rate" and c.suite == measurement.suite for c in COMPARISONS)
    return (
        measurement.suite,
        measurement.phase,
        f"{measurement.length:,}",
        measurement.subject,
        "" if measurement.items else f"{measurement.parameters:,}",
        f"{1e3 * timing.seconds:,.2f}",
        _spread(timing),
        str(timing.repetitions),
        "" if measurement.items else f"{measurement.peak_bytes / 2**20:,.1f}",
        f"{measurement.items / timing.seconds:,.0f}" if measurement.items else "",
        f"{_rate(measurement) / 1e9:,.1f}" if has_rate else "",
    )
