"""Repetitions take turns, stop in time, and are summarised by median and quartiles."""

import pytest

from diffussm.bench.timing import alternate, cost_exponent, summarize


class Clock:
    """Stands still until a call takes its time."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        times = iter(seconds)

        def call():
            self.calls.append(name)
            self.now += next(times)

        return call


def test_calls_take_turns_and_another_begins_each_round():
    clock = Clock()
    alternate({name: clock.takes(name, *[1.0] * 3) for name in "abc"}, 3, 100, clock)
    assert "".join(clock.calls) == "abcbcacab"


def test_a_timing_is_median_and_interquartile_range():
    clock = Clock()
    timing = alternate({"a": clock.takes("a", 1.0, 5.0, 2.0, 100.0, 3.0)}, 5, 1000, clock)["a"]
    assert (timing.seconds, timing.spread, timing.repetitions) == (3.0, 3.0, 5)
    assert summarize([7.0]).spread == 0


def test_a_slow_call_is_timed_once_and_the_others_go_on():
    clock = Clock()
    timings = alternate({"slow": clock.takes("slow", 50.0), "fast": clock.takes("fast", *[1.0] * 5)}, 5, 10, clock)
    assert (timings["slow"].repetitions, timings["fast"].repetitions) == (1, 5)


def test_repetitions_end_where_the_next_would_exceed_the_budget():
    clock = Clock()
    assert alternate({"a": clock.takes("a", *[3.0] * 9)}, 9, 10, clock)["a"].repetitions == 3


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_the_exponent_of_a_power_law_is_found(power):
    lengths = [1024, 4096, 16384]
    assert cost_exponent(lengths, [3e-6 * length**power for length in lengths]) == pytest.approx(power)
