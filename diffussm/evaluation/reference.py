"""References: what samples are compared with, read and made as files in ADM's npz layout."""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from diffussm.evaluation.features import FeatureExtractor
from diffussm.evaluation.statistics import FeatureStatistics
from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.hashing import hash_file, hash_text
from diffussm.runtime.run_dir import atomic_file

# What is read of a file; anything else in it is left alone.
NUMBERS, IMAGES = ("mu", "sigma", "mu_s", "sigma_s"), ("arr_0", "held_out")
TEXTS = ("preprocessing", "preprocessing_sha256", "extractor", "extractor_sha256")
KNOWN = (*NUMBERS, *IMAGES, *TEXTS, "held_out_labels")
# An array may unpack to this much, or to so many times its packed size: images shrink ten times at most.
FREE_BYTES, FREE_RATIO = 2**26, 100


class Reference:
    """What samples are compared with: an npz in ADM's layout, of which some may be missing.

    `mu, sigma, mu_s, sigma_s` are statistics of pool and spatial features over the whole training set,
    `arr_0` (N, H, W, C) uint8 the images behind precision, recall and the like, and behind the statistics where
    there are none. `held_out` are images like arr_0 that the network never saw, which show what a perfect model
    would score, with `held_out_labels`. DataError for a file that is damaged, hostile or says nothing.
    """

    def __init__(self, path: Path) -> None:
        try:
            arrays = read_arrays(path)
            self.sha256 = hash_file(path)
            self.pool, self.spatial = (_moments(arrays, suffix) for suffix in ("", "_s"))
            self.images, self.held_out = (_to_nchw(arrays[name]) if name in arrays else None for name in IMAGES)
            labels = arrays.get("held_out_labels")
            self.held_out_labels = None if labels is None else torch.from_numpy(labels)
            if self.pool is None and self.images is None:
                raise ValueError("has neither mu and sigma nor arr_0")
            if self.pool is None and self.spatial is not None:
                raise ValueError("has mu_s and sigma_s, but no mu and sigma")
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            RuntimeError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise DataError(f"evaluation.reference={path}: not a reference file: {error}") from error
        self.path = path
        self.preprocessing = str(arrays.get("preprocessing", "unknown"))
        self.texts = {key: str(arrays[key]) for key in TEXTS if key in arrays}

    def refuse_extractor(self, extractor: FeatureExtractor) -> None:
        """ConfigError if the statistics are of another network than this one."""
        name = extractor.name or "inception"
        for moments, kind in ((self.pool, "pool"), (self.spatial, "spatial")):
            dim = extractor.dims.get(kind)
            if moments is not None and dim is not None and len(moments[0]) != dim:
                raise self._error(
                    f"statistics of {len(moments[0])} {kind} features, {name} has {dim}",
                    "choose the reference or the evaluation that fits the other",
                )
        theirs = self.texts.get("extractor_sha256", extractor.sha256)
        if self.pool is not None and theirs != extractor.sha256:
            raise self._error(
                f"statistics of {self.texts.get('extractor', 'a network')} with SHA-256 {theirs}, this {name} has "
                f"{extractor.sha256}",
                "make the reference anew with this one",
            )

    def refuse_images(self, image_shape: Sequence[int], preprocessing: str | None = None) -> None:
        """ConfigError for samples of another shape (C, H, W), or of data prepared in another way, if known."""
        for images in (self.images, self.held_out):
            if images is not None and tuple(images.shape[1:]) != tuple(image_shape):
                raise self._error(
                    f"images of shape {tuple(images.shape[1:])}, the data has {tuple(image_shape)}",
                    "choose a reference of that size",
                )
        theirs = self.texts.get("preprocessing_sha256")
        if preprocessing is not None and theirs is not None and theirs != hash_text(preprocessing):
            raise self._error(
                f"made from {self.preprocessing}; the data is prepared otherwise: {preprocessing}",
                "make the reference from data like that",
            )

    def _error(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"evaluation.reference={self.path}: {problem}: {remedy} (`diffussm stats`)")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a reference by name, without pickles, and none before its size was found to be credible.

    ValueError for what cannot be an honest file.
    """
    arrays = {}
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for key in KNOWN:
            if (name := f"{key}.npy") not in names:
                continue
            entry = archive.getinfo(name)
            if names.count(name) > 1:
                raise ValueError(f"has {key} more than once")
            allowed = max(FREE_BYTES, FREE_RATIO * min(entry.compress_size, size))
            with archive.open(entry) as stream:
                expected = _declared_bytes(stream, key)
                if expected != entry.file_size or expected > allowed:
                    raise ValueError(f"{key} would be {expected:,} bytes, which {entry.file_size:,} cannot be")
            with archive.open(entry) as stream:
                arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _declared_bytes(stream: IO[bytes], key: str) -> int:
    """The size of a npy file by its header."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # numpy parses it as Python, which has many ways to fail
        raise ValueError(f"{key} has no header of numpy's") from error
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects, which could run code")
    if any(length < 0 for length in shape):
        raise ValueError(f"{key} has shape {shape}")
    return stream.tell() + math.prod(shape) * dtype.itemsize


def _moments(arrays: Mapping[str, np.ndarray], suffix: str) -> tuple[np.ndarray, np.ndarray] | None:
    mu, sigma = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None:
        raise ValueError(f"has only one of mu{suffix} and sigma{suffix}")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu{suffix} {mu.shape} and sigma{suffix} {sigma.shape} are not of one size")
    if not (np.issubdtype(mu.dtype, np.floating) and np.issubdtype(sigma.dtype, np.floating)):
        raise ValueError(
            f"mu{suffix} and sigma{suffix} are {mu.dtype} and {sigma.dtype}, not numbers with a point"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"mu{suffix} or sigma{suffix} is not finite")
    return mu, sigma


@torch.no_grad()
def measure_reference(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    num_images: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[str, np.ndarray]:
    """`mu, sigma` and `count` of all images (uint8, B C H W), and `arr_0`, the first of them.

    Also `mu_s, sigma_s`, of an extractor that has spatial features.

    The images of `arr_0` are held in memory: 10,000 of 256x256 take 2 GB. DataError if fewer than 2 come.

    Args:
        num_images: how many go into `arr_0` at most.
        advance: is told the size of every batch that is done.
    """
    extractor = extractor.to(device)
    stored: np.ndarray | None = None
    sums: dict[str, FeatureStatistics] = {}
    count = 0
    for images in batches:
        if stored is None:
            channels, height, width = images.shape[1:]
            stored = np.empty((num_images, height, width, channels), np.uint8)
        features = extractor(images.to(device))
        for suffix, values in (("", features.pool), ("_s", features.spatial)):
            if values is not None:
                sums.setdefault(suffix, FeatureStatistics(values.shape[1], device)).update(values)
        kept = images[: max(num_images - count, 0)]
        stored[count : count + len(kept)] = kept.permute(0, 2, 3, 1).numpy()
        count += len(images)
        advance(len(images))
    if stored is None or count < 2:
        raise DataError(f"{count} image(s) could be read: statistics need at least 2: add some")
    arrays = {"arr_0": stored[:count], "count": np.array(count)}
    for suffix, statistics in sums.items():
        arrays[f"mu{suffix}"] = statistics.mean.cpu().numpy()
        arrays[f"sigma{suffix}"] = statistics.covariance.cpu().numpy()
    return arrays


def save_reference(path: Path, arrays: Mapping[str, np.ndarray], request: Mapping[str, Any]) -> None:
    """Write a reference and the request that it answers.

    Equal ones are equal files: nothing in them tells the time, and no compression the version of its library.
    """
    everything = {**arrays, "request": np.array(json.dumps(request))}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in everything.items():
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)


def read_request(path: Path) -> dict[str, Any] | None:
    """The request that a reference answers; None of a file that is not `save_reference`'s."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            request = json.loads(str(arrays["request"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return request if isinstance(request, dict) else None


def _to_nchw(images: np.ndarray) -> Tensor:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, H, W, C), not {images.dtype} {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2)
