"""`diffussm bench`: speed and memory against baselines, as a table with goals."""

import argparse
import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffussm.bench.report import Report
from diffussm.bench.suites import run_suites
from diffussm.bench.workload import GIB, Setup, Skip
from diffussm.build import choose_device
from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.config import BENCH_SUITES
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, RunDirectoryError

CPU_MEMORY_LIMIT_GIB = 12.0
GPU_MEMORY_SHARE = 0.9


def run(options: argparse.Namespace) -> int:
    """Measure suite by suite, saving after every result; what was measured survives Ctrl-C."""
    config = compose("bench", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    if config.keep_freed_memory:
        keep_freed_memory()
    setup = _setup(config)
    suites = config.suites or [name for name in BENCH_SUITES if name != "xl" or setup.device.type == "cuda"]
    if "xl" in suites and setup.device.type != "cuda":
        raise ConfigError("suites=[xl]: its models are for a GPU: add device=cuda")
    out = Path(config.out)
    for path in (out / "bench.json", out / "bench.md"):
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
        print(f"results      {out / 'bench.json'}, {out / 'bench.md'}")
    return 0


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
