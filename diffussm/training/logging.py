"""Metrics as JSON lines, the truth about a run, and what a person sees of it meanwhile."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffussm.runtime.errors import StorageError
from diffussm.runtime.run_dir import write_atomically


class MetricsLog:
    """`metrics.jsonl`: one record per line, each with the images seen when it was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def rewind(self, images: int) -> None:
        """Drop what a killed run logged after the checkpoint at `images`, and a half-written last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["images"] <= images:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, safe from a crash of this process; on a full disk it waits for `settle`."""
        self._waiting.append(json.dumps(dict(record)) + "\n")
        with contextlib.suppress(StorageError):
            self.settle()

    def settle(self) -> None:
        """Write what had to wait, whole lines only; StorageError if it still has to."""
        if not self._waiting:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    rest = "".join(self._waiting).encode()
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}: free some space") from error
        self._waiting.clear()


class Progress:
    """A bar with ETA on a terminal, a line now and then elsewhere; both go to stderr.

    Args:
        every_seconds: least time between two lines where there is no terminal.
        is_shown: False for a process of a job that another one speaks for.
    """

    def __init__(
        self, total: int, initial: int, unit: str, every_seconds: float = 30.0, is_shown: bool = True
    ) -> None:
        self.total, self.unit, self.every_seconds, self.is_shown = total, unit, every_seconds, is_shown
        self.initial, self.done = initial, initial
        self._started = self._last = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=initial, unit=unit, unit_scale=True, dynamic_ncols=True)
            if is_shown and sys.stderr.isatty()
            else None
        )

    def advance(self, amount: int, facts: Callable[[], Mapping[str, float]] = dict) -> None:
        """Count `amount` more; `facts` is asked only when something will be shown."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            if time.monotonic() - self._last > 1:
                self._last = time.monotonic()
                self._bar.set_postfix({key: f"{value:.4g}" for key, value in facts().items()})
        elif not self.is_shown:
            return
        elif time.monotonic() - self._last > self.every_seconds or self.done >= self.total:
            self._last = time.monotonic()
            rate = (self.done - self.initial) / max(self._last - self._started, 1e-9)
            eta = (self.total - self.done) / max(rate, 1e-9)
            shown = "".join(f"  {key} {value:.4g}" for key, value in facts().items())
            self.say(
                f"{self.done:,} / {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
                f"  {rate:.0f} {self.unit}/s  ETA {_duration(eta)}{shown}"
            )

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self.is_shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar where it stands."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
