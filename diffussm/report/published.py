"""Published figures on ImageNet, to stand beside runs on ImageNet and beside no others."""

from dataclasses import dataclass

SOURCE = "published: Yan, Gu, Rush, CVPR 2024 (arXiv 2311.18257)"
CURVE_SOURCE = SOURCE + ", read off a figure, +-2 %"
STEP_IMAGES = 256_000  # of a thousand steps at the paper's batch size


@dataclass(frozen=True)
class PublishedRow:
    """A row of the paper's table; -G: with classifier-free guidance. None: not given there.

    Attributes:
        images: seen in training.
        gflops: total, one multiply-accumulate counted as one, forward passes only.
    """

    name: str
    pixels: int
    images: int
    gflops: float
    fid: float
    sfid: float | None
    inception_score: float
    precision: float
    recall: float


ROWS = (
    PublishedRow("ADM", 256, 507_000_000, 5.68e12, 10.94, 6.02, 100.98, 0.69, 0.63),
    PublishedRow("LDM-4", 256, 213_000_000, 2.22e10, 10.56, None, 103.49, 0.71, 0.62),
    PublishedRow("DiT-XL/2", 256, 1_792_000_000, 2.13e11, 9.62, 6.85, 121.50, 0.67, 0.67),
    PublishedRow("DiffuSSM-XL", 256, 660_000_000, 1.85e11, 9.07, 5.52, 118.32, 0.69, 0.64),
    PublishedRow("DiT-XL/2-G", 256, 1_792_000_000, 2.13e11, 2.27, 4.60, 278.24, 0.83, 0.57),
    PublishedRow("DiffuSSM-XL-G", 256, 660_000_000, 1.85e11, 2.28, 4.49, 259.13, 0.86, 0.56),
    PublishedRow("DiT-XL/2-G", 512, 768_000_000, 4.03e11, 3.04, 5.02, 240.82, 0.84, 0.54),
    PublishedRow("DiffuSSM-XL-G", 512, 302_000_000, 3.22e11, 3.41, 5.84, 255.06, 0.85, 0.49),
)
# FID-50K of ImageNet at 256 pixels without guidance, at these thousands of steps.
CURVE_STEPS = (50, 100, 200, 300, 400)
CURVES = {
    "DiffuSSM-S (paper)": (120.2, 77.4, 73.1, 66.6, 56.1),
    "DiffuSSM-L (paper)": (79.9, 50.6, 29.8, 23.7, 19.3),
    "DiffuSSM-XL (paper)": (75.8, 45.0, 26.4, 20.7, 17.3),
}
