"""The run directory: one writer at a time, files that are whole or absent, and the state of the run.

config.yaml   metrics.jsonl   status.json   results.json   checkpoints/step-.../   samples/*.png
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from diffussm.runtime.errors import RunDirectoryError, StorageError


class RunDirectory:
    """A directory that this process alone writes to, from `open` to `close` or its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are published."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where pictures go."""
        return self.path / "samples"

    def check(self) -> None:
        """Refuse, before anything is created, a path that cannot become a run directory."""
        for part in (self.path, *self.path.parents):
            if part.exists():
                if not part.is_dir():
                    raise RunDirectoryError(
                        f"run_dir={self.path}: {part} is a file: choose another run_dir or name"
                    )
                if not os.access(part, os.W_OK | os.X_OK):
                    raise RunDirectoryError(f"run_dir={self.path}: {part} is not writable: choose another run_dir")
                break
        if (self.path / ".lock").exists():
            self._take_lock().close()

    def open(self) -> None:
        """Create the directory and take its lock; refuse if another process holds it."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()

    def _take_lock(self) -> BinaryIO:
        lock = (self.path / ".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RunDirectoryError(
                f"run_dir={self.path}: another process is using it: wait for it, or choose another name"
            ) from None
        return lock

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_status(self) -> dict[str, Any] | None:
        """The last status written, None in a directory without a run."""
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            raise RunDirectoryError(f"{path}: damaged: delete it; the checkpoints say where the run is") from None

    def write_status(self, state: str, **facts: Any) -> None:
        """Record running, finished, preempted or failed, with facts such as images, exit_code, message."""
        record = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), **facts}
        write_json(self.path / "status.json", record)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, and a crash, see either the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_and_sync(temporary, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error.strerror or error}: free space, or choose another place") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_atomically` for a JSON document."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


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
