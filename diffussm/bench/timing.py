"""Times of several calls that take turns, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Median of the repetitions, and their interquartile range, in seconds."""

    seconds: float
    spread: float
    repetitions: int


def alternate(
    calls: Mapping[str, Callable[[], object]],
    repetitions: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each call up to `repetitions` times, in turns whose order rotates from round to round.

    A call drops out, after one repetition at least, when the next would take it beyond `seconds` in all.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repetitions):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = times[name]
            if taken and sum(taken) + min(taken) > seconds:
                continue
            start = clock()
            calls[name]()
            taken.append(clock() - start)
    return {name: summarize(taken) for name, taken in times.items()}


def summarize(times: list[float]) -> Timing:
    """Median and interquartile range."""
    lower, upper = np.quantile(times, [0.25, 0.75])
    return Timing(statistics.median(times), float(upper - lower), len(times))


def cost_exponent(lengths: list[int], seconds: list[float]) -> float:
    """The p of seconds ~ length^p, by least squares in logarithms; needs two lengths."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
