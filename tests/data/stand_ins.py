"""A small encoder and photographs for tests of latent sets, also from a command line in another process."""

import hashlib
import time
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from diffussm.data.images import ImageFolder
from diffussm.data.latents import sample_posterior


class PatchProjection:
    """A fixed random linear projection of 8x8 patches to the mean and log-variance of `channels` channels."""

    def __init__(
        self,
        seed: int = 0,
        scale: float = 2.0,
        channels: int = 4,
        posterior: bool = True,
        delay: float = 0.0,
        tile: int | None = None,
    ) -> None:
        self.encoding, self.rounding = {"precision": "fp32", "tile": tile}, {"autoencoder.batch_size": 8}
        self.scale, self.shift, self.channels, self.is_stochastic, self.delay = (
            scale, 0.1, channels, posterior, delay,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(2 * channels, 3, 8, 8, generator=generator) / 12

    @property
    def fingerprint(self) -> dict:
        sha256 = hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()
        return {"kind": "patches", "sha256": sha256, "scale": self.scale, "shift": self.shift}

    def to(self, device: torch.device) -> "PatchProjection":
        self.weight = self.weight.to(device)
        return self

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return self.channels, image_shape[1] // 8, image_shape[2] // 8

    def encode(self, images: Tensor) -> Tensor:
        time.sleep(self.delay)
        moments = torch.nn.functional.conv2d(images.float() / 127.5 - 1, self.weight, stride=8)
        moments[:, self.channels :] -= 4
        return moments if self.is_stochastic else moments[:, : self.channels]

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return sample_posterior(self.encode(images), noise, self.scale, self.shift)


class Unanswered(ImageFolder):
    """A folder on storage that does not answer from some image on."""

    def __init__(self, path: str, resolution: int, max_bad_fraction: float, first: int) -> None:
        super().__init__(path, resolution, max_bad_fraction=max_bad_fraction)
        self.first = first

    def content(self, index: int) -> Path:
        while index >= self.first:
            time.sleep(60)
        return super().content(index)


def crop_photographs(folder: Path, count: int, side: int = 40) -> None:
    """Crops of scikit-learn's two photographs, a class each."""
    from PIL import Image

    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(count // 2):
            top, left = 37 * index % (427 - side), 101 * index % (640 - side)
            crop = Image.fromarray(pixels[top : top + side, left : left + side])
            crop.save(folder / name / f"{index:03d}.png")


def damage(folder: Path) -> list[str]:
    """Spoil three images, one in each way; returns their names."""
    (folder / "china" / "002.png").write_bytes((folder / "china" / "002.png").read_bytes()[:200])
    (folder / "china" / "017.png").write_bytes(b"")
    (folder / "flower" / "003.png").write_text("no image")
    return ["china/002.png", "china/017.png", "flower/003.png"]
