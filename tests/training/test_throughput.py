"""Speed as operations per second: the table of devices, and what a step costs."""

import pytest
import torch

from diffussm.build import complexity_of, training_flops_of
from diffussm.compose import compose_group
from diffussm.training.throughput import Throughput, device_peak, find_peak, peak_memory_gib
from diffussm.training.window import MetricsWindow


@pytest.mark.parametrize(
    ("name", "precision", "uses_tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA A10", "bf16", False, 125),
        ("NVIDIA H100 80GB HBM3", "fp16", False, 989),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200", "bf16", False, 989),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
    ],
)
def test_peaks_of_known_devices(name, precision, uses_tf32, tflops):
    assert find_peak(name, precision, uses_tf32) == pytest.approx(1e12 * tflops)


def test_other_devices_have_none():
    assert find_peak("NVIDIA GeForce GTX 1080", "bf16", True) is None
    assert device_peak(torch.device("cpu"), "bf16", tf32=True) is None


def test_utilisation_is_the_share_of_all_devices():
    throughput = Throughput(lambda: 10**12, peak=312e12, num_devices=2)
    assert throughput.record(312.0) == {"tflops_per_second": 156.0, "mfu": 0.5}
    assert throughput.record(None) == {"tflops_per_second": None, "mfu": None}


def test_where_no_peak_is_known_nothing_is_measured():
    def never() -> int:
        raise AssertionError

    assert Throughput(never, None, 1).record(5.0) == {"tflops_per_second": None, "mfu": None}


def test_training_takes_three_forward_passes_and_four_when_recomputing():
    model = compose_group("model", "diffussm_tiny", {"in_channels": 1})
    cost = complexity_of(model, (1, 8, 8))
    assert training_flops_of(model, (1, 8, 8)) == 3 * (2 * cost.macs + cost.ssm_flops)
    model = compose_group("model", "diffussm_tiny", {"in_channels": 1, "activation_checkpointing": True})
    assert training_flops_of(model, (1, 8, 8)) == 4 * (2 * cost.macs + cost.ssm_flops)


def test_memory_is_that_of_this_process():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 1000


def test_waiting_for_data_is_a_share_of_the_time_and_survives_a_restart():
    window = MetricsWindow(1000, torch.device("cpu"))
    assert window.summary()["data_wait"] is None
    window.seconds, window.num_images = 2.0, 10
    window.add_wait(0.3)
    window.add_wait(0.2)
    again = MetricsWindow(1000, torch.device("cpu"))
    again.load(window.state())
    assert again.summary()["data_wait"] == pytest.approx(0.25) and again.images_per_second == 5.0
