"""Runs that differ in nothing but their seed, as one row each: means, and how far seeds lie apart."""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from diffussm.report.run_record import RunRecord
from diffussm.report.tables import Averaged, Cell, Column, Table, number

UNLIKE = ("seed", "name", "run_dir")
WORDS = re.compile(r"[^\W\d_]+|\d+|[\W_]+")  # a number is alike as a whole: seeds 10 and 11 are not of a run 1
OWN_END = re.compile(r"[\W_]*(seed)?[\W_]*$")  # of what names of such runs have in common


@dataclass(frozen=True)
class Siblings:
    """Runs that differ in their seed alone; a run that has none is alone.

    Attributes:
        name: what their names have in common, if no others are called that.
        members: their own names.
        places: of them among the runs.
    """

    name: str
    members: Sequence[str]
    places: Sequence[int]


def find_siblings(runs: Sequence[RunRecord]) -> list[Siblings]:
    """All runs, in the order of the first of each; where one seed was run twice, they are not together."""
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for place, run in enumerate(runs):
        settings = tuple((key, str(value)) for key, value in run.settings.items() if key not in UNLIKE)
        found.setdefault(settings or (("run", run.name),), []).append(place)
    groups: list[list[int]] = []
    for places in found.values():
        seeds = {str(runs[place].settings.get("seed")) for place in places}
        groups += [places] if len(seeds) == len(places) else [[place] for place in places]
    groups.sort()
    members = [[runs[place].name for place in places] for places in groups]
    names = [_name(own) for own in members]
    bearers = Counter(names)
    names = [name if bearers[name] == 1 else ", ".join(own) for name, own in zip(names, members, strict=True)]
    return [Siblings(*of_group) for of_group in zip(names, members, groups, strict=True)]


def over_seeds(runs: Sequence[RunRecord], table: Table) -> Table | None:
    """A table's rows, one for each run, averaged over seeds; None if no two runs differ in that alone.

    Args:
        table: whose first column names the run; rows beyond those of the runs are left out.
    """
    groups = find_siblings(runs)
    if len(groups) == len(runs):
        return None
    rows: list[list[Cell]] = []
    for group in groups:
        together = zip(*(table.rows[place][1:] for place in group.places), strict=True)
        cells = [_average(column, cells) for column, cells in zip(table.columns[1:], together, strict=True)]
        rows.append([group.name, len(group.places), *cells])
    columns = [table.columns[0], Column("seeds"), *table.columns[1:]]
    caption = f"Runs that differ in their seed alone: means ± standard deviations of single runs. {table.caption}"
    return Table(
        "seeds", caption, columns, rows, ["A dash: not known of all seeds, or not the same.", *table.notes]
    )


def _average(column: Column, cells: Sequence[Cell]) -> Cell:
    if column.is_text:
        return cells[0] if len(set(cells)) == 1 else None
    if len(cells) == 1:
        return number(cells[0])  # its interval is no deviation
    values = [value for cell in cells if (value := number(cell)) is not None]
    if len(values) < len(cells):
        return None
    if len(set(values)) == 1:
        return values[0]
    mean = statistics.fmean(values)
    return Averaged(round(mean) if isinstance(values[0], int) else mean, statistics.stdev(values))


def _name(names: Sequence[str]) -> str:
    """What names of runs have in common, if that is one."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*map(WORDS.findall, names), strict=False))
    return OWN_END.sub("", "".join(words[0] for words in alike)) or ", ".join(names)
