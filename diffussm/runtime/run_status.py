"""What a run directory tells about its run, to who looks from outside: reads only, makes do with what is there."""

import contextlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from diffussm.runtime.errors import Preempted, RunDirectoryError
from diffussm.runtime.run_dir import TIME_FORMAT, RunDirectory

_TOTAL = re.compile(r"^  total_images: (\d+)$", re.MULTILINE)  # in config.yaml, which is ours
_CHECKPOINT = re.compile(r"step-\d{12}")
# States as status.json has them; stalled, gone and unknown are judged from outside.
_FINE = ("running", "finished", "imported")


@dataclass(frozen=True)
class RunReport:
    """Where a run is.

    Args:
        state: running, finished, preempted, failed or imported, as the run says; stalled or gone if it says
            that it runs and does not; unknown.
        message: why it is not fine, or empty.
        status: status.json.
        record: the newest losses and rates.
        evaluation: the newest evaluation during training, with the images seen.
        checkpoints: names and times of writing, oldest first.
        events: how often what happened to the run, by name.
        num_damaged: lines of metrics.jsonl that are no records.
    """

    path: Path
    state: str
    message: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)
    total_images: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[tuple[str, datetime], ...] = ()
    events: Mapping[str, int] = field(default_factory=dict)
    num_damaged: int = 0

    @property
    def images(self) -> int:
        """Images seen, as far as it is known."""
        return max(self.status.get("images") or 0, self.record.get("images") or 0)

    @property
    def updated(self) -> datetime | None:
        """When the run last said something."""
        return _time(self.status.get("updated"))

    @property
    def exit_code(self) -> int:
        """0 if nothing has to be done, 75 if it waits to be continued, else what it failed with, or 1."""
        if self.state in _FINE:
            return 0
        if self.state == "preempted":
            return Preempted.exit_code
        return self.status.get("exit_code") or 1 if self.state == "failed" else 1


def read_report(path: Path, now: datetime | None = None) -> RunReport:
    """The report of a run directory; RunDirectoryError where there is no run."""
    if not path.is_dir():
        problem = "a file" if path.exists() else "no such directory"
        raise RunDirectoryError(f"{path}: {problem}: give run directories, such as runs/NAME")
    if not any((path / name).exists() for name in ("status.json", "config.yaml", "metrics.jsonl", "checkpoints")):
        raise RunDirectoryError(f"{path}: holds no run: give run directories, such as runs/NAME")
    status, problem = _read_status(path)
    records, num_damaged = read_records(path / "metrics.jsonl")
    state, message = _judge(status, problem, now or datetime.now(timezone.utc))
    return RunReport(
        path=path,
        state=state,
        message=message,
        status=status,
        total_images=status.get("total_images") or _configured_total(path / "config.yaml"),
        record=next((record for record in reversed(records) if "loss" in record), {}),
        evaluation=next((record for record in reversed(records) if "evaluation" in record), {}),
        checkpoints=_checkpoints(path / "checkpoints"),
        events=dict(Counter(str(record["event"]) for record in records if "event" in record)),
        num_damaged=num_damaged,
    )


def describe_duration(seconds: float) -> str:
    """Hours, minutes and seconds, or days and hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds:02}"


def _judge(status: Mapping[str, Any], problem: str, now: datetime) -> tuple[str, str]:
    """State and message."""
    if problem:
        return "unknown", problem
    state, updated = str(status.get("state")), _time(status.get("updated"))
    if state != "running":
        return state, str(status.get("message", "")) if state != "finished" else ""
    if status.get("host") == socket.gethostname() and not _is_alive(status.get("pid")):
        return "gone", f"its process {status.get('pid')} no longer exists: the same command continues the run"
    if updated is not None and (now - updated).total_seconds() > (status.get("limit_seconds") or 0):
        return "stalled", f"nothing heard of it since {updated:%Y-%m-%d %H:%M:%S}: look at its processes"
    return state, ""


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return True  # nothing is known
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _read_status(path: Path) -> tuple[dict[str, Any], str]:
    """status.json, and what is wrong with it."""
    try:
        status = RunDirectory(path).read_status()
    except (RunDirectoryError, OSError):
        status = {}
    if status is None:
        return {}, "there is no status.json"
    if not isinstance(status, dict) or "state" not in status:
        return {}, "status.json is damaged"
    return status, ""


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of metrics.jsonl, and how many lines are none; a last line may be about to be written."""
    records, num_damaged = [], 0
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and "images" in record:
                records.append(record)
            elif line.endswith(b"\n"):
                num_damaged += 1
    return records, num_damaged


def _configured_total(path: Path) -> int | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if found := _TOTAL.search(path.read_text()):
            return int(found[1])
    return None


def _checkpoints(path: Path) -> tuple[tuple[str, datetime], ...]:
    found = []
    with contextlib.suppress(OSError):
        for directory in sorted(path.iterdir()):
            manifest = directory / "manifest.json"
            if _CHECKPOINT.fullmatch(directory.name) and manifest.exists():
                found.append((directory.name, datetime.fromtimestamp(manifest.stat().st_mtime, timezone.utc)))
    return tuple(found)


def _time(text: Any) -> datetime | None:
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except (TypeError, ValueError):
        return None
