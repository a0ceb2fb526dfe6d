"""`diffussm status`: where runs are, for who looks from outside."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from diffussm.runtime.errors import RunDirectoryError
from diffussm.runtime.run_status import RunReport, describe_duration, read_report


def run(options: argparse.Namespace) -> int:
    """Print a block for each run directory; returns the first exit code that is not 0."""
    codes = []
    for path in options.paths:
        try:
            report = read_report(path)
        except RunDirectoryError as error:
            print(f"diffussm: {error}", file=sys.stderr)
            codes.append(error.exit_code)
            continue
        print(as_json(report) if options.json else describe(report))
        codes.append(report.exit_code)
    return next((code for code in codes if code), 0)


def as_json(report: RunReport) -> str:
    """The report in a line, with what it follows to."""
    return json.dumps({**asdict(report), "images": report.images, "exit_code": report.exit_code}, default=str)


def describe(report: RunReport) -> str:
    """A line of what matters most, and what is known below it."""
    status, record = report.status, report.record
    total = report.total_images
    progress = f"{report.images:,} images"
    if total:
        progress = f"{report.images:,} of {total:,} images ({100 * report.images / total:.0f} %)"
    eta = status.get("eta_seconds") if report.state == "running" else None
    left = f", {describe_duration(eta)} left" if eta is not None else ""
    lines = [f"{report.path}: {report.state}, {progress}{left}"]

    def add(name: str, text: str) -> None:
        if text:
            lines.append(f"  {name:<12} {text}")

    add("message", report.message)
    if report.state in ("running", "stalled") and status.get("doing") not in (None, "training"):
        add("doing", str(status["doing"]))
    add("speed", _speed(record))
    add("losses", _losses(record))
    if report.evaluation:
        measured = "   ".join(f"{key} {_number(value)}" for key, value in report.evaluation["evaluation"].items())
        add("evaluation", f"{measured} (at {report.evaluation['images']:,} images)")
    newest = [f"{name} ({_ago(written)})" for name, written in reversed(report.checkpoints[-2:])]
    add("checkpoints", ", ".join(newest) or "none yet")
    add("incidents", _incidents(report))
    if report.updated is not None:
        processes = status.get("processes", 1)
        number = f", {processes} processes" if processes > 1 else ""
        add("heard of", f"{_ago(report.updated)}: process {status.get('pid')} on {status.get('host')}{number}")
    return "\n".join(lines)


def _speed(record: Mapping[str, Any]) -> str:
    shown = (
        ("images_per_second", lambda value: f"{value:,.0f} images/s"),
        ("mfu", lambda value: f"MFU {100 * value:.0f} %"),
        ("data_wait", lambda value: f"{100 * value:.0f} % of the time waiting for data"),
        ("memory_gib", lambda value: f"{value:.1f} GiB at most"),
    )
    return ", ".join(form(record[key]) for key, form in shown if record.get(key) is not None)


def _losses(record: Mapping[str, Any]) -> str:
    names = [key for key in record if key.startswith("loss")] + ["grad_norm"]
    return "   ".join(f"{key} {_number(record[key])}" for key in names if record.get(key) is not None)


def _incidents(report: RunReport) -> str:
    restarts = report.status.get("restarts") or report.events.get("resume", 0)
    counts = (
        ("restart", restarts),
        ("skipped step", report.status.get("skipped_steps") or 0),
        ("failed save", report.events.get("failed save", 0)),
        ("damaged line of metrics.jsonl", report.num_damaged),
    )
    found = [f"{count:,} {name if count == 1 else _plural(name)}" for name, count in counts if count]
    return ", ".join(found) or "none"


def _plural(name: str) -> str:
    return name.replace("line", "lines") if "line" in name else f"{name}s"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _ago(moment: datetime) -> str:
    seconds = (datetime.now(timezone.utc) - moment).total_seconds()
    return f"{describe_duration(max(seconds, 0))} ago"
