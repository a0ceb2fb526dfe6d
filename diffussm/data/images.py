"""Image sources: indexed collections of uint8 images, with labels or without.

Sources are cheap to pickle and open nothing before they are first used in a process. Here are the protocol,
what sources of photographs share, and the two that need nothing else: folders and scikit-learn's digits.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from diffussm.data.decode import CROP, PREPROCESSING, center_crop, decode
from diffussm.data.packed import PackedStrings
from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.seeding import make_generator

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(Protocol):
    """What everything else needs to know of a data set, be it of images or of their latents.

    `num_classes` is None and `class_names` empty without labels. `horizontal_flip` says whether a mirror image is
    as good as the original, `max_bad_fraction` what share of unreadable images to put up with. `fingerprint` tells
    this data from other data wherever it lies, and `name_of` is an image's file or key.
    """

    horizontal_flip: bool
    max_bad_fraction: float

    @property
    def num_classes(self) -> int | None: ...
    @property
    def class_names(self) -> list[str]: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def name_of(self, index: int) -> str: ...
    def __len__(self) -> int: ...


class ImageSource(Source, Protocol):
    """Items are (image CHW, label), the label -1 without labels; one that cannot be read raises BadImage.

    `label` is an item's without reading it; `preprocessing` says in words how stored images become these.
    """

    @property
    def preprocessing(self) -> str: ...
    def label(self, index: int) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Photographs(ABC):
    """What sources of encoded images of any size share: each is decoded and cropped to a square by ADM's rule.

    Args:
        resolution: side of the square.
        horizontal_flip: mirror half of the images in training.
        max_bad_fraction: share of unreadable images above which a command stops rather than skip them.
    """

    def __init__(self, resolution: int, horizontal_flip: bool, max_bad_fraction: float) -> None:
        if resolution < 1:
            raise ValueError(f"resolution={resolution}: must be at least 1")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction}: must lie in 0..1")
        self.resolution, self.horizontal_flip = resolution, horizontal_flip
        self.max_bad_fraction = max_bad_fraction

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """What the labels 0, 1, ... stand for; empty without labels."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What tells the stored images from others, wherever they lie; `source` is their kind."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies this data to a checkpoint: the stored images, and what is made of them."""
        return {
            **self.identity,
            "num_images": len(self),
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            "crop": CROP,
        }

    @abstractmethod
    def name_of(self, index: int) -> str:
        """The image's file or key."""

    @abstractmethod
    def content(self, index: int) -> bytes | Path:
        """The encoded image, as `decode` takes it."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The class of an image; -1 without labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None without labels."""
        return len(self.class_names) or None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """RGB at the chosen resolution."""
        return (3, self.resolution, self.resolution)

    @property
    def preprocessing(self) -> str:
        """What `decode` and `center_crop` do."""
        return f"{PREPROCESSING} to {self.resolution}x{self.resolution}"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode(self.content(index), self.name_of(index))
        pixels = torch.from_numpy(center_crop(image, self.resolution))
        return pixels.permute(2, 0, 1).contiguous(), self.label(index)


class ImageFolder(Photographs):
    """Images below a directory: a class per subdirectory that holds any (by name), or a flat, unlabelled folder.

    Class folders may have folders within; links to folders are followed. What begins with a dot is ignored.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int = 256,
        horizontal_flip: bool = True,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(resolution, horizontal_flip, max_bad_fraction)
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.path={path}: no such directory: give a folder of images or of class folders")
        try:
            flat, classes = _scan(self.root)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error
        if flat and classes:
            raise DataError(
                f"data.path={path}: holds both images and folders of images: use class folders or a flat folder"
            )
        if not flat and not classes:
            raise DataError(f"data.path={path}: no images ({' '.join(IMAGE_SUFFIXES)}) there or below")
        files = flat or [f"{name}/{file}" for name, group in classes.items() for file in group]
        self._class_names = list(classes)
        self._files = PackedStrings(map(os.fsencode, files))
        self._ends = np.cumsum([len(group) for group in classes.values()], dtype=np.int64)

    @property
    def class_names(self) -> list[str]:
        """The class folders; none for a flat folder."""
        return self._class_names

    @property
    def identity(self) -> Mapping[str, Any]:
        """The files by name."""
        return {"source": "image_folder", "names_sha256": self._names_sha256}

    @cached_property
    def _names_sha256(self) -> str:
        names = hashlib.sha256()
        for index in range(len(self)):
            names.update((b"\n" if index else b"") + self._files[index])
        return names.hexdigest()

    def name_of(self, index: int) -> str:
        """The file's path below the folder."""
        return os.fsdecode(self._files[index])

    def content(self, index: int) -> Path:
        """The file."""
        return self.root / self.name_of(index)

    def label(self, index: int) -> int:
        """The number of its class folder."""
        index = range(len(self))[index]
        return int(self._ends.searchsorted(index, side="right")) if self._class_names else -1

    def __len__(self) -> int:
        return len(self._files)


class Digits:
    """The 1,797 handwritten digits, scanned to 8x8 at 17 grey levels, that ship with scikit-learn.

    Args:
        split: train (four fifths) or held_out, cut by a permutation from `split_seed`.
        resolution: a multiple of 8; above 8 the digits are enlarged, bicubic: more tokens, no more detail.
    """

    num_classes = 10
    horizontal_flip = False
    max_bad_fraction = 0.0

    def __init__(
        self, split: Literal["train", "held_out"] = "train", split_seed: int = 0, resolution: int = 8
    ) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split={split!r}: choose train or held_out")
        if resolution < 8 or resolution % 8:
            raise ValueError(f"resolution={resolution}: must be a multiple of 8")
        self.split, self.split_seed = split, split_seed
        self.image_shape = (1, resolution, resolution)

    @property
    def preprocessing(self) -> str:
        """How the digits become uint8 images."""
        enlarged = (
            "" if self.image_shape[-1] == 8 else f", bicubic to {self.image_shape[-1]}x{self.image_shape[-1]}"
        )
        return f"value * 255 / 16 rounded{enlarged}"

    @cached_property
    def _arrays(self) -> tuple[Tensor, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ConfigError("data=digits needs scikit-learn: pip install 'diffussm[digits]'") from None
        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
        if self.image_shape[1:] != images.shape[2:]:
            enlarged = interpolate(images.float(), self.image_shape[1:], mode="bicubic", align_corners=False)
            images = enlarged.round().clamp(0, 255).to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=make_generator(self.split_seed, "digits split"))
        num_train = len(images) * 4 // 5
        chosen = order[:num_train] if self.split == "train" else order[num_train:]
        return images[chosen], labels[chosen]

    @property
    def images(self) -> UInt8[Tensor, "N 1 H W"]:
        """All images of the split."""
        return self._arrays[0]

    @property
    def labels(self) -> Tensor:
        """Their digits, 0..9, int64."""
        return self._arrays[1]

    @property
    def class_names(self) -> list[str]:
        """0 to 9."""
        return [str(digit) for digit in range(10)]

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

    def name_of(self, index: int) -> str:
        """Its place in the split."""
        return f"{self.split} {index}"

    def label(self, index: int) -> int:
        """The digit."""
        return int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.label(index)


def _scan(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The sorted images in a folder, and those below each of its folders that has any."""
    status = root.stat()
    flat, classes = [], {}
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_dir():
                seen = {(status.st_dev, status.st_ino)}
                if found := sorted(_images_below(entry, "", seen)):
                    classes[entry.name] = found
            elif _is_image(entry):
                flat.append(entry.name)
    return sorted(flat), dict(sorted(classes.items()))


def _images_below(folder: os.DirEntry[str], prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of images relative to a class folder; a folder that links lead to twice is read once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder.path) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_dir():
                yield from _images_below(entry, f"{prefix}{entry.name}/", seen)
            elif _is_image(entry):
                yield prefix + entry.name


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Judged by its name. A link to nowhere counts: it will be found unreadable, rather than pass unnoticed."""
    if entry.name[0] == "." or not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return False
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
