"""Tables that are worked out once and written as Markdown, CSV, LaTeX and HTML: cells keep their numbers."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """A number with its 95% confidence interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


Cell = str | int | float | Measured | None  # None: not known, a dash
MISSING = "-"


def metric_text(value: float) -> str:
    """With as many digits as a metric deserves."""
    digits = 3 if abs(value) < 10 else 1
    return f"{value:.{digits if abs(value) >= 0.01 or value == 0 else 5}f}"


def general_text(value: float) -> str:
    """Whole numbers in groups of three, others with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@dataclass(frozen=True)
class Column:
    """A heading, and how its numbers are written for a person; `is_text` stands to the left."""

    title: str
    text: Callable[[float], str] = general_text
    is_text: bool = False

    def write(self, cell: Cell) -> str:
        """What a person reads in a cell."""
        if cell is None or isinstance(cell, str):
            return MISSING if cell is None else cell
        value, low, high = (cell.value, cell.low, cell.high) if isinstance(cell, Measured) else (cell, None, None)
        if not math.isfinite(value):
            return MISSING
        half = "" if low is None or high is None else f" ±{self.text((high - low) / 2)}"
        return self.text(value) + half


@dataclass(frozen=True)
class Table:
    """Rows of cells under their columns.

    Attributes:
        name: of its files, such as results.csv.
        caption: what it shows, in a sentence.
        notes: what a reader has to know of it.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    def texts(self) -> list[list[str]]:
        """The rows as a person reads them."""
        return [[column.write(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def markdown(self) -> str:
        """Aligned, so that a terminal can show it as it is."""
        titles = [_markdown(column.title) for column in self.columns]
        rows = [[_markdown(text) for text in row] for row in self.texts()]
        widths = [max(3, *map(len, texts)) for texts in zip(titles, *rows, strict=True)]
        sides = [str.ljust if column.is_text else str.rjust for column in self.columns]
        rule = [
            "-" * width if column.is_text else "-" * (width - 1) + ":"
            for column, width in zip(self.columns, widths, strict=True)
        ]
        lines = [
            " | ".join(side(text, width) for side, text, width in zip(sides, row, widths, strict=True))
            for row in (titles, rule, *rows)
        ]
        return "\n".join(f"| {line} |" for line in lines)

    def csv(self) -> str:
        """The numbers themselves; intervals in columns of their own."""
        spread = [any(_has_interval(row[i]) for row in self.rows) for i in range(len(self.columns))]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        titles = zip(self.columns, spread, strict=True)
        writer.writerow([text for column, wide in titles for text in _csv_titles(column.title, wide)])
        for row in self.rows:
            writer.writerow([value for cell, wide in zip(row, spread, strict=True) for value in _raw(cell, wide)])
        return file.getvalue()

    def latex(self) -> str:
        """A table of the package booktabs."""
        sides = "".join("l" if column.is_text else "r" for column in self.columns)
        head = " & ".join(_latex(column.title) for column in self.columns)
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in self.texts()]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(' '.join([self.caption, *self.notes]))}}}",
                rf"\begin{{tabular}}{{{sides}}}",
                r"\toprule",
                head + r" \\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def _has_interval(cell: Cell) -> bool:
    return isinstance(cell, Measured) and cell.low is not None


def _csv_titles(title: str, wide: bool) -> list[str]:
    return [title, f"{title} low", f"{title} high"] if wide else [title]


def _raw(cell: Cell, wide: bool) -> Iterator[str | int | float]:
    values = (cell.value, cell.low, cell.high) if isinstance(cell, Measured) else (cell, None, None)
    for value in values[: 3 if wide else 1]:
        yield "" if value is None else value


def _markdown(text: str) -> str:
    """One line without what would end the cell or begin a tag."""
    return re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", r"\|").replace("<", "&lt;")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in re.sub(r"\s+", " ", text))
