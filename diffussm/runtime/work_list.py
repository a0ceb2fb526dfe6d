"""Work on ranges of indices: finished one by one, on any number of processes, through any number of interruptions.

A range is finished when its file is there, and files appear whole or not at all. So what is missing is the work
list, whoever left it: a kill costs each process the range that it was at, and nothing is done twice.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from diffussm.runtime.distributed import Processes, Undertaking
from diffussm.runtime.errors import RunDirectoryError
from diffussm.runtime.run_dir import OwnedDirectory, write_json

DESCRIPTION = "work.json"
RANGE_SIZE = 256

Tell = Callable[[int], object]  # is told how many indices more are done


class WorkList:
    """The indices 0..count-1 in ranges of a fixed size, and a directory with a file for each that is finished.

    Args:
        path: the directory, there from `open` to `remove`.
        range_size: how many indices are finished at once; work that was begun keeps the size it was begun with.
        suffix: of the files.
        key: the configuration key that the path comes from, for errors.
    """

    def __init__(self, path: Path, count: int, range_size: int, suffix: str, key: str = "out") -> None:
        if range_size < 1:
            raise ValueError(f"range_size={range_size}: must be at least 1")
        self.path, self.count, self.range_size, self.suffix = path, count, range_size, suffix
        self._directory = OwnedDirectory(path, key, key)

    def __len__(self) -> int:
        return -(-self.count // self.range_size)

    def indices(self, number: int) -> range:
        """The indices of a range."""
        return range(number * self.range_size, min((number + 1) * self.range_size, self.count))

    def file(self, number: int) -> Path:
        """Where the result of a range is, or will be."""
        return self.path / f"{number:06d}{self.suffix}"

    def missing(self) -> list[int]:
        """The ranges that are not finished."""
        return [number for number in range(len(self)) if not self.file(number).exists()]

    def open(self, identity: str, processes: Processes) -> None:
        """Take the directory for all processes of a job; RunDirectoryError if another job has it.

        Results of work with another identity, which decides what is in them, are thrown away.
        """
        self.range_size = processes.on_first(lambda: self._take(identity))

    def work_off(
        self,
        finish: Callable[[int, Tell], object],
        undertaking: Undertaking,
        advance: Tell = lambda done: None,
    ) -> int:
        """Finish what is missing, each range in one of the processes; returns how many indices this took.

        Raises Interrupted, in all processes, if one is asked to stop before the end.

        Args:
            finish: makes the file of a range, and tells of its progress.
            advance: called in the first process with the number of indices that all have finished since `open`.
        """
        processes = undertaking.processes
        missing = processes.on_first(self.missing)

        def tell(done: int) -> None:
            total = processes.add(f"{undertaking.name} indices", done)
            if processes.is_first:
                advance(total)

        while (turn := processes.add(f"{undertaking.name} ranges", 1) - 1) < len(missing):
            undertaking.check()
            finish(missing[turn], tell)
        undertaking.finish()
        assert not processes.on_first(self.missing), "a range was not finished"
        return sum(len(self.indices(number)) for number in missing)

    def close(self) -> None:
        """Give the directory back, with what is finished; without effect in all processes but the first."""
        self._directory.close()

    def remove(self) -> None:
        """Delete the directory; without effect in all processes but the first."""
        if self._directory.is_open:
            shutil.rmtree(self.path)
            self.close()

    def _take(self, identity: str) -> int:
        described, ours = self.path / DESCRIPTION, {".lock", f".{DESCRIPTION}.tmp"}
        if self.path.is_dir() and not described.exists() and {file.name for file in self.path.iterdir()} - ours:
            raise RunDirectoryError(f"{self._directory.key}: {self.path} exists and is not ours: move it away")
        self._directory.open()
        wanted = {"identity": identity, "count": self.count}
        try:
            there = json.loads(described.read_bytes())
            if {key: there[key] for key in wanted} == wanted and there["range_size"] >= 1:
                return int(there["range_size"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for file in self.path.iterdir():
            if file.name not in (".lock", DESCRIPTION):
                file.unlink()
        write_json(described, {**wanted, "range_size": self.range_size})
        return self.range_size
