"""`diffussm report`: one page about a run or a sweep."""

import argparse
import re
from pathlib import Path

from omegaconf import DictConfig

from diffussm.commands import print_config
from diffussm.commands.compare import SUBTITLE, compare_runs, same_noise
from diffussm.commands.run_collection import common_directory, parse, read_runs
from diffussm.commands.run_pictures import Drawer, training_grids
from diffussm.report.charts import comparison_charts
from diffussm.report.files import print_tables, write_report
from diffussm.report.page import Section
from diffussm.report.run_record import RunRecord
from diffussm.report.sections import comparison_section, run_section
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.run_dir import refuse_unwritable

MOST_COMPARED = 20  # images of each run in the comparison of a sweep
MOST_GRIDS, MOST_GRIDS_OF_MANY = 6, 2  # of training, for each run


def run(options: argparse.Namespace) -> int:
    """Read the runs, draw what is asked for, write the page."""
    keep_freed_memory()
    asked = parse(options)
    if options.print_config:
        return print_config(asked.config)
    config, drawer = asked.config, Drawer(asked)
    is_sweep = len(asked.runs) > 1
    out = Path(config.out or (common_directory(asked.runs) if is_sweep else asked.runs[0]) / "report")
    refuse_unwritable(out, f"out={out}", "out")
    runs = read_runs(asked)
    sections: list[Section] = []
    if is_sweep:
        compared = compare_runs(runs, asked)
        gallery = same_noise(runs, drawer, min(config.drawn_images, MOST_COMPARED), out)
        sections.append(comparison_section(compared, [gallery]))
    for record in runs:
        prefix = re.sub(r"[^\w.=,+-]+", "-", record.name) + "-" if is_sweep else ""
        sections.append(_section(record, drawer, config, prefix))
    title = f"{len(runs)} runs in {common_directory(asked.runs).resolve().name}" if is_sweep else runs[0].name
    page = write_report(out, title, SUBTITLE, sections, comparison_charts(runs))
    print_tables(sections[0].tables)
    print(f"page         {page} ({page.stat().st_size / 1024:,.0f} KiB), with tables and curves beside it")
    return 0


def _section(record: RunRecord, drawer: Drawer, config: DictConfig, prefix: str) -> Section:
    drawn = config.drawn_images
    galleries = [drawer.by_class(record, drawn), drawer.denoising(record, min(config.denoising_images, drawn))]
    if grids := training_grids(record, MOST_GRIDS_OF_MANY if prefix else MOST_GRIDS):
        galleries.append(grids)
    return run_section(record, galleries, prefix)
