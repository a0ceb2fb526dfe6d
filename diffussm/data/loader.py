"""Batches in an order that is a function of (seed, epoch, position), from any step on, or any part of them."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from typing_extensions import TypeIs

from diffussm.data.bad_files import BadFiles
from diffussm.data.images import ImageSource, Source
from diffussm.data.workers import Workers, shared_empty
from diffussm.runtime.errors import BadImage, ConfigError, note
from diffussm.runtime.seeding import draw_normal, make_generator


@dataclass(frozen=True)
class Batch:
    """A global batch, or a part of one.

    Args:
        images: uint8 images, or float32 latents x_0 that are ready.
        labels: None for an unconditional model.
        noise: what a stochastic autoencoder samples the posterior of the images with; else None.
    """

    images: Num[Tensor, "B C H W"]
    labels: Int[Tensor, "B"] | None
    noise: Float[Tensor, "B c h w"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """`change` of every tensor."""
        return Batch(*(None if t is None else change(t) for t in (self.images, self.labels, self.noise)))  # type: ignore[arg-type]


class LatentSource(Source, Protocol):
    """A data set of latents: instead of items, whole batches of x_0."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def has_posterior(self) -> bool: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...
    def latents(self, indices: Int[Tensor, "B"], flips: Bool[Tensor, "B"], noise: Tensor | None) -> Tensor: ...
    def labels(self, indices: Int[Tensor, "B"]) -> Tensor: ...
    def check_autoencoder(self, fingerprint: Mapping[str, Any]) -> None: ...
    def check_spread(self) -> float: ...


def is_latent_set(source: Source) -> TypeIs[LatentSource]:
    """Whether a source gives latents rather than images."""
    return hasattr(source, "latents")


class BatchLoader:
    """Shuffled batches without end: position p is item p mod n of the permutation of epoch p div n.

    Batches run across the ends of epochs, so that every image is seen once per epoch at any batch size.
    Mirror images are drawn for step s from (seed, "flip", s), the posterior noise of its sample i from
    (seed, "posterior", s, i). So any part of a batch is the same as in the whole.
    In the place of an image that cannot be read stands the next in the source's order that can.

    Args:
        with_labels: whether batches carry labels; the source must have them then.
        num_workers: processes that read and decode; 0 reads in this one.
        pin_memory: page-lock batches, for faster transfer to a GPU.
        samples: the part of every global batch that is wanted here; None: all of it.
        noise_shape: (c, h, w) of the latents of a stochastic autoencoder that images have to go through.
        bad_files: where images that cannot be read are listed; by default in memory.
        warn: is told of such images, and of workers that had to be replaced.
        poll: called now and then while workers are waited for; what it raises ends the batches.
    """

    def __init__(
        self,
        source: ImageSource | LatentSource,
        batch_size: int,
        seed: int,
        with_labels: bool,
        num_workers: int = 0,
        pin_memory: bool = False,
        samples: range | None = None,
        noise_shape: tuple[int, int, int] | None = None,
        bad_files: Path | None = None,
        warn: Callable[[str], None] = note,
        poll: Callable[[], object] = lambda: None,
    ) -> None:
        if with_labels and source.num_classes is None:
            raise ConfigError("the data has no class labels: set model.num_classes=null")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.with_labels, self.num_workers, self.pin_memory = with_labels, num_workers, pin_memory
        self.samples = range(batch_size) if samples is None else samples
        self.noise_shape, self.bad_files, self.warn, self.poll = noise_shape, bad_files, warn, poll

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The source's."""
        return self.source.fingerprint

    def starting_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of steps `step`, `step` + 1, ...

        Raises:
            DataError: what cannot be read, if it is more than `source.max_bad_fraction` or no single image.
        """
        bad_files = BadFiles(self.bad_files, len(self.source), self.source.max_bad_fraction, self.warn)
        reader = _Reader(self, bad_files)
        keep = Tensor.pin_memory if self.pin_memory else Tensor.clone
        if self.num_workers == 0:
            while True:
                batch = reader.empty(torch.empty)
                bad_files.add(reader.fill(step, batch))
                yield batch.each(Tensor.pin_memory) if self.pin_memory else batch
                step += 1

        def read(batch: Batch, bad: list[BadImage]) -> Batch:
            bad_files.add(bad)
            return batch.each(keep)

        with Workers(
            reader.fill, lambda: reader.empty(shared_empty), self.num_workers, step, self.warn, self.poll
        ) as workers:
            while True:
                yield workers.take(read)


class _Reader:
    """What a batch holds, step by step: the same in any process."""

    def __init__(self, loader: BatchLoader, bad_files: BadFiles) -> None:
        self.source, self.seed, self.batch_size = loader.source, loader.seed, loader.batch_size
        self.samples, self.with_labels, self.noise_shape = loader.samples, loader.with_labels, loader.noise_shape
        self.are_too_many = bad_files.are_too_many
        self.length = len(loader.source)
        self.bad: dict[int, BadImage] = {}  # met so far, by index
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def empty(self, make: Callable[..., Tensor]) -> Batch:
        """A batch to be filled."""
        n, source = len(self.samples), self.source
        labels = make((n,), dtype=torch.int64) if self.with_labels else None
        if is_latent_set(source):
            return Batch(make((n, *source.latent_shape), dtype=torch.float32), labels)
        noise = make((n, *self.noise_shape), dtype=torch.float32) if self.noise_shape else None
        return Batch(make((n, *source.image_shape), dtype=torch.uint8), labels, noise)

    def fill(self, step: int, batch: Batch) -> list[BadImage]:
        """Write the batch of a step; returns the unreadable images on the way, or too many, which end it."""
        indices, flips = self._indices(step), self._flips(step)
        source = self.source
        if is_latent_set(source):
            shape = batch.images.shape[1:]
            noise = self._draw_noise(step, shape) if source.has_posterior else None
            batch.images.copy_(source.latents(indices, flips, noise))
            if batch.labels is not None:
                batch.labels.copy_(source.labels(indices))
            return []
        if batch.noise is not None:
            batch.noise.copy_(self._draw_noise(step, batch.noise.shape[1:]))
        return self._read_images(indices, flips, batch)

    def _read_images(self, indices: Tensor, flips: Tensor, batch: Batch) -> list[BadImage]:
        met: dict[int, BadImage] = {}
        for place, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
            while (item := self._read(index)) is None:
                met[index] = self.bad[index]
                if self.are_too_many(len(self.bad)):
                    return list(self.bad.values())
                index = (index + 1) % self.length
            image, label = item
            assert image.shape == batch.images.shape[1:], f"item {index} is {tuple(image.shape)}"
            batch.images[place] = image.flip(-1) if flip else image
            if batch.labels is not None:
                batch.labels[place] = label
        return list(met.values())

    def _read(self, index: int) -> tuple[Tensor, int] | None:
        """An item, None if it cannot be read."""
        if index in self.bad:
            return None
        assert not is_latent_set(self.source)
        try:
            return self.source[index]
        except BadImage as bad:
            self.bad[index] = BadImage(bad.name, bad.reason)  # without what its traceback holds
            return None

    def _indices(self, step: int) -> Int[Tensor, "B"]:
        first, parts = step * self.batch_size, []
        position, end = first + self.samples.start, first + self.samples.stop
        while position < end:
            epoch, offset = divmod(position, self.length)
            parts.append(self.permutation(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.length, generator=make_generator(self.seed, "epoch", epoch))

    def _flips(self, step: int) -> Bool[Tensor, "B"]:
        if not self.source.horizontal_flip:
            return torch.zeros(len(self.samples), dtype=torch.bool)
        draws = torch.rand(self.batch_size, generator=make_generator(self.seed, "flip", step))
        return draws[self.samples.start : self.samples.stop] < 0.5

    def _draw_noise(self, step: int, shape: Sequence[int]) -> Tensor:
        return draw_normal(self.seed, "posterior", step, self.samples, shape)
