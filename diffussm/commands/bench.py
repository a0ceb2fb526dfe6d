"""`diffussm bench`: speed and memory against baselines, as a table with goals."""

import argparse
import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffussm.bench.report import Report
from diffussm.bench.scaling import Cost
from diffussm.bench.suites import run_suites
from diffussm.bench.workload import GIB, Setup, Skip
from diffussm.build import choose_device
from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.config import BENCH_SUITES
from diffussm.report.curves import Panel, save_curves
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, RunDirectoryError

CPU_MEMORY_LIMIT_GIB = 12.0
GPU_MEMORY_SHARE = 0.9
PICTURE = "scaling.png"


def run(options: argparse.Namespace) -> int:
    """Measure suite by suite, saving after every result; what was measured survives Ctrl-C."""
    config = compose("bench", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    if config.keep_freed_memory:
        keep_freed_memory()
    setup = _setup(config)
    left_out = {"scaling"} if setup.device.type == "cuda" else {"scaling", "xl"}  # unless asked for
    suites = config.suites or [name for name in BENCH_SUITES if name not in left_out]
    if "xl" in suites and setup.device.type != "cuda":
        raise ConfigError("suites=[xl]: its models are for a GPU: add device=cuda")
    out = Path(config.out)
    for path in (out / "bench.json", out / "bench.md", out / PICTURE):
        if path.exists():
            raise RunDirectoryError(
                f"out={out}: {path.name} is there already: move it away, or choose another out"
            )
    report = Report(out, shlex.join(["diffussm", "bench", *options.overrides]), setup)
    report.save()  # fails now rather than after an hour
    try:
        for result in run_suites(suites, setup, note):
            report.add(result)
            report.save()
            if isinstance(result, Cost):
                continue
            if isinstance(result, Skip):
                note(f"    {result.subject}: skipped: {result.reason}")
            else:
                timing, mib = result.timing, result.peak_bytes / 2**20
                beside = f"{result.items / timing.seconds:,.0f} images/s" if result.items else f"{mib:,.0f} MiB"
                note(f"    {result.subject}: {1e3 * timing.seconds:,.2f} ms x {timing.repetitions}, {beside}")
        report.is_complete = True
    finally:
        report.save()
        print(report.markdown())
        files = [out / "bench.json", out / "bench.md"]
        if report.costs:
            files.append(out / PICTURE)
            _draw(report, files[-1])
        print(f"results      {', '.join(map(str, files))}")
    return 0


def _draw(report: Report, path: Path) -> None:
    """Costs on paper, and times where there are any, against the side of images."""
    found = {(m.subject, m.length): m.timing.seconds for m in report.measurements if m.suite == "scaling"}
    macs: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for cost in report.costs:
        macs.setdefault(cost.subject, []).append((cost.pixels, cost.macs / 1e9))
        if (seconds := found.get((cost.subject, cost.tokens))) is not None:
            times.setdefault(cost.subject, []).append((cost.pixels, seconds))
    panels = [
        Panel(
            "side of an image, pixels",
            label,
            {name: _columns(points) for name, points in curves.items()},
            is_log=True,
            has_log_x=True,
            has_points=True,
        )
        for label, curves in (("seconds for an image, measured", times), ("GMAC for an image", macs))
        if curves
    ]
    save_curves(panels, path)


def _columns(points: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.tensor(points).unbind(1)
    return x, y


def _setup(config: DictConfig) -> Setup:
    device = choose_device(config.device)
    on_gpu = device.type == "cuda"
    limit = config.memory_limit_gib
    if limit is None:
        limit = (
            GPU_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory / GIB
            if on_gpu
            else CPU_MEMORY_LIMIT_GIB
        )
    return Setup(
        keep_freed_memory=config.keep_freed_memory,
        lengths=tuple(config.lengths),
        resolutions=tuple(config.resolutions),
        batch_size=config.batch_size,
        hidden_size=config.hidden_size,
        d_state=config.d_state,
        depth=config.depth,
        repetitions=config.repetitions,
        seconds=config.seconds,
        call_limit_seconds=config.call_limit_seconds,
        memory_limit_gib=limit,
        device=device,
        precision=config.precision or ("bf16" if on_gpu else "fp32"),
        compile=on_gpu if config.compile is None else config.compile,
    )
