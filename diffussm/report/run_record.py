"""A run as reports see it: its numbers along the way, what was measured of it, what happened to it. Reads only."""

import bisect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffussm.runtime.run_status import RunReport, read_records, read_report

AXES = {"images": "images seen", "compute": "total Gflops", "hours": "hours of training steps"}
GIGA = 1e9
_STEP = re.compile(r"step-(\d{12})")


@dataclass(frozen=True)
class Costs:
    """On paper, of one image: learned numbers, and multiply-accumulates of a forward pass if they are known."""

    parameters: int
    macs: int | None


@dataclass(frozen=True)
class Measurement:
    """Metrics of one state of a run.

    Attributes:
        images: seen when the weights were as they were measured.
        how: what decides the numbers, in words; those of equal words can be compared.
        metrics: values by name.
        intervals: their 95% confidence intervals, as far as they were asked for.
        of_images: whether the model was measured on real images, and not its samples.
        is_reference: whether it is of real images themselves.
    """

    images: int
    how: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    of_images: bool = False
    is_reference: bool = False

    @property
    def fid(self) -> str | None:
        """The name of the Frechet distance among its metrics, which tells the network: FID is Inception's."""
        return next((name for name in self.metrics if name.startswith("FID") and not name.endswith("_inf")), None)


@dataclass(frozen=True)
class RunRecord:
    """What one run directory tells.

    Args:
        name: what it is called here.
        settings: its configuration, every value by its dotted key; empty if it is not known.
        costs: None where the model is not known.
        measurements: of the run, oldest state first.
        manner: how its configuration would have it measured, in the words of Measurement.how.
        real: the same metrics of real images that its evaluations have held out.
        image_shape: (C, H, W), from its newest checkpoint.
        source: the whole configuration as text.
    """

    path: Path
    name: str
    report: RunReport
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    measurements: Sequence[Measurement]
    manner: str = ""
    real: Sequence[Measurement] = ()
    costs: Costs | None = None
    image_shape: tuple[int, ...] | None = None
    source: str = ""

    @property
    def images(self) -> int:
        """Images seen."""
        return max([self.report.images, *(record["images"] for record in self.records[-1:])])

    @property
    def gflops_per_image(self) -> float | None:
        """In the unit of papers: one multiply-accumulate of a forward pass is one."""
        return self.costs.macs / GIGA if self.costs and self.costs.macs else None

    @cached_property
    def _seen(self) -> list[int]:
        return [record["images"] for record in self.records]

    @cached_property
    def hours(self) -> list[float]:
        """Of training steps up to each record: not what saving, sampling and what was lost took."""
        total, before, spent = 0.0, 0, []
        for record in self.records:
            if speed := record.get("images_per_second"):
                total += (record["images"] - before) / speed / 3600
            before = record["images"]
            spent.append(total)
        return spent

    def at(self, axis: str, images: int) -> float | None:
        """Where on an axis the run was after so many images; None where it is not known."""
        if axis == "images":
            return float(images)
        if axis == "compute":
            return None if self.gflops_per_image is None else images * self.gflops_per_image
        if not self.hours or not self.hours[-1]:
            return None
        seen = self._seen
        after = min(bisect.bisect_left(seen, images), len(seen) - 1)
        start, spent = (seen[after - 1], self.hours[after - 1]) if after else (0, 0.0)
        width = seen[after] - start
        return spent + (self.hours[after] - spent) * (min(images, seen[after]) - start) / width if width else spent

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Images seen and the finite numbers of a key of the records."""
        found = [(record["images"], record[key]) for record in self.records if _is_number(record.get(key))]
        return [images for images, _ in found], [value for _, value in found]

    def last(self, key: str, limit: float = math.inf) -> float | None:
        """The newest value of a key at or before so many images."""
        images, values = self.values(key)
        return next((v for i, v in zip(reversed(images), reversed(values), strict=True) if i <= limit), None)


def read_run(path: Path, name: str, settings: Mapping[str, Any], **known: Any) -> RunRecord:
    """What a run directory holds; RunDirectoryError where there is no run.

    Args:
        settings: the configuration, flat.
        known: further arguments of RunRecord.
    """
    results = [
        *sorted(path.glob("evaluate/*/results.jsonl")),
        path / "results.jsonl",
    ]  # of evaluate -m, of evaluate
    afterwards = [measurement for file in results for measurement in _afterwards(file, settings)]
    found, _ = read_records(path / "metrics.jsonl")
    everything = [record for record in found if isinstance(record["images"], int)]
    by_images = {record["images"]: record for record in everything if "loss" in record}  # the newest counts
    return RunRecord(
        path=path,
        name=name,
        report=read_report(path),
        settings=settings,
        records=[by_images[images] for images in sorted(by_images)],
        events=[record for record in everything if "event" in record],
        measurements=sorted(
            [*_in_training(everything, settings), *(m for m in afterwards if not m.is_reference)],
            key=lambda measurement: measurement.images,
        ),
        manner=_own_manner(settings),
        real=[m for m in afterwards if m.is_reference],
        **known,
    )


def _in_training(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[Measurement]:
    for record in records:
        metrics = record.get("evaluation")
        if isinstance(metrics, Mapping):
            how = f"{_own_manner(settings)}, {_samples(metrics)}"
            yield _measurement(record["images"], how, metrics)


def _own_manner(settings: Mapping[str, Any]) -> str:
    sampler, guidance = (
        {key.removeprefix(group): value for key, value in settings.items() if key.startswith(group)}
        for group in ("sampler.", "guidance.")
    )
    return _manner("ema", sampler, guidance)


def _afterwards(path: Path, settings: Mapping[str, Any]) -> Iterator[Measurement]:
    """What `diffussm evaluate` has written; a line that is damaged, or of a checkpoint elsewhere, is left out."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            answer = json.loads(line)
            request = answer["request"]
            step = _STEP.search(request["checkpoint"]["path"])
            batch_size = settings["trainer.batch_size"]
            if step is None:
                continue
            images = int(step[1]) * batch_size
            if metrics := answer.get("metrics"):
                manner = _manner(request["sampling"]["weights"], request["sampler"], request["guidance"])
                yield _measurement(images, f"{manner}, {_samples(metrics)}", metrics)
            if metrics := answer.get("real_against_real"):
                how = f"real against real, {metrics.get('num_samples'):,} images"
                yield _measurement(images, how, metrics, is_reference=True)
            if metrics := answer.get("image_metrics"):
                count = metrics.get("num_samples")
                how = f"{count:,} real images, {request.get('data', {}).get('split', 'all')}"
                yield _measurement(images, how, metrics, of_images=True)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _measurement(images: int, how: str, metrics: Mapping[str, Any], **kind: bool) -> Measurement:
    numbers = {
        name: value
        for name, value in metrics.items()
        if _is_number(value) and name not in ("num_samples", "images_per_second")
    }
    intervals = metrics.get("intervals")
    return Measurement(images, how, numbers, intervals if isinstance(intervals, Mapping) else {}, **kind)


def _samples(metrics: Mapping[str, Any]) -> str:
    count = metrics.get("num_samples")
    return f"{count:,} samples" if isinstance(count, int) else "samples"


def _manner(weights: str, sampler: Mapping[str, Any], guidance: Mapping[str, Any]) -> str:
    name = sampler.get("scheduler") or str(sampler.get("_target_", "")).rpartition(".")[2]
    scale, kind = guidance.get("scale"), str(guidance.get("_target_", "")).rpartition(".")[2]
    way = "guidance" if kind in ("", "ClassifierFree") else f"{kind.lower()} guidance"
    parts = [weights, f"{name} {sampler.get('num_steps')} steps"]
    if scale is not None:
        parts.append(f"{way} {scale:g}")
    return ", ".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
