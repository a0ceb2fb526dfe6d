"""Metrics as JSON lines, the truth about a run, and what a person sees of it meanwhile."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffussm.runtime.errors import StorageError
from diffussm.runtime.run_dir import TIME_FORMAT, write_atomically
from diffussm.runtime.run_status import describe_duration
from diffussm.training.relay import Relay


class MetricsLog:
    """`metrics.jsonl`: one record per line, each with the images seen when it was written.

    A record with the key `event` tells what happened to the run; the others are what it measured.

    Args:
        relays: loggers that are told the same from `start` to `close`, after it is written here.
    """

    def __init__(self, path: Path, relays: Sequence[Relay] = ()) -> None:
        self.path, self.relays = path, relays
        self._waiting: list[str] = []

    def start(self, images: int) -> None:
        """Let the loggers begin, for a run that has seen so many images."""
        for relay in self.relays:
            relay.start(images)

    def close(self) -> None:
        """Let the loggers end."""
        for relay in self.relays:
            relay.close()

    def rewind(self, images: int) -> None:
        """Drop what a killed run measured after the checkpoint at `images`, and lines that are no records."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                is_kept = record["images"] <= images or "event" in record  # what happened has happened
            except (ValueError, KeyError, TypeError):
                continue
            if is_kept:
                kept.append(line + b"\n")
        write_atomically(self.path, b"".join(kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, safe from a crash of this process; on a full disk it waits for `settle`."""
        self._waiting.append(json.dumps(dict(record)) + "\n")
        with contextlib.suppress(StorageError):
            self.settle()
        for relay in self.relays:
            relay.write(record)

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

    def add_event(self, name: str, images: int, **facts: Any) -> None:
        """Record what happened to the run."""
        self.write({"images": images, "event": name, "time": time.strftime(TIME_FORMAT), **facts})

    def show(self, images: int, name: str, picture: Path) -> None:
        """Hand a picture that was drawn to the loggers."""
        for relay in self.relays:
            relay.show(images, name, picture)


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

    @property
    def eta_seconds(self) -> float | None:
        """How long the rest takes, at the mean speed so far, whatever the time went into."""
        elapsed, done = time.monotonic() - self._started, self.done - self.initial
        # The last step may go beyond the total.
        return max(self.total - self.done, 0) * elapsed / done if done else None

    def advance(self, amount: int, facts: Callable[[], Mapping[str, str]] = dict) -> None:
        """Count `amount` more; `facts` is asked only when something will be shown."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            if time.monotonic() - self._last > 1:
                self._last = time.monotonic()
                self._bar.set_postfix(facts())
        elif not self.is_shown:
            return
        elif time.monotonic() - self._last > self.every_seconds or self.done >= self.total:
            self._last = time.monotonic()
            shown = "".join(f"  {key} {value}" for key, value in facts().items())
            self.say(
                f"{self.done:,} / {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
                f"  ETA {describe_duration(self.eta_seconds or 0)}{shown}"
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


def headline(record: Mapping[str, Any]) -> dict[str, str]:
    """What a progress line has room for, of a record."""
    formats = {"loss": ".4g", "grad_norm": ".3g", "images_per_second": ",.0f", "mfu": ".0%", "data_wait": ".0%"}
    names = {"grad_norm": "gradient", "images_per_second": "img/s", "mfu": "MFU", "data_wait": "data wait"}
    return {
        names.get(key, key): format(record[key], form).replace("%", " %")
        for key, form in formats.items()
        if record.get(key) is not None
    }
