"""Peaks of known patterns of allocation, measured and predicted."""

import pytest
import torch

from diffussm.bench.memory import measured_peak, predicted_peak

MIB = 2**20
CPU = torch.device("cpu")


def mib(size: float) -> torch.Tensor:
    return torch.empty(int(size * MIB), dtype=torch.uint8)


def eight_then_four():
    first = mib(8)
    del first
    return mib(4)


def eight_and_four():
    first, second = mib(8), mib(4)
    return first, second


PATTERNS = [(eight_then_four, 8), (eight_and_four, 12)]


@pytest.mark.parametrize(("call", "peak"), PATTERNS)
def test_the_measured_peak_is_the_most_that_lived_at_once(call, peak):
    assert measured_peak(call, CPU) == pytest.approx(peak * MIB, abs=1024)


@pytest.mark.parametrize(("call", "peak"), PATTERNS)
def test_the_predicted_peak_is_the_most_that_would_live_at_once(call, peak):
    assert predicted_peak(lambda: call) == peak * MIB


def test_memory_from_before_a_call_does_not_count():
    kept = mib(16)
    assert measured_peak(lambda: (kept, mib(2)), CPU) == pytest.approx(2 * MIB, abs=1024)


def test_a_prediction_uses_no_memory_and_counts_inputs():
    def prepare():
        x = torch.zeros(2**40, dtype=torch.uint8)
        return lambda: x + 1

    assert predicted_peak(prepare) == 2 * 2**40


def test_views_and_results_in_place_count_once():
    def call():
        x = torch.zeros(MIB)
        return x.view(2, -1).T.mul_(2)

    assert predicted_peak(lambda: call) == 4 * MIB


def test_prediction_and_measurement_agree_on_a_training_step():
    layer = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))

    def prepare(device="cpu"):
        x = torch.randn(4096, 256)

        def call():
            layer(x).sum().backward()
            layer.zero_grad()

        return call

    call = prepare()
    call()
    assert predicted_peak(prepare) == pytest.approx(measured_peak(call, CPU) + 4 * MIB, rel=0.15)


def test_measuring_says_nothing_on_stderr(capfd):
    measured_peak(eight_then_four, CPU)
    assert capfd.readouterr().err == ""
