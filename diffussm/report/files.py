"""A report on the disk: the page, its tables as Markdown, CSV and LaTeX, its curves as PNG."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from diffussm.report.charts import Chart, save_chart
from diffussm.report.page import Section, render_page
from diffussm.report.tables import Table
from diffussm.runtime.run_dir import write_atomically

PAGE = "report.html"


def write_report(
    out: Path, title: str, subtitle: str, sections: Sequence[Section], pictured: Sequence[Chart] = ()
) -> Path:
    """Write everything into a directory, replacing what an earlier report has left there; returns the page.

    Args:
        pictured: the charts that become pictures too.
    """
    write_atomically(out / "report.md", _markdown(title, subtitle, sections).encode())
    for table in (table for section in sections for table in section.all_tables if table.rows):
        write_atomically(out / f"{table.name}.csv", table.csv().encode())
        write_atomically(out / f"{table.name}.tex", table.latex().encode())
    for chart in pictured:
        save_chart(chart, out / f"curve-{chart.name}.png")
    page = out / PAGE
    write_atomically(page, render_page(title, subtitle, sections).encode())
    return page


def print_tables(tables: Sequence[Table]) -> None:
    """On a terminal: caption, table and notes of each that has rows."""
    for table in tables:
        if table.rows:
            print(
                "\n".join([table.caption, "", table.markdown(), *(["", *table.notes] if table.notes else []), ""])
            )


def _markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", subtitle]
    for section in sections:
        parts += [f"## {section.title}", *section.lead]
        if section.facts:
            parts.append("\n".join(f"- {name}: {value}" for name, value in section.facts))
        for table in section.all_tables:
            parts += _told(table)
    return "\n\n".join(parts) + "\n"


def _told(table: Table) -> Iterator[str]:
    if table.rows:
        yield from (table.caption, table.markdown(), *table.notes)
