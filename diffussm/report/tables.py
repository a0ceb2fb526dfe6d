"""Tables that are worked out once and written as Markdown, CSV, LaTeX and HTML: cells keep their numbers."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """A number with its 95% confidence interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Averaged:
    """A mean with the standard deviation of what it is of."""

    value: float
    deviation: float


Cell = str | int | float | Measured | Averaged | None  # None: not known, a dash
MISSING = "-"


def number(cell: Cell) -> int | float | None:
    """The value of a cell that has one."""
    if cell is None or isinstance(cell, str):
        return None
    return cell.value if isinstance(cell, Measured | Averaged) else cell


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
        if isinstance(cell, str):
            return cell
        value, beside = number(cell), ""
        if value is None or not math.isfinite(value):
            return MISSING
        if isinstance(cell, Averaged):
            beside = f" ±{_deviation(cell) if self.text is general_text else self._alike(value, cell.deviation)}"
        elif isinstance(cell, Measured) and cell.low is not None and cell.high is not None:
            beside = f" ±{self._alike(value, (cell.high - cell.low) / 2)}"
        return self.text(value) + beside

    def _alike(self, value: float, spread: float) -> str:
        """A spread with the decimals of its value, unless none of its digits would be left."""
        decimals = len(self.text(value).partition(".")[2])
        is_shown = self.text is not general_text and spread >= 0.5 * 10**-decimals
        return f"{spread:,.{decimals}f}" if is_shown else self.text(spread)


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
        """The numbers themselves; intervals and deviations in columns of their own."""
        beside = [
            dict.fromkeys(name for row in self.rows for name in _beside(row[i])) for i in range(len(self.columns))
        ]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                text
                for column, names in zip(self.columns, beside, strict=True)
                for text in (column.title, *(f"{column.title} {name}" for name in names))
            ]
        )
        for row in self.rows:
            writer.writerow(
                [
                    "" if value is None else value
                    for cell, names in zip(row, beside, strict=True)
                    for value in (cell if isinstance(cell, str) else number(cell), *map(_beside(cell).get, names))
                ]
            )
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


def _beside(cell: Cell) -> dict[str, float | None]:
    """What is known of a number beside its value."""
    if isinstance(cell, Averaged):
        return {"deviation": cell.deviation}
    return {"low": cell.low, "high": cell.high} if isinstance(cell, Measured) and cell.low is not None else {}


def _deviation(cell: Averaged) -> str:
    """Of a whole number, as a whole one; else with two digits."""
    is_whole = isinstance(cell.value, int) and cell.deviation >= 1
    return general_text(round(cell.deviation)) if is_whole else f"{cell.deviation:.2g}"


def _markdown(text: str) -> str:
    """One line without what would end the cell or begin a tag."""
    return re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", r"\|").replace("<", "&lt;")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in re.sub(r"\s+", " ", text))
