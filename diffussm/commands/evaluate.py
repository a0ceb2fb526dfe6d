"""`diffussm evaluate`: metrics of a checkpoint, of several, or of stored samples, and all that decides them."""

import argparse
import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffussm.commands import note, print_config
from diffussm.commands.from_checkpoint import open_checkpoint
from diffussm.commands.gate import conclude
from diffussm.commands.in_processes import Job, in_processes
from diffussm.commands.measuring import GROUPS, Answer, measure_checkpoint, measure_samples
from diffussm.compose import compose, override_value
from diffussm.evaluation.evaluator import table
from diffussm.report.curves import Panel, save_curves
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError
from diffussm.training.checkpoint import MANIFEST

SUBJECTS = ("checkpoint", "checkpoints", "samples")


def run(options: argparse.Namespace) -> int:
    """Measure, unless it was measured already; print the table either way.

    results.json is the latest measurement, results.jsonl beside it keeps every one. What `gate.` asks for is
    judged every time.
    """
    keep_freed_memory()
    if options.print_config:
        return _print_config(options)
    return in_processes(options, lambda job: _evaluate(options, job))


def _evaluate(options: argparse.Namespace, job: Job) -> int:
    subject = job.processes.on_all(lambda: _choose_subject(options))
    if subject == "samples":
        answers = [measure_samples(options, job)]
    elif subject == "checkpoint":
        answers = [measure_checkpoint(options, job)]
    else:
        paths = job.processes.on_first(lambda: _matches(str(override_value(options.overrides, "checkpoints"))))
        answers = [_measure_one(options, path, job) for path in paths]
        answers.sort(key=lambda answer: (answer.run, answer.images))
    if not job.processes.is_first:
        return 0
    print(table(_rows(answers)))
    if subject == "checkpoints":
        _draw_curves(answers)
    print(f"results      {answers[-1].out}")
    return conclude([(answer.gate, answer.results) for answer in answers])


def _print_config(options: argparse.Namespace) -> int:
    if _choose_subject(options) == "samples":
        groups: dict[str, Any] = {name: {} for name in GROUPS}
        return print_config(compose("evaluate", options.overrides, options.config_dir, groups))
    return print_config(open_checkpoint(options)[2])


def _choose_subject(options: argparse.Namespace) -> str:
    """Which of SUBJECTS was given; ConfigError unless it is one."""
    given = [key for key in SUBJECTS if override_value(options.overrides, key) not in (None, "")]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(f'{key}=' for key in given)}: measure one thing at a time: give one")
    if not given:
        raise ConfigError(
            "checkpoint: not set: add checkpoint=RUN_DIRECTORY, checkpoints='RUN_DIRECTORY/checkpoints/*' or "
            "samples=PATH"
        )
    return given[0]


def _matches(pattern: str) -> list[Path]:
    """The checkpoints and runs that a pattern names."""
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  (may be absolute)
    paths = [path for path in found if (path / MANIFEST).exists() or (path / "checkpoints").is_dir()]
    if not paths:
        raise ConfigError(
            f"checkpoints={pattern}: no checkpoint there: give a pattern such as 'RUN/checkpoints/*'"
        )
    return paths


def _measure_one(options: argparse.Namespace, path: Path, job: Job) -> Answer:
    """One of several, as `checkpoint=` would have it measured."""
    if job.processes.is_first:
        note(f"checkpoint {path}")
    quoted = str(path).replace("\\", "\\\\").replace("'", "\\'")
    others = [override for override in options.overrides if not override.startswith("checkpoints=")]
    overrides = [*others, f"checkpoint='{quoted}'"]
    return measure_checkpoint(argparse.Namespace(**{**vars(options), "overrides": overrides}), job)


def _rows(answers: Sequence[Answer]) -> dict[str, Mapping[str, Any]]:
    """A row for each thing that was measured, and what a perfect model would score."""
    rows: dict[str, Mapping[str, Any] | None] = {}
    for answer in answers:
        where = f"{answer.run}, {answer.images:,} images, " if len(answers) > 1 else ""
        rows[where + answer.title] = answer.results.get("metrics")
    rows["real against real"] = answers[-1].results.get("real_against_real")
    for answer in answers:
        where = f"{answer.run}, {answer.images:,} images, " if len(answers) > 1 else ""
        rows[f"{where}{answer.results.get('weights')}, on images"] = answer.results.get("image_metrics")
    return {name: row for name, row in rows.items() if row}


def _draw_curves(answers: Sequence[Answer]) -> None:
    """The first metric against the images seen, a curve for each run."""
    measured = [answer for answer in answers if answer.results.get("metrics")]
    if not measured:
        return
    metric = next(iter(measured[0].results["metrics"]))
    curves = {}
    for run in dict.fromkeys(str(answer.run) for answer in measured):
        points = [
            (answer.images, answer.results["metrics"].get(metric, math.nan))
            for answer in measured
            if str(answer.run) == run
        ]
        curves[Path(run).name] = (torch.tensor([x for x, _ in points]), torch.tensor([y for _, y in points]))
    path = answers[-1].out.with_suffix(".png")
    save_curves([Panel("images seen", metric, curves, has_points=True)], path)
    print(f"curves       {path}")
