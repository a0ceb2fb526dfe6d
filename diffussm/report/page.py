"""One HTML page that is whole by itself: no request leaves it, whatever runs are called, and it opens from a disk.

Its curves are drawn as SVG by a script of its own; a plotting library would be some megabytes in every page.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffussm.report.charts import Chart
from diffussm.report.pictures import Picture
from diffussm.report.run_record import AXES
from diffussm.report.tables import Table

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Strip:
    """Pictures in a row, with what they have in common."""

    label: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures under a heading, with a remark about them.

    Attributes:
        columns: headings of the columns, or none.
    """

    title: str
    about: str
    strips: Sequence[Strip]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A run, or a comparison of runs.

    Attributes:
        title: in words, such as a run's name.
        state: of a run, in a word, and `is_fine` whether that is well.
        lead: sentences below the title.
        facts: the most important numbers with their names.
        tables, more_tables: those at the beginning, and those after curves and pictures.
        texts: longer texts in fixed type with their titles, folded.
    """

    title: str
    lead: Sequence[str] = ()
    state: str = ""
    is_fine: bool = True
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    more_tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()

    @property
    def all_tables(self) -> list[Table]:
        """In their order."""
        return [*self.tables, *self.more_tables]


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page; everything in it that is not ours is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["download"] = _download
    style, script = (Markup((TEMPLATES / name).read_text()) for name in ("page.css", "page.js"))
    charts: list[list[dict[str, Any]]] = [[chart.content() for chart in section.charts] for section in sections]
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        charts=charts,
        axes=AXES,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _download(text: str, kind: str) -> str:
    """An address that holds a text file."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
