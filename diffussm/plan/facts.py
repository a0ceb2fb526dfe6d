"""Facts of others that a plan rests on, each with its source: GPUs, raw data sets, published trainings."""

import re
from dataclasses import dataclass

from diffussm.training.throughput import find_peak

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class GPU:
    """A device of NVIDIA, as its data sheet states it; its peak follows from `title` by `find_peak`."""

    title: str
    memory_gib: int
    watts: int
    has_bf16: bool = True

    def peak(self, precision: str, tf32: bool) -> float:
        """The most floating-point operations in a second."""
        found = find_peak(self.title, precision, tf32)
        assert found is not None, self.title
        return found


GPUS = {
    "a100": GPU("A100 SXM 80 GB", 80, 400),
    "a100_40": GPU("A100 SXM 40 GB", 40, 400),
    "h100": GPU("H100 SXM", 80, 700),
    "h100_pcie": GPU("H100 PCIe", 80, 350),
    "h200": GPU("H200 SXM", 141, 700),
    "l40s": GPU("L40S", 48, 350),
    "a40": GPU("A40", 48, 300),
    "a10": GPU("A10", 24, 150),
    "l4": GPU("L4", 24, 72),
    "v100": GPU("V100 SXM2 32 GB", 32, 300, has_bf16=False),
    "v100_16": GPU("V100 SXM2 16 GB", 16, 300, has_bf16=False),
    "rtx4090": GPU("RTX 4090", 24, 450),
    "rtx3090": GPU("RTX 3090", 24, 350),
}


@dataclass(frozen=True)
class Archive:
    """A data set as it is distributed. `pattern` is how names of its directories look."""

    title: str
    pattern: str
    num_images: int
    num_bytes: int
    source: str


IMAGENET = "image-net.org, ILSVRC2012: 138 GiB to train, 6.3 GiB to validate"
LSUN = "TensorFlow Datasets' catalogue, lsun"
ARCHIVES = {
    "imagenet": Archive("ImageNet-1k", "imagenet", 1_281_167, round(144.3 * GIB), IMAGENET),
    "lsun_bedroom": Archive("LSUN Bedroom", "bedroom", 3_033_042, round(42.77 * GIB), LSUN),
    "lsun_church": Archive("LSUN Church", "church", 126_227, round(2.29 * GIB), LSUN),
}


@dataclass(frozen=True)
class Training:
    """What a paper says of a training: images seen, and Gflops in all, a multiply-accumulate as one.

    `network` is the class, width, depth and patch of the model, trained on images of `pixels`.
    """

    network: tuple[str, int, int, int]
    pixels: int
    num_images: int
    gflops: float
    source: str
    remark: str


DIFFUSSM_TABLE = "DiffuSSM's paper, table 1"
DIT_REMARK = "the same network: the rest is rounding"
DIFFUSSM_REMARK = (
    "the paper leaves parts of its block open, and no one network fits both of its totals: per image they grow "
    "3.80 times from 256 to 512 px, where every operation grows 4 times or more"
)
TRAININGS = (
    Training(("DiffuSSM", 1152, 29, 1), 256, 660_000_000, 1.85e11, DIFFUSSM_TABLE, DIFFUSSM_REMARK),
    Training(("DiffuSSM", 1152, 29, 1), 512, 302_000_000, 3.22e11, DIFFUSSM_TABLE, DIFFUSSM_REMARK),
    Training(("DiT", 1152, 28, 2), 256, 1_792_000_000, 2.13e11, DIFFUSSM_TABLE, DIT_REMARK),
    Training(("DiT", 1152, 28, 2), 512, 768_000_000, 4.03e11, DIFFUSSM_TABLE, DIT_REMARK),
)


def find_archive(name: str) -> Archive | None:
    """The archive that a directory or class is called after."""
    return next(
        (archive for archive in ARCHIVES.values() if re.search(archive.pattern, name, re.IGNORECASE)), None
    )


def find_training(network: tuple[str, int, int, int], pixels: int) -> Training | None:
    """The published training of such a network."""
    return next((one for one in TRAININGS if (one.network, one.pixels) == (network, pixels)), None)
