"""`diffussm compare`: runs beside each other, as tables, curves and samples from the same noise."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diffussm.commands import note, print_config
from diffussm.commands.run_collection import Asked, common_directory, parse, read_runs
from diffussm.commands.run_pictures import MOST_PIXELS, Drawer
from diffussm.report.charts import comparison_charts
from diffussm.report.comparison import Compared, compare
from diffussm.report.files import print_tables, write_report
from diffussm.report.grid import save_rows
from diffussm.report.page import Gallery, Strip
from diffussm.report.pictures import embed
from diffussm.report.run_record import RunRecord
from diffussm.report.sections import comparison_section
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.run_dir import refuse_unwritable

SUBTITLE = "Written by diffussm. Everything on this page is in this file."


def run(options: argparse.Namespace) -> int:
    """Compare, print the tables, write the rest."""
    keep_freed_memory()
    asked = parse(options)
    if options.print_config:
        return print_config(asked.config)
    if len(asked.runs) < 2:
        raise ConfigError(
            f"runs=[{asked.runs[0]}]: one run has nothing to stand beside: name another, or use report"
        )
    out = Path(asked.config.out or common_directory(asked.runs) / "compare")
    refuse_unwritable(out, f"out={out}", "out")
    compared = compare_runs(read_runs(asked), asked)
    gallery = same_noise(compared.runs, Drawer(asked), asked.config.drawn_images, out)
    title = f"{len(compared.runs)} runs compared"
    page = write_report(
        out, title, SUBTITLE, [comparison_section(compared, [gallery])], comparison_charts(compared.runs)
    )
    print_tables(compared.tables)
    print(f"page         {page}, with tables and curves beside it")
    return 0


def compare_runs(runs: list[RunRecord], asked: Asked) -> Compared:
    """At the terms that the command line asks for."""
    try:
        return compare(runs, asked.config.match, asked.config.tolerance)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def same_noise(runs: Sequence[RunRecord], drawer: Drawer, count: int, out: Path) -> Gallery:
    """A row of samples for each run; also as samples.png in `out`."""
    if not count:
        return Gallery("Samples from the same noise", "None were asked for.", [])
    strips, rows, names, columns = [], [], [], []
    manners: dict[str, list[str]] = {}
    for run in runs:
        drawn = drawer.samples(run, count)
        manners.setdefault(drawn.problem or drawn.manner, []).append(run.name)
        if drawn.problem:
            note(f"{run.path}: {drawn.problem}")
            continue
        pictures = [
            embed(path, f"{run.name}, {label}, image {i}", MOST_PIXELS)
            for i, (label, path) in enumerate(drawn.images)
        ]
        strips.append(Strip(run.name, pictures))
        names.append(run.name)
        rows.append(torch.stack([pil_to_tensor(Image.open(path)) for _, path in drawn.images]))
        columns.append([label.removeprefix("class ") for label, _ in drawn.images])
    is_alike = bool(columns) and all(labels == columns[0] for labels in columns)
    about = "Each column begins with the same noise and, where there are classes, is of the same one."
    if len({row.shape[1:] for row in rows}) > 1:
        about = "The runs draw images of different shapes, which no noise can be common to."
    elif rows:
        save_rows(rows, out / "samples.png", names)
        if not is_alike:
            about = "Each column begins with the same noise; the runs know different classes."
    if rows:
        about += " Drawn from the newest checkpoint of each run."
    for manner, which in manners.items():
        about += f" {'All' if len(which) == len(runs) else ', '.join(which)}: {manner}."
    return Gallery("Samples from the same noise", about, strips, columns[0] if is_alike else ())
