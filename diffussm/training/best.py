"""The checkpoint with the best evaluation of a run, kept where no newer one takes its place."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffussm.runtime.errors import StorageError
from diffussm.runtime.run_dir import sync_directory, write_json
from diffussm.training.checkpoint import BEST

EVALUATION, CANDIDATE = "evaluation.json", "candidate.json"


class BestCheckpoint:
    """`best/step-...` of a run: a checkpoint's files, by hard links, and the evaluation that it is kept for.

    The best has the least first number: Frechet distances come first. An evaluation may come before the checkpoint
    of its step: it is noted as the candidate until that is there, also through a kill.

    Args:
        checkpoints: where checkpoints are published; `best` lies beside it.
        warn: told when it cannot be kept, which costs the run nothing else.
    """

    def __init__(self, checkpoints: Path, warn: Callable[[str], None] = print) -> None:
        self.checkpoints, self.root, self.warn = checkpoints, checkpoints.parent / BEST, warn

    def offer(self, step: int, result: Mapping[str, Any]) -> bool:
        """Whether this evaluation, of the weights at `step`, is better than the best; it is then the candidate."""
        metric, value = next(iter(result.items()))
        best = self._read(*self.root.glob(f"step-*/{EVALUATION}"))
        is_better = math.isfinite(value) and (best is None or best["metric"] != metric or value < best["value"])
        if is_better:
            with self._going_on():
                write_json(self.root / CANDIDATE, {"step": step, "metric": metric, "value": value})
        return is_better

    def keep(self) -> None:
        """Let the candidate's checkpoint, if it has been published, take the place of the best."""
        candidate = self._read(self.root / CANDIDATE)
        if candidate is None:
            return
        name = f"step-{candidate['step']:012d}"
        temporary, path = self.root / f".tmp-{name}", self.root / name
        if not (self.checkpoints / name).exists():
            return
        with self._going_on():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(self.checkpoints / name, temporary, copy_function=_link)
            write_json(temporary / EVALUATION, candidate)
            sync_directory(temporary)
            if path.exists():  # from before the run was continued from an earlier checkpoint
                shutil.rmtree(path)
            temporary.rename(path)
            sync_directory(self.root)
            for other in self.root.glob("step-*"):
                if other != path:
                    shutil.rmtree(other)
            (self.root / CANDIDATE).unlink()

    @contextlib.contextmanager
    def _going_on(self) -> Any:
        try:
            yield
        except (OSError, StorageError) as error:
            self.warn(f"going on without keeping the best checkpoint: {error}")

    def _read(self, *paths: Path) -> dict[str, Any] | None:
        """The first evaluation that is there and whole."""
        for path in paths:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(path.read_bytes())
                return {"step": int(found["step"]), "metric": str(found["metric"]), "value": float(found["value"])}
        return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
