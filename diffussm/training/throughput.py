"""How hard a device works: floating-point operations of training, and what the device could do at best."""

import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dense TFLOP/s with bf16 or fp16, TF32, and plain fp32, as NVIDIA's data sheets state them; None: not in hardware.
# The first pattern that is found in the device's name counts.
PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    (r"\bGH200\b|\bH200\b", 989, 495, 67),
    (r"\bH100 PCIe\b", 756, 378, 51),
    (r"\bH100\b", 989, 495, 67),
    (r"\bA100\b", 312, 156, 19.5),
    (r"\bL40S\b", 362, 183, 91.6),
    (r"\bA40\b", 150, 75, 37.4),
    (r"\bA10\b", 125, 62.5, 31.2),
    (r"\bL4\b", 121, 60, 30.3),
    (r"\bV100\b", 125, None, 15.7),
    (r"\bRTX 4090\b", 165.2, 82.6, 82.6),  # sums in fp32
    (r"\bRTX 3090\b", 71, 35.6, 35.6),
)
# A backward pass is two forward passes' work: gradients of the inputs and of the weights.
PASSES, PASSES_WHEN_RECOMPUTING = 3, 4


def find_peak(device_name: str, precision: str, uses_tf32: bool) -> float | None:
    """The most floating-point operations that a device does in a second; None for one that is not known."""
    for pattern, half, tf32, full in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            tflops = half if precision != "fp32" else tf32 if uses_tf32 and tf32 else full
            return 1e12 * tflops
    return None


def device_peak(device: torch.device, precision: str, tf32: bool) -> float | None:
    """`find_peak` of a device that is here; None for a CPU."""
    if device.type != "cuda":
        return None
    return find_peak(torch.cuda.get_device_name(device), precision, tf32)


def training_flops(forward_flops: int, is_recomputing: bool) -> int:
    """Operations of a training step on an image whose forward pass takes so many."""
    return forward_flops * (PASSES_WHEN_RECOMPUTING if is_recomputing else PASSES)


@dataclass(frozen=True)
class Throughput:
    """Images per second as operations per second of each device, and as a share of its peak (MFU).

    Args:
        flops_per_image: of training on one image; asked only where it is needed.
        peak: operations per second of a device at best; None where it is not known.
        num_devices: that share the work.
    """

    flops_per_image: Callable[[], int]
    peak: float | None
    num_devices: int

    def record(self, images_per_second: float | None) -> dict[str, float | None]:
        """tflops_per_second of one device, and mfu; null where they mean nothing."""
        if self.peak is None or images_per_second is None:
            return {"tflops_per_second": None, "mfu": None}
        flops = images_per_second * self.flops_per_image() / self.num_devices
        return {"tflops_per_second": flops / 1e12, "mfu": flops / self.peak}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory of the GPU that tensors have taken, or of the machine that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
