"""Thinned curves: short, in order, and with every spike."""

import itertools
import random

import pytest

from diffussm.report.thinning import thin


def test_a_short_curve_stays_whole():
    assert thin([3.0, 1.0, 2.0], most=3) == [0, 1, 2]


@pytest.mark.parametrize("length", [101, 1000, 26_000])
def test_a_long_curve_keeps_its_ends_and_its_envelope(length):
    draw = random.Random(length)
    y = [draw.random() for _ in range(length)]
    y[length // 3], y[length // 2] = 50.0, -50.0
    kept = thin(y, most=100)
    assert len(kept) <= 100 and kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == length - 1
    assert {length // 3, length // 2} <= set(kept)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps) <= 4 * -(-length // 49)  # nowhere is there nothing
