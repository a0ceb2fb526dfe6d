"""The run directory: one writer at a time, files that are whole or absent, and the state of the run.

config.yaml   metrics.jsonl   status.json   results.json   checkpoints/step-.../   samples/*.png
ema_snapshots/step-.../   best/step-.../   evaluation/ (one that is under way)
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from diffussm.runtime.errors import RunDirectoryError, StorageError

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


class OwnedDirectory:
    """A directory that this process alone writes to, from `open` to `close` or its end.

    Args:
        key: the configuration key that names it, for errors.
        remedy: what a person may choose instead.
    """

    def __init__(self, path: Path, key: str, remedy: str) -> None:
        self.path, self.key, self.remedy = path, key, remedy
        self._lock: BinaryIO | None = None

    def check(self) -> None:
        """Refuse, before anything is created, a path that cannot become such a directory."""
        refuse_unwritable(self.path, f"{self.key}={self.path}", self.remedy)
        if (self.path / ".lock").exists():
            self._take_lock().close()

    def open(self) -> None:
        """Create the directory and take its lock; refuse if another process holds it."""
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(f"{error.strerror}: choose another {self.remedy}") from error
        self._lock = self._take_lock()
        # A child would hold the lock too, and some seconds longer than this process if that is killed.
        close = weakref.WeakMethod(self.close)
        os.register_at_fork(after_in_child=lambda: (alive := close()) and alive())

    def _take_lock(self) -> BinaryIO:
        lock = (self.path / ".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise self._error(
                f"another process is using it: wait for it, or choose another {self.remedy}"
            ) from None
        return lock

    def _error(self, problem: str) -> RunDirectoryError:
        return RunDirectoryError(f"{self.key}={self.path}: {problem}")

    @property
    def is_open(self) -> bool:
        """Whether this process holds it."""
        return self._lock is not None

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class RunDirectory(OwnedDirectory):
    """Where a run of training lives."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "run_dir", "run_dir or name")

    def open(self) -> None:
        """As of any such directory; and clear away what a process that was killed has left of its status."""
        super().open()
        for left in self.path.glob(".status.json.*.tmp"):
            left.unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are published."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where pictures go."""
        return self.path / "samples"

    def read_status(self) -> dict[str, Any] | None:
        """The last status written, None in a directory without a run."""
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            status = json.loads(path.read_text())
            if not (isinstance(status, dict) and "state" in status):
                raise ValueError("no status")
            return status
        except ValueError:
            raise RunDirectoryError(f"{path}: damaged: delete it; the checkpoints say where the run is") from None

    def write_status(self, state: str, **facts: Any) -> None:
        """Record running, finished, preempted or failed, with facts such as images, exit_code, message.

        What was recorded before stays, apart from how the run ended.
        """
        known: dict[str, Any] = {}
        with contextlib.suppress(RunDirectoryError):
            known = self.read_status() or {}
        kept = {key: value for key, value in known.items() if key not in ("exit_code", "message", "doing")}
        here = {"updated": time.strftime(TIME_FORMAT), "pid": os.getpid(), "host": socket.gethostname()}
        content = json.dumps({**kept, "state": state, **here, **facts}, indent=2, allow_nan=False) + "\n"
        # Any process of a job may tell how it ended, while the first tells how it goes on.
        with atomic_file(self.path / "status.json", mark=f".{here['host']}.{os.getpid()}") as file:
            file.write(content.encode())


def refuse_unwritable(path: Path, setting: str, remedy: str) -> None:
    """RunDirectoryError, which says `setting`, where no directory `path` is or could be made to write to."""
    for part in (path, *path.parents):
        try:
            leads_nowhere = part.is_symlink() and not part.exists()
        except OSError as error:
            raise RunDirectoryError(f"{setting}: {error.strerror}: choose another {remedy}") from error
        if leads_nowhere:
            raise RunDirectoryError(f"{setting}: {part} is a link to nowhere: choose another {remedy}")
        if part.exists():
            if not part.is_dir():
                raise RunDirectoryError(f"{setting}: {part} is a file: choose another {remedy}")
            if not os.access(part, os.W_OK | os.X_OK):
                raise RunDirectoryError(f"{setting}: {part} is not writable: choose another {remedy}")
            break


@contextlib.contextmanager
def atomic_file(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A file to write and read back, which appears at `path`, safe on the disk, if the block ends without error.

    A reader, and a crash, see either the old content or all of the new. An OSError in the block is taken for one
    of writing, and becomes a StorageError.

    Args:
        mark: tells writers apart where there may be several.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            problem = error.strerror or error
            raise StorageError(f"{path}: {problem}: free space, or choose another place") from error
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, and a crash, see either the old content or all of the new."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_atomically` for a JSON document."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, and nothing to what a kill has left of the line before."""
    with path.open("a+b") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        is_whole = file.read(1) in (b"", b"\n")
        file.write(b"" if is_whole else b"\n")
        file.write(f"{line}\n".encode())


def write_and_sync(path: Path, content: bytes) -> None:
    """Write through our own file object, so that a full disk is an OSError, and force it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
