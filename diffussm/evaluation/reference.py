"""References: what samples are compared with, read and made as files in ADM's npz layout."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm.evaluation.features import FeatureExtractor
from diffussm.evaluation.statistics import FeatureStatistics
from diffussm.runtime.errors import DataError
from diffussm.runtime.run_dir import atomic_file


class Reference:
    """What samples are compared with: an npz in ADM's layout.

    `mu, sigma, mu_s, sigma_s` are statistics of pool and spatial features over the whole training set,
    `arr_0` (N, H, W, C) uint8 the images behind precision and recall. Optional: `held_out`, images like arr_0
    that the network never saw, which show what a perfect model would score, and `held_out_labels`.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            with np.load(path, allow_pickle=False) as arrays:
                self.pool = (arrays["mu"], arrays["sigma"])
                self.spatial = (arrays["mu_s"], arrays["sigma_s"])
                self.images = _to_nchw(arrays["arr_0"])
                held_out = arrays.get("held_out")
                self.held_out = None if held_out is None else _to_nchw(held_out)
                labels = arrays.get("held_out_labels")
                self.held_out_labels = None if labels is None else torch.from_numpy(labels)
                self.preprocessing = str(arrays.get("preprocessing", "unknown"))
        except (OSError, EOFError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
            raise DataError(f"evaluation.reference={path}: not a reference file: {error}") from error
        self.path, self.sha256 = path, hashlib.sha256(content).hexdigest()


@torch.no_grad()
def measure_reference(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    num_images: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[str, np.ndarray]:
    """`mu, sigma, mu_s, sigma_s` and `count` of all images (uint8, B C H W), and `arr_0`, the first of them.

    The images of `arr_0` are held in memory: 10,000 of 256x256 take 2 GB. DataError if fewer than 2 come.

    Args:
        num_images: how many go into `arr_0` at most.
        advance: is told the size of every batch that is done.
    """
    extractor = extractor.to(device)
    channels, height, width = extractor.image_shape
    stored = np.empty((num_images, height, width, channels), np.uint8)
    pool, spatial = None, None
    count = 0
    for images in batches:
        features = extractor(images.to(device))
        if pool is None or spatial is None:
            pool = FeatureStatistics(features.pool.shape[1], device)
            spatial = FeatureStatistics(features.spatial.shape[1], device)
        pool.update(features.pool)
        spatial.update(features.spatial)
        kept = images[: max(num_images - count, 0)]
        stored[count : count + len(kept)] = kept.permute(0, 2, 3, 1).numpy()
        count += len(images)
        advance(len(images))
    if pool is None or spatial is None or count < 2:
        raise DataError(f"{count} image(s) could be read: statistics need at least 2: add some")
    arrays = {"arr_0": stored[:count], "count": np.array(count)}
    for suffix, statistics in (("", pool), ("_s", spatial)):
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
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
