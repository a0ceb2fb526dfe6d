"""Image sources: indexed collections of uint8 images, with labels or without.

A source has `num_classes` (None: unlabelled), `image_shape` (C, H, W), `horizontal_flip` (whether a mirror
image is as good as the original), a `fingerprint`, a length, and items (image, label).
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffussm.runtime.errors import BadImage, ConfigError, DataError
from diffussm.runtime.seeding import make_generator

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageSource(Protocol):
    """What training needs to know of a data set."""

    horizontal_flip: bool
    max_bad_fraction: float

    @property
    def num_classes(self) -> int | None: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Digits:
    """The 1,797 handwritten digits, scanned to 8x8 at 17 grey levels, that ship with scikit-learn.

    Args:
        split: train (four fifths) or held_out, cut by a permutation from `split_seed`.
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    horizontal_flip = False
    max_bad_fraction = 0.0

    def __init__(self, split: Literal["train", "held_out"] = "train", split_seed: int = 0) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split={split!r}: choose train or held_out")
        self.split, self.split_seed = split, split_seed

    @cached_property
    def _arrays(self) -> tuple[Tensor, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ConfigError("data=digits needs scikit-learn: pip install 'diffussm[digits]'") from None
        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=make_generator(self.split_seed, "digits split"))
        num_train = len(images) * 4 // 5
        chosen = order[:num_train] if self.split == "train" else order[num_train:]
        return images[chosen], labels[chosen]

    @property
    def images(self) -> UInt8[Tensor, "N 1 8 8"]:
        """All images of the split."""
        return self._arrays[0]

    @property
    def labels(self) -> Tensor:
        """Their digits, 0..9, int64."""
        return self._arrays[1]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies this data to a checkpoint."""
        return {
            "source": "digits",
            "split": self.split,
            "split_seed": self.split_seed,
            "num_images": len(self),
            "image_shape": list(self.image_shape),
        }

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class ImageFolder:
    """Images below a directory: a class per subdirectory that holds any (by name), or a flat, unlabelled folder.

    Args:
        resolution: side of the square that ADM's centre crop cuts from every image.
        horizontal_flip: mirror half of the images in training.
    """

    max_bad_fraction = 0.01

    def __init__(self, path: str | Path, resolution: int = 256, horizontal_flip: bool = True) -> None:
        if resolution < 1:
            raise ValueError(f"resolution={resolution}: must be at least 1")
        self.root, self.resolution, self.horizontal_flip = Path(path).expanduser(), resolution, horizontal_flip
        if not self.root.is_dir():
            raise DataError(f"data.path={path}: no such directory: give a folder of images or of class folders")
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        found = [(folder, _image_files(folder, recursive=True)) for folder in folders]
        self.class_names = [folder.name for folder, files in found if files]
        groups = [files for _, files in found if files]
        flat = _image_files(self.root, recursive=False)
        if flat and any(groups):
            raise DataError(
                f"data.path={path}: holds both images and folders of images: use class folders or a flat folder"
            )
        self.files = flat or [file for group in groups for file in group]
        self._labels = [-1] * len(flat) or [label for label, group in enumerate(groups) for _ in group]
        if not self.files:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"data.path={path}: no images ({suffixes}) there or below")
        if flat:
            self.class_names = []

    @property
    def num_classes(self) -> int | None:
        """Number of class folders; None for a flat folder."""
        return len(self.class_names) or None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """RGB at the chosen resolution."""
        return (3, self.resolution, self.resolution)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies this data to a checkpoint: its files by name, wherever the folder lies."""
        names = "\n".join(file.relative_to(self.root).as_posix() for file in self.files)
        return {
            "source": "image_folder",
            "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
            "num_images": len(self),
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                pixels = center_crop(_to_rgb(image), self.resolution)
        except (
            OSError,
            UnidentifiedImageError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise BadImage(file.relative_to(self.root).as_posix(), str(error)) from error
        return torch.from_numpy(pixels).permute(2, 0, 1), self._labels[index]


def center_crop(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """ADM's crop: halve by box filter while twice the target fits, bicubic to it, cut out the centre."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    return np.array(image)[top : top + resolution, left : left + resolution]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _image_files(folder: Path, recursive: bool) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
