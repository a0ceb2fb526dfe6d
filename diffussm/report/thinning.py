"""Long curves as short ones that look the same: each stretch keeps its lowest and its highest point."""

import math
from collections.abc import Sequence

MOST_POINTS = 1000


def thin(y: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` points, in order: the first, the last and the envelope of what is left out."""
    if len(y) <= most:
        return list(range(len(y)))
    stretch = math.ceil((len(y) - 2) / ((most - 2) // 2))
    kept = [0]
    for start in range(1, len(y) - 1, stretch):
        part = range(start, min(start + stretch, len(y) - 1))
        kept += sorted({min(part, key=y.__getitem__), max(part, key=y.__getitem__)})
    return [*kept, len(y) - 1]
