"""Curves as a picture: what is written, what is seen of a fall to zero, and labels that stay apart."""

import matplotlib.figure
import pytest
import torch
from PIL import Image

from diffussm.report.curves import COLORS, LABEL_GAP, Panel, _spread, save_curves

X = torch.linspace(0, 1, 50)
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_the_suffix_decides_the_format(tmp_path, suffix):
    path = tmp_path / "deep" / f"curves{suffix}"
    save_curves([Panel("x", "y", {"square": (X, X**2)})], path)
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def colored_pixels(path, color: str) -> list[tuple[int, int]]:
    """(row, column) of the pixels of exactly this colour."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3)
    return (pixels == torch.tensor(wanted)).all(dim=-1).nonzero().tolist()


def test_every_curve_has_its_colour_in_every_panel(tmp_path):
    curves = {f"to the {power}": (X, 0.1 + X**power) for power in range(1, 6)}
    save_curves([Panel("x", "y", curves), Panel("x", "y", curves, is_log=True)], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        middle = image.width / 2
    for color in COLORS[1:4]:
        columns = [column for _, column in colored_pixels(tmp_path / "curves.png", color)]
        assert min(columns) < middle < max(columns)


def test_on_a_logarithmic_axis_a_zero_falls_out_of_the_picture(tmp_path):
    y = 10.0 ** (-3 * X)
    lowest = []
    for name, end in (("positive", 1e-3), ("zero", 0.0)):
        y[-1] = end
        save_curves([Panel("x", "y", {"": (X, y)}, is_log=True)], tmp_path / f"{name}.png")
        lowest.append(max(row for row, _ in colored_pixels(tmp_path / f"{name}.png", COLORS[0])))
    assert lowest[1] > lowest[0] + 20


def test_names_stand_beside_the_ends_of_the_curves_in_their_order(tmp_path, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    curves = {"high": (X, 2 * X), "low": (X, X), "close": (X, 1.001 * X)}
    save_curves([Panel("x", "y", curves), Panel("x", "y", curves)], tmp_path / "curves.png")
    first, last = figures[0].axes
    assert len(first.texts) == 0
    heights = {text.get_text(): text.get_position()[1] for text in last.texts}
    assert heights["low"] + LABEL_GAP <= heights["close"] + 1e-9 < heights["high"]
    assert [text.get_color() for text in last.texts] == list(COLORS[:3])


def test_labels_that_are_apart_stay_and_those_that_touch_move():
    assert _spread([0.9, 0.1, 0.5]) == [0.9, 0.1, 0.5]
    assert _spread([0.0, 0.0, 0.5]) == [0.0, LABEL_GAP, 0.5]


def test_the_state_that_matplotlib_shares_is_left_alone(tmp_path):
    import matplotlib.pyplot

    before = dict(matplotlib.rcParams)
    save_curves([Panel("x", "y", {"line": (X, X)})], tmp_path / "curves.png")
    assert matplotlib.pyplot.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_points_on_logarithmic_axes_are_marked_if_asked_for_and_coloured_by_the_last_panel(tmp_path, monkeypatch):
    drawn: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    x, few = torch.tensor([256.0, 512.0]), torch.tensor([1.0, 4.0])
    whole = {"first": (x, few), "second": (x, 2 * few)}
    part = {"second": (x[:1], few[:1])}
    ways = {"is_log": True, "has_log_x": True, "has_points": True}
    panels = [Panel("px", "s", part, **ways), Panel("px", "GMAC", whole, **ways)]
    save_curves(panels, tmp_path / "curves.png")
    left, right = drawn[0].axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert left.lines[0].get_color() == right.lines[1].get_color() == COLORS[1]
    assert left.lines[0].get_marker() == "o"
    many = {str(number): (x[:1], few[:1]) for number in range(len(COLORS) + 2)}  # single points, without dashes
    save_curves([Panel("px", "s", many, **ways)], tmp_path / "many.png")
    looks = [(line.get_color(), line.get_marker()) for line in drawn[1].axes[0].lines]
    assert len(set(looks)) == len(looks) == len(many)
