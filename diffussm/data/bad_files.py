"""The images of a data set that cannot be read: listed once each, and too many of them end the run."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diffussm.runtime.errors import BadImage, DataError, StorageError, note
from diffussm.runtime.run_dir import write_atomically

MAX_NAMED = 3
MAX_NOTES = 10


class BadFiles:
    """`bad_files.jsonl`: {"file": name, "reason": text} per bad image, also across the restarts of a run.

    Args:
        path: the file, made at the first bad image; None keeps the list in memory alone.
        num_images: size of the data set.
        max_fraction: share of it that may be bad.
        warn: is told of the first ones.
    """

    def __init__(
        self, path: Path | None, num_images: int, max_fraction: float, warn: Callable[[str], None] = note
    ) -> None:
        self.path, self.num_images, self.max_fraction, self.warn = path, num_images, max_fraction, warn
        self._reasons: dict[str, str] | None = None

    @property
    def reasons(self) -> dict[str, str]:
        """Why each could not be read, by name, in the order of their discovery."""
        if self._reasons is None:
            self._reasons = _read(self.path) if self.path is not None and self.path.exists() else {}
        return self._reasons

    def add(self, found: Iterable[BadImage]) -> None:
        """List what is not listed yet. DataError if there are too many."""
        met = {bad.name: bad.reason for bad in found}
        for name, reason in met.items():
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            if self.path is not None:
                _append(self.path, name, reason)
            if len(self.reasons) <= MAX_NOTES:
                more = "; further ones are only listed" if len(self.reasons) == MAX_NOTES and self.path else ""
                self.warn(f"{name}: not a readable image ({reason}): left out{more}")
        if met and self.are_too_many(len(self.reasons)):
            raise self._error()

    def are_too_many(self, count: int) -> bool:
        """Whether the data set is no good with so many bad images: above the share, or all of them."""
        return count > self.max_fraction * self.num_images or count >= self.num_images

    def _error(self) -> DataError:
        named = [f"{name}: not a readable image ({why})" for name, why in list(self.reasons.items())[:MAX_NAMED]]
        rest = len(self.reasons) - len(named)
        listed = f"; {rest:,} more" + (f" in {self.path}" if self.path else "") if rest else ""
        remove = f"remove {self.path}" if self.path else "try again"
        allowed = self.max_fraction * self.num_images
        exceeds = (
            f", more than data.max_bad_fraction={self.max_fraction:g} allows"
            if allowed < len(self.reasons)
            else ""
        )
        return DataError(
            f"{len(self.reasons):,} of {self.num_images:,} images cannot be read{exceeds} "
            f"({'; '.join(named)}{listed}): mend the data and {remove}, or raise data.max_bad_fraction"
        )


def listing(reasons: Mapping[str, str]) -> bytes:
    """The content of a `bad_files.jsonl`."""
    return "".join(_line(name, reason) for name, reason in reasons.items()).encode()


def _read(path: Path) -> dict[str, str]:
    """The list; half a last line, which a crash has left, is dropped."""
    reasons, complete = {}, True
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
            reasons[str(record["file"])] = str(record["reason"])
            complete &= line.endswith("\n")
        except (ValueError, KeyError, TypeError):
            complete = False
    if not complete:
        write_atomically(path, listing(reasons))
    return reasons


def _append(path: Path, name: str, reason: str) -> None:
    try:
        with path.open("a") as file:
            file.write(_line(name, reason))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}: free some space") from error


def _line(name: str, reason: str) -> str:
    return json.dumps({"file": name, "reason": reason}) + "\n"
