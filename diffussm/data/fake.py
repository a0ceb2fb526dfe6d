"""Images that nobody has to read."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Fake:
    """Noise in the shape of photographs, at next to no cost: to measure everything that is not reading.

    Args:
        num_classes: image i has label i mod this; None for no labels.
    """

    max_bad_fraction = 0.0
    preprocessing = "none"

    def __init__(
        self,
        num_images: int = 50_000,
        num_classes: int | None = 1000,
        resolution: int = 256,
        horizontal_flip: bool = True,
    ) -> None:
        for name, value in (("num_images", num_images), ("resolution", resolution)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: must be at least 1, or null for no labels")
        self.num_images, self.num_classes, self.horizontal_flip = num_images, num_classes, horizontal_flip
        self.image_shape = (3, resolution, resolution)

    @property
    def class_names(self) -> list[str]:
        """Numbers."""
        return [str(label) for label in range(self.num_classes or 0)]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that there is to it."""
        return {
            "source": "fake",
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }

    def name_of(self, index: int) -> str:
        """Its number."""
        return str(index)

    def label(self, index: int) -> int:
        """The classes in turn; -1 without labels."""
        return -1 if self.num_classes is None else range(self.num_images)[index] % self.num_classes

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(self.num_images)[index]
        noise = np.random.default_rng(index).integers(256, size=self.image_shape, dtype=np.uint8)
        return torch.from_numpy(noise), self.label(index)
