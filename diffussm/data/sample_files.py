"""Samples as files: PNG images, one npz in ADM's layout, or tar files as WebDataset reads them.

Each range of images is written by itself, by any process and in any order; what belongs to all is made of that at
the end. So neither memory nor a kill knows how many there are.
"""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from diffussm.runtime.errors import RunDirectoryError
from diffussm.runtime.run_dir import atomic_file, sync_directory, write_and_sync, write_atomically

NPZ = "samples.npz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of a zip: equal samples are equal files


class SampleFiles(Protocol):
    """How images are written to a directory.

    `write` makes a range durable; `finish`, once, what is of all ranges.
    """

    def write(self, number: int, indices: range, images: Tensor, labels: Sequence[int] | None) -> None: ...
    def finish(self, ranges: Sequence[range], labels: Sequence[int] | None) -> None: ...


class PngFiles:
    """000000.png and so on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(
        self, number: int, indices: range, images: UInt8[Tensor, "n C H W"], labels: Sequence[int] | None
    ) -> None:
        """A file for each."""
        for index, image in zip(indices, images, strict=True):
            write_and_sync(self.path / f"{index:06d}.png", encode_png(image))
        sync_directory(self.path)

    def finish(self, ranges: Sequence[range], labels: Sequence[int] | None) -> None:
        """RunDirectoryError unless exactly these images are there."""
        _refuse_others(self.path, "[0-9]*.png", {f"{index:06d}.png" for part in ranges for index in part})


class TarFiles:
    """shard-000000.tar and so on, a file for each range, of 000000.png and 000000.cls for each image."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(
        self, number: int, indices: range, images: UInt8[Tensor, "n C H W"], labels: Sequence[int] | None
    ) -> None:
        """One tar file."""
        with (
            atomic_file(self.path / f"shard-{number:06d}.tar") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for position, (index, image) in enumerate(zip(indices, images, strict=True)):
                _add(archive, f"{index:06d}.png", encode_png(image))
                if labels is not None:
                    _add(archive, f"{index:06d}.cls", str(labels[position]).encode())

    def finish(self, ranges: Sequence[range], labels: Sequence[int] | None) -> None:
        """RunDirectoryError unless exactly these files are there."""
        _refuse_others(self.path, "shard-*.tar", {f"shard-{number:06d}.tar" for number in range(len(ranges))})


class NpzFile:
    """samples.npz: arr_0 (N, H, W, C) uint8, as ADM's evaluator reads it, and labels (N,) int64.

    Args:
        pieces: a directory for the ranges until they are put together.
        image_shape: (C, H, W).
    """

    def __init__(self, path: Path, pieces: Path, image_shape: tuple[int, int, int]) -> None:
        self.path, self.pieces, self.image_shape = path, pieces, image_shape

    def write(
        self, number: int, indices: range, images: UInt8[Tensor, "n C H W"], labels: Sequence[int] | None
    ) -> None:
        """The bytes of a range."""
        write_atomically(self._piece(number), images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())

    def finish(self, ranges: Sequence[range], labels: Sequence[int] | None) -> None:
        """Put the ranges together, a piece at a time; RunDirectoryError if one is not what it was."""
        channels, height, width = self.image_shape
        count, size = sum(map(len, ranges)), channels * height * width
        header = io.BytesIO()
        shape = (count, height, width, channels)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with atomic_file(self.path / NPZ) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as stream:
                stream.write(header.getvalue())
                for number, indices in enumerate(ranges):
                    piece = self._piece(number)
                    if not piece.exists() or piece.stat().st_size != len(indices) * size:
                        raise RunDirectoryError(f"{piece}: damaged: delete {self.pieces} and run it again")
                    with piece.open("rb") as source:
                        shutil.copyfileobj(source, stream, 1 << 20)
            if labels is not None:
                with archive.open(_entry("labels.npy"), "w") as stream:
                    np.lib.format.write_array(stream, np.array(labels, np.dtype("<i8")), version=(1, 0))

    def _piece(self, number: int) -> Path:
        return self.pieces / f"{number:06d}.pixels"


def encode_png(image: UInt8[Tensor, "C H W"]) -> bytes:
    """A grey or RGB image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(file, format="PNG")
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of no time and nobody
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = 0o644 << 16
    return entry


def _refuse_others(path: Path, pattern: str, wanted: set[str]) -> None:
    there = {file.name for file in path.glob(pattern)}
    if wrong := sorted(there ^ wanted):
        problem = "is not one of these samples" if wrong[0] in there else "is gone"
        raise RunDirectoryError(f"{path / wrong[0]}: {problem}: choose another out=")
