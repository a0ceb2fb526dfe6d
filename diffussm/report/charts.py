"""What is drawn of runs, before it is drawn: charts of lines over images, compute and hours."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from diffussm.report import published
from diffussm.report.comparison import fid_series, published_pixels, shared_fids
from diffussm.report.curves import Panel, save_curves
from diffussm.report.run_record import AXES, RunRecord
from diffussm.report.seeds import Siblings, find_siblings
from diffussm.report.thinning import thin

DIGITS = 5  # of numbers in a page: more than a screen can show
QUARTERS = ("0 .. T/4, least noise", "T/4 .. T/2", "T/2 .. 3T/4", "3T/4 .. T, most noise")


@dataclass(frozen=True)
class Line:
    """A curve, at most as long as `thin` leaves it.

    Attributes:
        x: its places on each axis of AXES that is known.
        is_measured: whether its points are few and each worth a mark.
    """

    name: str
    x: Mapping[str, Sequence[float]]
    y: Sequence[float]
    is_measured: bool = False


class Series(NamedTuple):
    """What a run has logged, or what was measured of it, after so many images."""

    name: str
    run: RunRecord
    images: Sequence[int]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines over the same axes.

    Attributes:
        name: of its PNG, unique in a page.
        is_log: whether its y axis is logarithmic to begin with.
    """

    name: str
    title: str
    y_label: str
    lines: Sequence[Line]
    is_log: bool = False

    def content(self) -> dict[str, Any]:
        """As JSON for the page's script."""
        return {
            "name": self.name,
            "title": self.title,
            "yLabel": self.y_label,
            "isLog": self.is_log,
            "lines": [
                {
                    "name": line.name,
                    "x": {axis: [_rounded(x) for x in values] for axis, values in line.x.items()},
                    "y": [_rounded(y) for y in line.y],
                    "isMeasured": line.is_measured,
                }
                for line in self.lines
            ],
        }

    @property
    def summary(self) -> str:
        """What somebody is told who does not see it."""
        ends = (f"{line.name} ends at {line.y[-1]:.4g}" for line in self.lines)
        return f"{self.title}, {self.y_label}: {'; '.join(ends)}."


def comparison_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss of all runs, and each Frechet distance that was measured of them; of several seeds the mean.

    Runs that differ in their seed alone and stand beside no others have a line each.
    """
    found = find_siblings(runs)
    siblings = found if len(found) > 1 else []
    losses = [Series(run.name, run, *run.values("loss")) for run in runs]
    charts = [Chart("loss", "Loss", "loss", list(_over_seeds(losses, siblings)), is_log=True)]
    charts += [_fid_chart(runs, fid, siblings) for fid in shared_fids(runs)]
    return [chart for chart in charts if chart.lines]


def run_charts(run: RunRecord) -> list[Chart]:
    """What a run logged, chart by chart; without those of which it has nothing."""
    terms = [key for key in ("loss", "mse", "vb") if run.values(key)[0]]
    quarters = ((name, run, f"loss_q{i}") for i, name in enumerate(QUARTERS))
    charts = [
        Chart("loss", "Loss", "loss", list(_lines((key, run, key) for key in terms)), is_log=True),
        Chart("timesteps", "Loss by timestep", "loss", list(_lines(quarters)), is_log=True),
        *(_fid_chart([run], fid) for fid in shared_fids([run])),
        Chart("speed", "Throughput", "images/s", list(_lines([("images/s", run, "images_per_second")]))),
        Chart("wait", "Share of time waiting for data", "share", list(_lines([("data wait", run, "data_wait")]))),
        Chart("mfu", "Model FLOP utilisation", "MFU", list(_lines([("MFU", run, "mfu")]))),
        Chart("gradient", "Gradient norm", "norm", list(_lines([("norm", run, "grad_norm")])), is_log=True),
        Chart("rate", "Learning rate", "rate", list(_lines([("rate", run, "learning_rate")]))),
    ]
    return [chart for chart in charts if chart.lines]


def save_chart(chart: Chart, path: Path) -> None:
    """A picture of a chart, a panel for each axis that all its lines know, names at the ends."""
    panels = []
    for axis, label in AXES.items():
        if all(axis in line.x for line in chart.lines):
            curves = {line.name: (torch.tensor(line.x[axis]), torch.tensor(line.y)) for line in chart.lines}
            is_log = chart.is_log and all(y > 0 for line in chart.lines for y in line.y)
            has_points = any(line.is_measured or len(line.y) == 1 for line in chart.lines)
            panels.append(Panel(label, chart.y_label, curves, is_log, has_points=has_points))
    save_curves(panels, path)


def _fid_chart(runs: Sequence[RunRecord], fid: str, siblings: Sequence[Siblings] = ()) -> Chart:
    series = [
        Series(name, run, [point.images for point in points], [point.metrics[fid] for point in points])
        for name, run, points in fid_series(runs, fid)
    ]
    lines = [replace(line, is_measured=True) for line in _over_seeds(series, siblings)]
    if fid == "FID" and published_pixels(runs) == 256:
        seen = [steps * published.STEP_IMAGES for steps in published.CURVE_STEPS]
        lines += [Line(name, {"images": seen}, y, is_measured=True) for name, y in published.CURVES.items()]
    return Chart(fid.replace("/", "-"), fid, fid, lines, is_log=True)


def _over_seeds(series: Sequence[Series], siblings: Sequence[Siblings]) -> Iterator[Line]:
    """A line for each, but for runs that differ in their seed alone the mean, where all have a point.

    Those that have none at all are left out, and those that have none in common get a line each.
    """
    together = {name: group.name for group in siblings if len(group.members) > 1 for name in group.members}
    groups: dict[str | int, list[Series]] = {}
    for place, one in enumerate(series):
        if one.images:
            groups.setdefault(together.get(one.run.name, place), []).append(one)
    for group in groups.values():
        shared, name = _shared_images(group), together.get(group[0].run.name, group[0].name)
        for title, members in [(name, group)] if shared else [(one.name, [one]) for one in group]:
            yield _mean_line(title, members, shared or _shared_images(members))


def _shared_images(group: Sequence[Series]) -> list[int]:
    others = [set(one.images) for one in group[1:]]
    return [seen for seen in group[0].images if all(seen in other for other in others)]


def _mean_line(name: str, group: Sequence[Series], images: Sequence[int]) -> Line:
    known = [dict(zip(one.images, one.y, strict=True)) for one in group]
    y = [fmean(values[seen] for values in known) for seen in images]
    kept = thin(y)
    all_places = [_places(one.run, [images[i] for i in kept]) for one in group]
    places = {
        axis: list(map(fmean, zip(*(each[axis] for each in all_places), strict=True)))
        for axis in AXES
        if all(axis in each for each in all_places)
    }
    title = name if len(group) == 1 else f"{name}, mean of {len(group)}"
    return Line(title, places, [y[i] for i in kept])


def _lines(wanted: Iterable[tuple[str, RunRecord, str]]) -> Iterator[Line]:
    return _over_seeds([Series(name, run, *run.values(key)) for name, run, key in wanted], ())


def _places(run: RunRecord, images: Sequence[int]) -> dict[str, list[float]]:
    places = {axis: [run.at(axis, seen) for seen in images] for axis in AXES}
    return {axis: values for axis, values in places.items() if None not in values}  # type: ignore[misc]


def _rounded(value: float) -> float:
    """In few characters."""
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
