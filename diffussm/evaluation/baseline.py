"""A baseline: results of several runs that answer one request, as a JSON file that later results are judged by."""

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffussm.evaluation.gate import Spread, name_of
from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.run_dir import write_json

FORMAT = 1
NAMED = 3  # differences in a refusal
# What may differ between results of one baseline: the weights, which are what is compared, the choice of samples,
# the places of files (their hashes may not), and what changes no metric.
MAY_DIFFER = (
    "checkpoint", "samples", "versions", "metrics", "guidance.checkpoint",
    "sampling.seed", "sampling.batch_size",
    "reference.file", "evaluation.reference", "evaluation.extractor.weights",
    "evaluation.every_images", "evaluation.intervals", "evaluation.extrapolate",
)  # fmt: skip


class Baseline:
    """Results of one request, each known by its checkpoint and seed.

    Args:
        key: the configuration key that names the file, for errors.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.request: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []

    @classmethod
    def read(cls, path: Path, key: str) -> "Baseline":
        """ConfigError if there is no such file, DataError if it is no baseline."""
        baseline = cls(path, key)
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise ValueError(f"has format {document['format']}, this version reads {FORMAT}")
            baseline.request, baseline.results = dict(document["request"]), list(document["results"])
            for result in baseline.results:
                result["checkpoint"], result["seed"]
                _ = {title: float(value) for title, value in result["metrics"].items()}
            if not baseline.results:
                raise ValueError("holds no results")
        except FileNotFoundError:
            problem = "no such file: results are added to a new one by gate.add_to"
            raise ConfigError(f"{key}={path}: {problem}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DataError(f"{key}={path}: no baseline: {error!r}: make it anew with gate.add_to") from error
        return baseline

    def refuse_other(self, request: Mapping[str, Any]) -> None:
        """ConfigError, naming what differs, for a request whose results are not to be compared with these."""
        theirs, ours = _essence(self.request), _essence(request)
        differing = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
        if differing:
            shown = [
                f"{key}={_show(theirs.get(key))} there and {_show(ours.get(key))} here"
                for key in differing[:NAMED]
            ]
            more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
            raise ConfigError(
                f"{self.key}={self.path}: answers another request: {', '.join(shown)}{more}: "
                "ask for the same, or make a baseline of this"
            )

    def spreads(self, names: Collection[str]) -> dict[str, Spread]:
        """Of those metrics, by title, whose `name_of` is among `names` and which all results have."""
        titles = [title for title in self.results[0]["metrics"] if name_of(title) in names]
        return {
            title: Spread.of([float(result["metrics"][title]) for result in self.results])
            for title in titles
            if all(title in result["metrics"] for result in self.results)
        }

    def add(self, request: Mapping[str, Any], metrics: Mapping[str, float]) -> int:
        """Add a result, in the place of an earlier one of its checkpoint and seed; returns how many there are."""
        identity = {
            "checkpoint": request.get("checkpoint", request.get("samples", {})).get("sha256"),
            "seed": request.get("sampling", {}).get("seed"),
        }
        with _alone(self.path.parent):  # with others who add to it
            if self.path.exists():
                now = Baseline.read(self.path, self.key)
                now.refuse_other(request)
                self.request, self.results = now.request, now.results
            else:
                self.request = {
                    key: value for key, value in request.items() if key not in ("checkpoint", "samples")
                }
            others = [result for result in self.results if {key: result[key] for key in identity} != identity]
            self.results = [*others, {**identity, "metrics": dict(metrics)}]
            write_json(self.path, {"format": FORMAT, "request": self.request, "results": self.results})
        return len(self.results)


def _essence(request: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a request that decide what its results mean, by dotted key."""
    leaves = dict(_leaves(json.loads(json.dumps(request)), ""))
    return {
        key: value
        for key, value in leaves.items()
        if not any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)
    }


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _show(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the lock of a directory, which leaves no file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
