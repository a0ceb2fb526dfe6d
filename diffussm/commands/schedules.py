"""`diffussm schedules`: noise schedules as a plot and as a table."""

import argparse
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffussm.build import construct
from diffussm.commands import print_config, print_table
from diffussm.compose import compose, compose_group, group_options, override_value
from diffussm.diffusion.schedule import Schedule
from diffussm.report.curves import FORMATS, Panel, save_curves
from diffussm.runtime.errors import ConfigError

COLUMNS = (
    "schedule", "timesteps", "alphabar T/4", "alphabar T/2", "alphabar 3T/4", "alphabar T",
    "log-SNR start", "log-SNR end",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Draw alphabar and SNR of every preset or of the chosen schedule, and print a row for each."""
    config = compose("schedules", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    out = Path(config.out)
    if out.suffix not in FORMATS:
        raise ConfigError(f"out={out}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    schedules = _schedules(config, override_value(options.overrides, "diffusion"))
    save_curves(_panels(schedules), out)
    print_table(COLUMNS, [_row(name, schedule) for name, schedule in schedules.items()])
    print(f"plot         {out}")
    return 0


def _schedules(config: DictConfig, chosen: str | None) -> dict[str, Schedule]:
    """By name, the chosen one or all; a process without a table of alphabar is none."""
    if chosen is not None:
        process = construct(config.diffusion, "diffusion")
        if not isinstance(process, Schedule):
            raise ConfigError(f"diffusion={chosen}: has no noise schedule: choose another, or none for all")
        return {chosen: process}
    processes = {
        name: construct(compose_group("diffusion", name, {}), "diffusion") for name in group_options("diffusion")
    }
    return {name: process for name, process in processes.items() if isinstance(process, Schedule)}


def _panels(schedules: dict[str, Schedule]) -> list[Panel]:
    times = {name: (torch.arange(len(schedule)) + 1) / len(schedule) for name, schedule in schedules.items()}
    alphas_cumprod = {name: (times[name], schedule.alphas_cumprod) for name, schedule in schedules.items()}
    snrs = {name: (times[name], schedule.snr) for name, schedule in schedules.items()}
    return [
        Panel("$t / T$", r"signal that is left, $\bar\alpha_t$", alphas_cumprod),
        Panel("$t / T$", r"signal-to-noise ratio, $\bar\alpha_t / (1 - \bar\alpha_t)$", snrs, is_log=True),
    ]


def _row(name: str, schedule: Schedule) -> tuple[str, ...]:
    T = len(schedule)
    quarters = [-(-quarter * T // 4) - 1 for quarter in (1, 2, 3, 4)]  # t counts from 1, and tables from 0
    log_snr = schedule.log_snr
    return (
        name,
        f"{T:,}",
        *(f"{schedule.alphas_cumprod[index]:.4g}" for index in quarters),
        f"{log_snr[0]:.2f}",
        f"{log_snr[-1]:.2f}",
    )
