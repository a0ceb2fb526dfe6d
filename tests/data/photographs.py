"""Real pictures for the tests: the two photographs that ship with scikit-learn, and crops of them."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image


@lru_cache
def photographs() -> list[Image.Image]:
    """A Chinese temple and a flower, 640x427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def crop(index: int, width: int = 60, height: int = 48) -> Image.Image:
    """A part that no other index shows, of 4 x 4 pixels for each of its own."""
    left, top = np.random.default_rng(index).integers((640 - 4 * width, 427 - 4 * height))
    return photographs()[index % 2].crop((left, top, left + 4 * width, top + 4 * height)).reduce(4)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
