"""Runs beside each other: one table, at equal terms if asked, what differs in their settings, and their curves."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffussm.report import published
from diffussm.report.run_record import AXES, Measurement, RunRecord
from diffussm.report.seeds import over_seeds
from diffussm.report.tables import Cell, Column, Measured, Table, general_text, metric_text

AXIS_OF = {"compute": "compute", "time": "hours", "images": "images"}  # of what can be matched along a run
ROUNDING = 1 + 1e-9
# Which of them a comparison shows, in this order; FID of any network under its own name.
PUBLISHED_METRICS = ("IS", "precision", "recall")
MAIN_METRICS = (*PUBLISHED_METRICS, "class_agreement")
UNLIKE = ("name", "run_dir")  # settings that differ of necessity
SECONDS = 3600
MOST_NAMED = 4  # runs in a sentence


@dataclass(frozen=True)
class Reading:
    """A run at some point of its training.

    Attributes:
        images: seen at that point.
        measurement: the newest until then of the manner that most runs share, if there is one.
        of_images: the newest until then on real images.
    """

    run: RunRecord
    images: float
    measurement: Measurement | None
    of_images: Measurement | None

    @property
    def gflops(self) -> float | None:
        """Total compute until then."""
        per_image = self.run.gflops_per_image
        return None if per_image is None else self.images * per_image

    @property
    def hours(self) -> float | None:
        """Of training steps until then."""
        return self.run.at("hours", int(self.images))


@dataclass(frozen=True)
class Compared:
    """A comparison of runs.

    Attributes:
        terms: at which amounts they are read, in a sentence.
        table: a row for each run, then published ones.
        seeds: means of runs that differ in their seed alone, where there are such.
        pairs: of runs with about as many parameters, where that was asked for.
        differences: settings that are not the same in all runs.
    """

    runs: Sequence[RunRecord]
    terms: str
    table: Table
    seeds: Table | None
    pairs: Table | None
    differences: Table

    @property
    def tables(self) -> list[Table]:
        """All of them."""
        return [table for table in (self.seeds, self.table, self.pairs, self.differences) if table]


def compare(runs: Sequence[RunRecord], match: str | None = None, tolerance: float = 0.05) -> Compared:
    """Runs at their ends, or where all have had the same compute, time or images.

    With match=parameters they are read at their ends, and paired. ValueError, beginning with `match=`, if a run
    does not tell what is to be matched.

    Args:
        match: parameters, a key of AXIS_OF, or None.
        tolerance: by what share of the larger one parameters of a pair may differ.
    """
    limits, terms = _limits(runs, match)
    readings = _read(runs, limits)
    table = _table(readings, terms, with_published=match in (None, "parameters"))
    return Compared(
        runs=runs,
        terms=terms,
        table=table,
        seeds=over_seeds(runs, table),
        pairs=_pairs(readings, tolerance) if match == "parameters" else None,
        differences=differences(runs),
    )


def differences(runs: Sequence[RunRecord]) -> Table:
    """The settings that are not the same in all runs: the fewer of runs and settings as columns."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in UNLIKE)
    rows: list[list[Cell]] = []
    for key in keys:
        values = [_setting(run.settings, key) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    titles = ["key", *(run.name for run in runs)]
    if len(runs) > len(rows):
        titles, *rows = map(list, zip(titles, *rows, strict=True))
        titles[0] = "run"
    columns = [Column(title, is_text=True) for title in titles]
    return Table("differences", "Settings that differ between the runs.", columns, rows)


def shared_fids(runs: Sequence[RunRecord]) -> list[str]:
    """The names of the Frechet distances that were measured of the runs."""
    return list(dict.fromkeys(m.fid for run in runs for m in run.measurements if m.fid is not None))


def fid_series(runs: Sequence[RunRecord], fid: str) -> Iterator[tuple[str, RunRecord, list[Measurement]]]:
    """Names, runs and their measurements of a distance: of several runs in one manner each, of one run in all."""
    for run, common in zip(runs, common_manners(runs), strict=True):
        by_how: dict[str, dict[int, Measurement]] = {}
        for measurement in run.measurements:
            if fid in measurement.metrics and (len(runs) == 1 or measurement.how == common):
                by_how.setdefault(measurement.how, {})[measurement.images] = measurement
        for how, newest in by_how.items():
            yield (how if len(by_how) > 1 else run.name), run, list(newest.values())


def published_pixels(runs: Sequence[RunRecord]) -> int | None:
    """The size of images, if all runs are of ImageNet at one for which there are published figures."""
    sizes = {_imagenet_pixels(run) for run in runs}
    return sizes.pop() if len(sizes) == 1 else None


def _imagenet_pixels(run: RunRecord) -> int | None:
    """Of a run on ImageNet's images, or on latents of an experiment for it, whose reference is ImageNet's."""
    told = [str(run.settings.get(key, "")) for key in ("data._target_", "data.path", "evaluation.reference")]
    is_imagenet = told[0].endswith(".ImageNet") or (
        told[0].endswith(".LatentSet") and any("imagenet" in text.lower() for text in told[1:])
    )
    size = run.image_shape[-1] if run.image_shape else run.settings.get("data.resolution")
    return size if is_imagenet and size in {row.pixels for row in published.ROWS} else None


def _limits(runs: Sequence[RunRecord], match: str | None) -> tuple[list[float], str]:
    """Up to how many images each run is read, and a sentence about it."""
    if match in (None, "parameters"):
        return [float(run.images) for run in runs], "Each run at its end, or as far as it is."
    axis = AXIS_OF[str(match)]
    reached = []
    for run in runs:
        end = run.at(axis, run.images)
        if end is None:
            lacks = (
                "its compute is not known: it has no checkpoint yet" if axis == "compute" else "it has no records"
            )
            raise ValueError(f"match={match}: {run.path}: {lacks}: leave the run out, or choose another match")
        reached.append(end)
    amount = min(reached)
    limits = [_images_at(run, axis, amount) for run in runs]
    terms = f"Each run at {general_text(float(f'{amount:.4g}'))} {AXES[axis]}, the most that all have reached"
    return limits, f"{terms}: its last record and its last measurement until then."


def _images_at(run: RunRecord, axis: str, amount: float) -> float:
    """How many images a run had seen there."""
    if axis == "images":
        return amount
    if axis == "compute":
        return amount / (run.gflops_per_image or 1.0) * ROUNDING
    low, high = 0, run.images
    while low < high:  # hours grow with images
        middle = (low + high + 1) // 2
        low, high = (middle, high) if (run.at(axis, middle) or 0.0) <= amount * ROUNDING else (low, middle - 1)
    return float(low)


def common_manners(runs: Sequence[RunRecord], limits: Sequence[float] | None = None) -> list[str | None]:
    """How each run was measured, of several ways: as most runs were, else as its own configuration asks for.

    Args:
        limits: up to how many images of each run measurements count; None: all of them.
    """
    until = [
        [m.how for m in run.measurements if m.images <= limit and not m.of_images]
        for run, limit in zip(runs, limits or [math.inf] * len(runs), strict=True)
    ]
    shared = Counter(how for found in until for how in set(found))
    chosen: list[str | None] = []
    for run, found in zip(runs, until, strict=True):
        ranks = {how: (shared[how], how.startswith(f"{run.manner}, "), place) for place, how in enumerate(found)}
        chosen.append(max(ranks, key=ranks.__getitem__, default=None))
    return chosen


def _read(runs: Sequence[RunRecord], limits: Sequence[float]) -> list[Reading]:
    readings = []
    for run, limit, how in zip(runs, limits, common_manners(runs, limits), strict=True):
        found = [m for m in run.measurements if m.images <= limit and m.how == how]
        newest = found[-1] if found else None
        real = [m for m in run.measurements if m.images <= limit and m.of_images]
        readings.append(Reading(run, limit, newest, real[-1] if real else None))
    return readings


def _table(readings: Sequence[Reading], terms: str, with_published: bool) -> Table:
    pixels = published_pixels([reading.run for reading in readings]) if with_published else None
    present = dict.fromkeys(name for r in readings if r.measurement for name in r.measurement.metrics)
    if pixels:
        present |= dict.fromkeys(["FID", "sFID", *PUBLISHED_METRICS])
    fids = [name for name in present if name.startswith("FID") and not name.endswith("_inf")]
    spatial = [name for name in present if name.startswith("sFID")]
    metrics = [*fids, *spatial, *(name for name in MAIN_METRICS if name in present)]
    on_images = list(dict.fromkeys(n for r in readings if r.of_images for n in r.of_images.metrics))
    columns = [
        Column("run", is_text=True),
        Column("model", is_text=True),
        Column("parameters"),
        Column("GMAC"),
        Column("images"),
        Column("total Gflops"),
        Column("hours"),
        Column("images/s", lambda value: f"{value:,.0f}"),
        Column("memory GiB", lambda value: f"{value:.2f}"),
        Column("loss"),
        *(Column(name, metric_text) for name in metrics),
        *(Column(f"{name}, real images") for name in on_images),
        Column("measured", is_text=True),
    ]
    rows = [_row(reading, metrics, on_images) for reading in readings]
    for known in published.ROWS if pixels else ():
        if known.pixels == pixels:
            numbers = {"FID": known.fid, "sFID": known.sfid, "IS": known.inception_score,
                       "precision": known.precision, "recall": known.recall}  # fmt: skip
            shown: list[Cell] = [numbers.get(name) for name in [*metrics, *on_images]]
            head: list[Cell] = [known.name, None, None, None, known.images, known.gflops, None, None, None, None]
            rows.append([*head, *shown, published.SOURCE])
    notes = []
    manners = ([r.measurement for r in readings], [r.of_images for r in readings])
    if any(len({one.how for one in measurements if one}) > 1 for measurements in manners):
        notes.append("Not all were measured in the same way: see the last column.")
    later = [
        r.run.name for r in readings if not r.measurement and any(not m.of_images for m in r.run.measurements)
    ]
    if later:
        which = ", ".join(later) if len(later) <= MOST_NAMED else f"{len(later)} of the runs"
        notes.append(
            f"Measured at a later point only: {which}. `diffussm evaluate` measures earlier "
            "checkpoints, as far as they are kept."
        )
    if len({_objective(reading.run.settings) for reading in readings}) > 1:
        notes.append("Objectives differ, so losses cannot be compared.")
    notes.append(
        "GMAC: multiply-accumulates of a forward pass on one image, without the work of state-space models; total "
        "Gflops: these times the images seen, as papers count. Hours: of training steps alone."
    )
    return Table("comparison", terms, columns, rows, notes)


def _row(reading: Reading, metrics: Sequence[str], on_images: Sequence[str]) -> list[Cell]:
    run, measurement, limit = reading.run, reading.measurement, reading.images
    hours, memory = reading.hours, [v for i, v in zip(*run.values("memory_gib"), strict=True) if i <= limit]
    measured: list[Cell] = [cell(measurement, name) for name in metrics]
    measured += [cell(reading.of_images, name) for name in on_images]
    hows = [
        one.how if one.images == run.images else f"{one.how}, at {one.images:,} images"
        for one in (measurement, reading.of_images)
        if one is not None
    ]
    return [
        run.name,
        model_name(run.settings),
        run.costs.parameters if run.costs else None,
        run.gflops_per_image,
        int(limit),
        reading.gflops,
        hours,
        limit / hours / SECONDS if hours else None,
        max(memory, default=None),
        run.last("loss", limit),
        *measured,
        "; ".join(hows) or None,
    ]


def cell(measurement: Measurement | None, name: str) -> Cell:
    """A metric with its interval."""
    if measurement is None or name not in measurement.metrics:
        return None
    low, high = measurement.intervals.get(name) or (None, None)
    return Measured(measurement.metrics[name], low, high)


def model_name(settings: Mapping[str, Any]) -> str | None:
    """The class of the model."""
    return str(settings.get("model._target_", "")).rpartition(".")[2] or None


def _pairs(readings: Sequence[Reading], tolerance: float) -> Table:
    rows: list[list[Cell]] = []
    paired: set[str] = set()
    fids = shared_fids([reading.run for reading in readings])
    for one, other in itertools.combinations(readings, 2):
        if one.run.costs is None or other.run.costs is None:
            continue
        first, second = one.run.costs.parameters, other.run.costs.parameters
        if abs(first - second) > tolerance * max(first, second):
            continue
        paired |= {one.run.name, other.run.name}
        losses = (one.run.last("loss"), other.run.last("loss"))
        changes: list[Cell] = [_difference(*losses)]
        changes += [_difference(_value(one, fid), _value(other, fid)) for fid in fids]
        rows.append([one.run.name, other.run.name, second / first, *changes])
    alone = [reading.run.name for reading in readings if reading.run.name not in paired]
    notes = ["Differences: the second run less the first; below 0 the second is better."]
    if alone:
        notes.append(f"Without a partner: {', '.join(alone)}.")
    columns = [
        Column("run", is_text=True),
        Column("other", is_text=True),
        Column("parameters, ratio"),
        Column("loss, difference"),
        *(Column(f"{fid}, difference", metric_text) for fid in fids),
    ]
    return Table("pairs", f"Pairs whose parameters differ by at most {tolerance:.0%}.", columns, rows, notes)


def _value(reading: Reading, name: str) -> float | None:
    return None if reading.measurement is None else reading.measurement.metrics.get(name)


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _objective(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, str(value)) for key, value in settings.items() if key.startswith(("objective.", "diffusion."))
    )


def _setting(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "absent")
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
