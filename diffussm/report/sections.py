"""The sections of a page: a comparison of runs, and a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffussm.report.charts import QUARTERS, comparison_charts, run_charts
from diffussm.report.comparison import Compared, cell, model_name
from diffussm.report.page import Gallery, Section
from diffussm.report.run_record import RunRecord
from diffussm.report.tables import Cell, Column, Table, general_text, metric_text
from diffussm.runtime.run_status import describe_duration

FINE_STATES = ("finished", "running", "imported", "preempted")
MOST_EVENTS = 200
UNRECORDED = "The command is not recorded here; config.yaml, below, is what it composed to."
EVENT_FACTS = ("images", "event", "time")


def comparison_section(compared: Compared, galleries: Sequence[Gallery]) -> Section:
    """Runs beside each other."""
    count = len(compared.runs)
    return Section(
        title=f"{count} runs compared" if count > 1 else "The run",
        tables=[table for table in (compared.seeds, compared.table, compared.pairs) if table],
        more_tables=[compared.differences],
        charts=comparison_charts(compared.runs),
        galleries=galleries,
    )


def run_section(run: RunRecord, galleries: Sequence[Gallery], prefix: str = "") -> Section:
    """All about one run.

    Args:
        prefix: of the names of its tables, which are those of files.
    """
    report = run.report
    return Section(
        title=run.name,
        lead=[line for line in (_progress(run), report.message) if line],
        state=report.state,
        is_fine=report.state in FINE_STATES,
        facts=_facts(run),
        tables=[_results(run, prefix)],
        more_tables=[_timesteps(run, prefix), _events(run, prefix)],
        charts=run_charts(run),
        galleries=galleries,
        texts=[
            ("Command", str(report.status.get("command") or UNRECORDED)),
            ("Configuration", run.source or "config.yaml is missing or damaged."),
        ],
    )


def _progress(run: RunRecord) -> str:
    """How far it is, in a sentence."""
    total = run.report.total_images
    seen = f"{run.images:,} images seen" if not total else f"{run.images:,} of {total:,} images seen"
    left = run.report.status.get("eta_seconds") if run.report.state == "running" else None
    rest = f", {describe_duration(left)} left" if left else ""
    updated = f"; last heard of {run.report.updated:%Y-%m-%d %H:%M %Z}" if run.report.updated else ""
    return f"{seen}{rest}{updated}."


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """The numbers to know first, those that are known."""
    per_image, hours = run.gflops_per_image, run.at("hours", run.images)
    newest = next((m for m in reversed(run.measurements) if m.fid), None)
    memory = max(run.values("memory_gib")[1], default=None)
    facts: dict[str, str | None] = {
        "model": model_name(run.settings),
        "parameters": f"{run.costs.parameters:,}" if run.costs else None,
        "GMAC per image": general_text(per_image) if per_image else None,
        "total Gflops": general_text(per_image * run.images) if per_image else None,
        "training time": describe_duration(hours * 3600) if hours else None,
        "images/s": f"{run.images / hours / 3600:,.0f}" if hours else None,
        "peak memory": f"{memory:.2f} GiB" if memory else None,
        "loss": general_text(loss) if (loss := run.last("loss")) is not None else None,
        "restarts": _count(run.report.status.get("restarts") or run.report.events.get("resume")),
        "skipped steps": _count(run.report.status.get("skipped_steps")),
    }
    if newest is not None and newest.fid is not None:
        facts[newest.fid] = metric_text(newest.metrics[newest.fid])
    return [(name, value) for name, value in facts.items() if value is not None]


def _count(value: Any) -> str:
    return f"{value or 0:,}"


def _results(run: RunRecord, prefix: str) -> Table:
    """Everything that was measured, the newest state last."""
    names = list(dict.fromkeys(name for m in run.measurements for name in m.metrics))
    real: list[list[Cell]] = [[m.how, None, *(cell(m, name) for name in names)] for m in run.real[-1:]]
    of_images = {name for m in run.measurements if m.of_images for name in m.metrics}  # losses, which may be small
    texts = (general_text if name in of_images else metric_text for name in names)
    columns = [Column("measured", is_text=True), Column("images"), *map(Column, names, texts)]
    rows: list[list[Cell]] = [[m.how, m.images, *(cell(m, name) for name in names)] for m in run.measurements]
    caption = "Results, with 95% confidence intervals where they were asked for."
    return Table(f"{prefix}results", caption if rows else "Results", columns, [*rows, *real])


def _timesteps(run: RunRecord, prefix: str) -> Table:
    """The newest loss of each quarter of the timesteps."""
    values = [run.last(f"loss_q{i}") for i in range(len(QUARTERS))]
    rows: list[list[Cell]] = [[name, value] for name, value in zip(QUARTERS, values, strict=True)]
    known = rows if any(value is not None for value in values) else []
    columns = [Column("timesteps", is_text=True), Column("loss")]
    return Table(f"{prefix}timesteps", "Loss by timestep, in the last record.", columns, known)


def _events(run: RunRecord, prefix: str) -> Table:
    """What happened to the run; of very many, the newest."""
    events, notes = run.events[-MOST_EVENTS:], []
    if len(run.events) > len(events):
        notes.append(f"The newest {MOST_EVENTS:,} of {len(run.events):,}.")
    if run.report.num_damaged:
        notes.append(f"{run.report.num_damaged:,} damaged lines of metrics.jsonl are left out.")
    rows: list[list[Cell]] = [
        [str(event.get("time", "")), event["images"], str(event["event"]), _details(event)] for event in events
    ]
    columns = [
        Column("time", is_text=True),
        Column("images"),
        Column("event", is_text=True),
        Column("details", is_text=True),
    ]
    return Table(f"{prefix}events", "Events: restarts, skipped steps, failed saves.", columns, rows, notes)


def _details(event: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in event.items() if key not in EVENT_FACTS}
    return ", ".join(
        f"{key} {'; '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in facts.items()
    )
