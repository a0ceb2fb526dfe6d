"""Latents of a whole data set, encoded once: moments of the posterior, of mirror images too, and their reader.

    manifest.json    everything below with its SHA-256, the autoencoder, the source, the request, and in
                     "encoded_with" all versions, devices and batch sizes that shards came from; written last
    labels.npy       int64 (N,); -1 where there is no label
    bad_files.jsonl  {"file": name, "reason": text} of every image that could not be read
    shards/000000.npy  float16 or float32 (n, 2, K, h, w): image and mirror image (n, 1, K, h, w without); K = 2c
                       channels, mean and then log-variance, or K = c of an autoencoder without posterior
    shards/000000.json request.json    what `encoding` needs to continue

Rows are the images that could be read, in the order of the source.
"""

import hashlib
import json
import math
import mmap
import resource
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.hashing import hash_file
from diffussm.runtime.seeding import make_generator

FORMAT_VERSION = 1
MANIFEST, REQUEST, LABELS, BAD_FILES, SHARDS = (
    "manifest.json", "request.json", "labels.npy", "bad_files.jsonl", "shards",
)  # fmt: skip
DTYPES: dict[str, np.dtype] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
SPREAD_ROWS = 256
SPREAD_RANGE = (0.2, 5.0)
SPREAD_TOLERANCE = 0.25  # relative; that of SPREAD_ROWS images may differ so much from that of all
_CHOICES = {  # by the kind of autoencoder that the manifest tells of
    "KLAutoencoder": "add autoencoder=kl autoencoder.pretrained=DIR, or a preset such as sd_vae_ft_ema",
    "DCAutoencoder": "add autoencoder=dc_ae, and autoencoder.pretrained=DIR where it is elsewhere",
}
_AGAIN = "delete it and manifest.json, and run the same `diffussm encode` again, which redoes what is missing"


class LatentSet:
    """What `diffussm encode` has written, as a source of latents that are sampled anew from their posteriors.

    Shards are mapped into memory by each process when it first needs them; rows are copied out of them.

    Args:
        path: the directory.
        horizontal_flip: use the mirror images too; None: if the set holds any.
        verify: check the SHA-256 of every shard; otherwise only their sizes are looked at.
        resolution: side of the square images that were encoded, in pixels; None: whatever they were.
    """

    max_bad_fraction = 0.0

    def __init__(
        self,
        path: str | Path,
        horizontal_flip: bool | None = None,
        verify: bool = False,
        resolution: int | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.manifest, self._manifest_sha256 = _read_manifest(self.path)
        _, height, width = self.image_shape
        if resolution is not None and (height, width) != (resolution, resolution):
            raise ConfigError(
                f"data.resolution={resolution}: the latents in {path} are of images of {height}x{width}: name a "
                "set that was encoded from this size, or set it to null"
            )
        self.images_per_row = 2 if _has_flips(self.manifest) else 1
        if horizontal_flip and self.images_per_row == 1:
            raise ValueError(
                f"horizontal_flip=true: {self.path} holds no mirror images: set it to null, or encode again, with "
                "data.horizontal_flip=true and another to="
            )
        self.horizontal_flip = self.images_per_row == 2 if horizontal_flip is None else horizontal_flip
        for name, entry in self._files():
            _check_file(self.path / name, entry, verify or name == LABELS)
        self._starts = np.cumsum([0, *(shard["count"] for shard in self.manifest["shards"])])
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._open_anew()

    def _open_anew(self) -> None:
        # A mapped file keeps a descriptor: half of what the process may have is left to others.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        at_most = None if limit == resource.RLIM_INFINITY else limit // 2
        self._shard = lru_cache(maxsize=at_most)(self._map_shard)
        self._labels: _MappedArray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_shard", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_anew()

    @property
    def num_classes(self) -> int | None:
        """The source's; None if it was unlabelled."""
        return self.manifest["num_classes"]

    @property
    def class_names(self) -> list[str]:
        """The source's; empty if it was unlabelled."""
        return self.manifest["class_names"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the images that were encoded."""
        channels, height, width = self.manifest["image_shape"]
        return channels, height, width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of what `latents` returns, without the batch."""
        channels, height, width = self.manifest["latent_shape"]
        return channels, height, width

    @property
    def has_posterior(self) -> bool:
        """Whether `latents` takes noise to sample with."""
        return self.manifest["posterior"]

    @property
    def scale(self) -> float:
        """What latents are multiplied by."""
        return self.manifest["scale"]

    @property
    def shift(self) -> float:
        """What is subtracted from them before."""
        return self.manifest["shift"]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies this data to a checkpoint; the manifest's hash covers every byte of it."""
        return {
            "source": "latents",
            "manifest_sha256": self._manifest_sha256,
            "num_images": len(self),
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name_of(self, index: int) -> str:
        """Where the moments of an image are."""
        shard, row = self._locate([index])
        return f"{shard_name(int(shard[0]))} row {row[0]}"

    def latents(
        self,
        indices: Sequence[int] | Int[Tensor, "B"],
        flips: Bool[Tensor, "B"],
        noise: Float[Tensor, "B c h w"] | None,
    ) -> Float[Tensor, "B c h w"]:
        """x_0 of these images, mirrored where `flips` says so; without noise, the posterior's mean."""
        shards, rows = self._locate(indices)
        places = list(zip(shards.tolist(), rows.tolist(), flips.int().tolist(), strict=True))
        moments = np.empty((len(places), *self._row_shape), self._dtype)
        size = moments.nbytes // max(len(places), 1)
        assert self.images_per_row == 2 or not flips.any(), "there are no mirror images"
        for shard, row, flip in places:  # so that they are read all at once, and not one after the other
            self._shard(shard).expect((self.images_per_row * row + flip) * size, size)
        for position, (shard, row, flip) in enumerate(places):
            moments[position] = self._shard(shard).array[row, flip]
        if not self.has_posterior:
            return (torch.from_numpy(moments).float() - self.shift) * self.scale
        return sample_posterior(torch.from_numpy(moments), noise, self.scale, self.shift)

    def labels(self, indices: Sequence[int] | Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Their classes; -1 without a label."""
        if self._labels is None:
            self._labels = _MappedArray(self.path / LABELS, (len(self),), np.dtype("<i8"))
        return torch.from_numpy(self._labels.array[self._positions(indices)])

    def check_autoencoder(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse, naming both sides, an autoencoder that is not the one these latents come from."""
        theirs = self.manifest["autoencoder"]
        if theirs.get("kind") != fingerprint.get("kind"):
            found = differences({"kind": theirs.get("kind")}, {"kind": fingerprint.get("kind")})
            choice = _CHOICES.get(str(theirs.get("kind")), "choose that autoencoder=")
        else:
            found = differences(theirs, fingerprint)
            choice = "choose the one that encoded them"
        if found:
            raise DataError(
                f"data.path={self.path}: latents of another autoencoder ({'; '.join(found)}): {choice}, or encode "
                "the images again"
            )

    def check_spread(self) -> float:
        """The standard deviation of the scaled latents of some random images.

        DataError if it is not finite, not near 1, or not what the manifest says.
        """
        generator = make_generator(0, "spread")
        chosen = torch.randperm(len(self), generator=generator)[:SPREAD_ROWS].sort().values
        flips = (torch.rand(len(chosen), generator=generator) < 0.5) & (self.images_per_row == 2)
        noise = torch.randn(len(chosen), *self.latent_shape, generator=generator)
        found, written = self.latents(chosen, flips, noise).double().std().item(), self.manifest["spread"]["std"]
        low, high = SPREAD_RANGE
        if not low <= found <= high:
            raise DataError(
                f"data.path={self.path}: scaled latents have a standard deviation of {found:.4g}, and diffusion "
                f"wants about 1 ({low:g} to {high:g}): scale={self.scale:g} or shift={self.shift:g} is wrong for "
                "this autoencoder: set autoencoder.scale and encode again"
            )
        if not math.isclose(found, written, rel_tol=SPREAD_TOLERANCE):
            raise DataError(
                f"data.path={self.path}: {len(chosen)} of its latents have a standard deviation of {found:.4g}, "
                f"manifest.json says {written:.4g}: find the damaged shard with data.verify=true"
            )
        return found

    @property
    def _row_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.latent_shape
        return (2 if self.has_posterior else 1) * channels, height, width

    def _locate(self, indices: Sequence[int] | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row in it) of every image."""
        positions = self._positions(indices)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        return shards, positions - self._starts[shards]

    def _positions(self, indices: Sequence[int] | Tensor) -> np.ndarray:
        positions = np.asarray(indices, dtype=np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"indices must lie in 0..{len(self) - 1}")
        return positions

    def _map_shard(self, shard: int) -> "_MappedArray":
        count = self.manifest["shards"][shard]["count"]
        shape = (count, self.images_per_row, *self._row_shape)
        return _MappedArray(self.path / shard_name(shard), shape, self._dtype)

    def _files(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, shard in enumerate(self.manifest["shards"]):
            yield shard_name(number), shard
        yield LABELS, self.manifest["labels"]


def sample_posterior(
    moments: Float[Tensor, "B K h w"], noise: Float[Tensor, "B c h w"] | None, scale: float, shift: float
) -> Float[Tensor, "B c h w"]:
    """x_0 = (mean + exp(log_variance / 2) noise - shift) scale, in float32; without noise, of the mean."""
    mean, log_variance = moments.chunk(2, dim=1)
    mean = mean.float()
    if noise is not None:
        mean = torch.addcmul(mean, (log_variance.float() / 2).exp_(), noise)
    return (mean - shift).mul_(scale)


def differences(theirs: Any, ours: Any, key: str = "") -> list[str]:
    """Where two JSON documents differ, as `key: theirs there, ours here`."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        found = []
        for name in dict.fromkeys([*theirs, *ours]):
            place = f"{key}.{name}" if key else str(name)
            found += differences(theirs.get(name, "nothing"), ours.get(name, "nothing"), place)
        return found
    same = json.dumps(theirs) == json.dumps(ours)
    return [] if same else [f"{key}: {theirs} there, {ours} here"]


def shard_name(shard: int) -> str:
    """Where the moments of a shard are, below the set's directory."""
    return f"{SHARDS}/{shard:06d}.npy"


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The content and its SHA-256."""
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        if (path / REQUEST).exists():
            problem = "its encoding has not ended: run the same `diffussm encode` again"
        else:
            problem = f"no latent set ({error.strerror}): name a directory that `diffussm encode` has written"
        raise DataError(f"data.path={path}: {problem}") from None
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: damaged ({type(error).__name__}): delete it, and run the same `diffussm encode` again"
        ) from None
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: format_version {version}, this diffussm reads {FORMAT_VERSION}: encode again")
    return manifest, hashlib.sha256(content).hexdigest()


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """ValueError, KeyError or TypeError unless it holds what the reader relies on."""
    shapes = (*manifest["image_shape"], *manifest["latent_shape"])
    entries = [*manifest["shards"], manifest["labels"]]
    counts = [*(shard["count"] for shard in manifest["shards"]), *(entry["size"] for entry in entries)]
    numbers = (manifest["scale"], manifest["shift"], manifest["spread"]["std"])
    whole = (
        len(shapes) == 6
        and all(isinstance(size, int) and size > 0 for size in shapes)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and all(isinstance(number, float | int) for number in numbers)
        and all(isinstance(entry["sha256"], str) for entry in entries)
        and all(isinstance(manifest[name], Mapping) for name in ("autoencoder", "source"))
        and manifest["dtype"] in DTYPES
        and isinstance(manifest["posterior"], bool)
        and isinstance(_has_flips(manifest), bool)
        and isinstance(manifest["num_classes"], int | None)
        and isinstance(manifest["class_names"], list)
    )
    if not whole:
        raise ValueError("not what `diffussm encode` writes")


def _has_flips(manifest: Mapping[str, Any]) -> bool:
    return manifest.get("flips", True)  # which the first sets had without saying so


def _check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    try:
        size, digest = path.stat().st_size, entry["sha256"]
        if verify and size == entry["size"]:
            digest = hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {_AGAIN}") from None
    if size != entry["size"]:
        raise DataError(f"{path}: truncated: expected {entry['size']} bytes, found {size}: {_AGAIN}")
    if digest != entry["sha256"]:
        expected, found = entry["sha256"][:12], digest[:12]
        raise DataError(f"{path}: damaged: expected SHA-256 {expected}..., found {found}...: {_AGAIN}")


class _MappedArray:
    """The array of an .npy file in memory that the system fills when it is looked at, and may take back."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version}")
                found, _, found_dtype = np.lib.format.read_array_header_1_0(file)
                self._offset = file.tell()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}): {_AGAIN}") from None
        if found != shape or found_dtype != dtype:
            raise DataError(f"{path}: holds {found_dtype}{found} instead of {dtype}{shape}: {_AGAIN}")
        self.array = np.frombuffer(self._map, dtype, math.prod(shape), self._offset).reshape(shape)
        # Reading ahead of a row is in vain, and it may be megabytes.
        self._map.madvise(mmap.MADV_RANDOM)

    def expect(self, start: int, size: int) -> None:
        """Have the system begin to read these bytes of the array."""
        start += self._offset
        page = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, start + size - page)
