"""Curves, panel beside panel, as one picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diffussm.runtime.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
# Told apart by people who see colours differently (Okabe and Ito), without their yellow, too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # and in print without colours
MARKERS = ("o", "s", "^")  # and where colours come round again
LABEL_GAP = 0.065  # between neighbouring labels, in heights of the panel


@dataclass(frozen=True)
class Panel:
    """One pair of axes with a curve for each name; on a logarithmic y axis a zero is a fall out of the picture.

    Names are coloured by their order in the last panel, which has them all. Of few points, each is marked.
    """

    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Tensor, Tensor]]
    is_log: bool = False
    has_log_x: bool = False
    has_points: bool = False  # whether what was measured is marked


def save_curves(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels as PNG, SVG or PDF, by the suffix; names stand at the ends of the last panel's curves."""
    from matplotlib.figure import Figure  # here, so that only who draws waits for it

    figure = Figure(figsize=(5.0 * len(panels) + 1.0, 4.2), layout="constrained")
    names = list(panels[-1].curves)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _draw(panel, axes, names)
    _label_ends(panels[-1], axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=160)
    write_atomically(path, buffer.getvalue())


def _draw(panel: Panel, axes: "Axes", names: Sequence[str]) -> None:
    if panel.is_log:
        positive = [float(v) for _, y in panel.curves.values() for v in (y[y > 0].min(), y.max())]
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(positive) / 3, max(positive) * 3)
    if panel.has_log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    for name, (x, y) in panel.curves.items():
        i = names.index(name)
        marker = MARKERS[i // len(COLORS) % len(MARKERS)] if panel.has_points else None
        axes.plot(
            x, y, color=_color(i), linestyle=DASHES[i % len(DASHES)], linewidth=2, marker=marker, markersize=4
        )
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.margins(x=0.01)
    axes.autoscale_view()  # now rather than when it is drawn, for the labels are placed by the limits
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_ends(panel: Panel, axes: "Axes") -> None:
    """Each name in its curve's colour beside the curve's end, moved as far as keeps neighbours apart."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((float(x[-1]), float(y[-1]))) for x, y in panel.curves.values()]
    heights = [min(max(float(end[1]), 0.0), 1.0) for end in ends]
    places = _spread(heights)
    for i, name in enumerate(panel.curves):
        axes.annotate(
            name,
            xy=(float(ends[i][0]), heights[i]),
            xytext=(1.05, places[i]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            verticalalignment="center",
            color=_color(i),
            arrowprops={
                "arrowstyle": "-",
                "color": _color(i),
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),  # from before the name, not from its middle through the others
            },
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """The same heights in the same order, raised until they are LABEL_GAP apart."""
    places = list(heights)
    floor = -1.0
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        places[i] = max(heights[i], floor)
        floor = places[i] + LABEL_GAP
    return places


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]
