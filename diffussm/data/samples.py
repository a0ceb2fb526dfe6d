"""Samples from files as they are: a folder of images, an npz in ADM's layout, tar files, what `sample` wrote.

Nothing is cropped, scaled or left out: an image that cannot be read, or is of another size than the first, is an
error.
"""

import contextlib
import hashlib
import json
import math
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm.data.decode import decode, read_header
from diffussm.data.images import IMAGE_SUFFIXES
from diffussm.data.sample_files import NPZ
from diffussm.runtime.errors import DataError
from diffussm.runtime.hashing import hash_file

RECORD = "samples.json"
GREY = ("L", "1", "I", "I;16")
NPZ_LABELS = ("labels", "arr_1")  # ours, and where ADM's sampler has them


class StoredSamples(ABC):
    """Items are (image CHW uint8, label), the label -1 without labels.

    Args:
        key: the configuration key that names the path, for errors.
        channels: 3, or 1 for images that are grey.
    """

    def __init__(self, path: Path, channels: int, key: str) -> None:
        self.path, self.channels, self.key = path, channels, key
        self.labels: Sequence[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """An image, of whatever size."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of all that is stored."""

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image, and so of all."""
        channels, height, width = self.read(0).shape
        return channels, height, width

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.read(index)
        if tuple(image.shape) != self.image_shape:
            raise self.error(f"image {index} is {tuple(image.shape)}, the first {self.image_shape}", "mend them")
        return image, -1 if self.labels is None else self.labels[index]

    def error(self, problem: str, remedy: str) -> DataError:
        """What is wrong with these samples."""
        return DataError(f"{self.key}={self.path}: {problem}: {remedy}")


class SampleFolder(StoredSamples):
    """Image files in a folder, in the order of their names, or in a folder for each class."""

    def __init__(self, path: Path, channels: int, key: str, labels: Sequence[int] | None = None) -> None:
        super().__init__(path, channels, key)
        self.files = _images_in(path)
        if labels is not None:  # written by `sample`, with a grid beside them
            self.files = sorted(
                (file for file in self.files if file.stem.isdecimal()), key=lambda file: int(file.stem)
            )
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != ".")
        classes = [found for found in map(_images_in, folders) if found]
        if self.files and classes:
            raise self.error("holds both images and folders of images", "give one of both")
        if classes:
            self.files = [file for group in classes for file in group]
            self.labels = [label for label, group in enumerate(classes) for _ in group]
        elif labels:
            self.labels = labels
        if not self.files:
            raise self.error(f"no images ({' '.join(IMAGE_SUFFIXES)}) there", "give a folder of images")
        if self.labels is not None and len(self.labels) != len(self.files):
            raise self.error(f"{len(self.files)} images, {len(self.labels)} labels", f"mend {RECORD}")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        """Decoded."""
        return _pixels(self.files[index], str(self.files[index]), self)

    @cached_property
    def sha256(self) -> str:
        """Of the files by name; on the way, their sizes are found to be one."""
        digest = hashlib.sha256()
        _, height, width = self.image_shape
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)} {hash_file(file)}\n".encode())
            with contextlib.suppress(OSError, SyntaxError, ValueError):  # which are told when it is read
                header = read_header(file)
                if (header.height, header.width) != (height, width):
                    raise self.error(
                        f"{file.name} is {header.width}x{header.height}, the first {width}x{height}",
                        "give one size",
                    )
        return digest.hexdigest()


class SampleArchive(StoredSamples):
    """The arr_0 (N, H, W, C) uint8 of an npz, read from the disk where it is not compressed."""

    def __init__(self, path: Path, channels: int, key: str) -> None:
        super().__init__(path, channels, key)
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    raise ValueError("has no arr_0: statistics alone have no images")
                self.images = _array(path, archive, "arr_0.npy")
                stored = [f"{name}.npy" for name in NPZ_LABELS if f"{name}.npy" in names]
                labels = _array(path, archive, stored[0]) if stored else None
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise self.error(f"not samples ({error})", "give an npz with arr_0") from error
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or not len(self.images):
            raise self.error(
                f"arr_0 is {self.images.dtype} {self.images.shape}", "it must be uint8 (N, H, W, C), N at least 1"
            )
        if self.images.shape[3] != channels:
            raise self.error(_misfit(self.images.shape[3], channels), "choose another evaluation")
        if labels is not None:
            if labels.shape != (len(self.images),) or not np.issubdtype(labels.dtype, np.integer):
                raise self.error(f"labels are {labels.dtype} {labels.shape}", "one integer for each image")
            self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """A copy."""
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hash_file(self.path)


class SampleTars(StoredSamples):
    """The images of tar files, in their order, each with the class in the file of its name with .cls."""

    def __init__(self, path: Path, channels: int, key: str) -> None:
        super().__init__(path, channels, key)
        self.tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        self.members: list[tuple[Path, str, int, int]] = []  # file, name, first byte, size
        labels: dict[str, int] = {}
        for tar in self.tars:
            try:
                with tarfile.open(tar, "r:") as archive:
                    for member in archive:
                        stem, suffix = os.path.splitext(member.name)  # noqa: PTH122  (of no path here)
                        if not member.isfile():
                            continue
                        if suffix.lower() in IMAGE_SUFFIXES:
                            self.members.append((tar, member.name, member.offset_data, member.size))
                        elif suffix == ".cls":
                            content = archive.extractfile(member)
                            labels[stem] = int(content.read(32)) if content else -1
            except (OSError, tarfile.TarError, ValueError) as error:
                raise self.error(f"{tar.name} is no whole tar file ({error})", "make it anew") from error
        if not self.members:
            raise self.error("no images there", "give a tar file of images")
        if labels:
            stems = [os.path.splitext(name)[0] for _, name, _, _ in self.members]  # noqa: PTH122
            if without := [stem for stem in stems if stem not in labels]:
                raise self.error(f"{without[0]} has no .cls", "give every image a class, or none")
            self.labels = [labels[stem] for stem in stems]

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> Tensor:
        """Decoded."""
        tar, name, start, size = self.members[index]
        with tar.open("rb") as file:
            file.seek(start)
            return _pixels(file.read(size), f"{tar}: {name}", self)

    @cached_property
    def sha256(self) -> str:
        """Of the files."""
        return hashlib.sha256("".join(map(hash_file, self.tars)).encode()).hexdigest()


def open_samples(path: Path, channels: int, key: str = "samples") -> StoredSamples:
    """The samples in a folder, an npz, a tar file or a folder of these; DataError, which names `key`, if none."""
    if not path.exists():
        raise DataError(f"{key}={path}: not there: give a folder of images, an npz or a tar file")
    if path.suffix == ".npz" and path.is_file():
        return SampleArchive(path, channels, key)
    if path.is_file():
        return SampleTars(path, channels, key)
    labels = _read_record(path, key)
    if (path / NPZ).exists():
        return SampleArchive(path / NPZ, channels, key)
    if any(path.glob("*.tar")):
        return SampleTars(path, channels, key)
    return SampleFolder(path, channels, key, labels)


def _read_record(path: Path, key: str) -> Sequence[int] | None:
    """The labels that `sample` has noted, empty without; None where it has not written the folder."""
    if not (path / RECORD).exists():
        return None
    try:
        record = json.loads((path / RECORD).read_bytes())
        is_complete, labels = record["complete"], record.get("labels") or []
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise ValueError("labels are no integers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{key}={path}: {RECORD} is damaged ({error}): draw them again") from None
    if not is_complete:
        raise DataError(f"{key}={path}: not all images are there yet: run the same `diffussm sample` again")
    return labels


def _images_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.name[0] != "." and file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in files if file.is_file())


def _pixels(content: bytes | Path, name: str, samples: StoredSamples) -> Tensor:
    pixels = torch.from_numpy(np.array(decode(content, name))).permute(2, 0, 1)
    if samples.channels == 1 and (mode := read_header(content).mode) not in GREY:
        raise samples.error(_misfit(len(mode), 1), "choose another evaluation")
    return pixels[: samples.channels]  # of grey, all three are the same


def _misfit(found: int, wanted: int) -> str:
    return f"images of {found} channels, evaluation.extractor measures {wanted}"


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an npz; mapped, not read, where it is stored as it is. ValueError for what cannot be honest."""
    entry = archive.getinfo(name)
    with archive.open(entry) as stream:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError(f"{name} is of an unknown version")
        shape, is_fortran, dtype = readers[version](stream)
        start = stream.tell()
    if dtype.hasobject or is_fortran or any(length < 0 for length in shape):
        raise ValueError(f"{name} is no plain array of numbers")
    if start + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"{name} is not of the size that it says")
    if entry.compress_type != zipfile.ZIP_STORED:
        if entry.file_size > 100 * min(entry.compress_size, path.stat().st_size) + 2**26:
            raise ValueError(f"{name} would be {entry.file_size:,} bytes")
        with archive.open(entry) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of what else the local header holds
    data = entry.header_offset + 30 + int(lengths.sum()) + start
    if data + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise ValueError(f"{name} is cut off")
    return np.memmap(path, dtype, "r", data, shape)
