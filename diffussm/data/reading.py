"""A data set read once, in a given order, by any number of processes."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffussm.data.images import ImageSource
from diffussm.data.workers import Workers, shared_empty
from diffussm.runtime.errors import BadImage, note


class Images(NamedTuple):
    """Some images of a source with their indices in it and their labels, -1 without labels."""

    indices: list[int]
    labels: list[int]
    images: UInt8[Tensor, "n C H W"]


def read_images(
    source: ImageSource,
    batches: Sequence[Sequence[int]],
    num_workers: int,
    tell: Callable[[list[BadImage]], object],
    warn: Callable[[str], None] = note,
    poll: Callable[[], object] = lambda: None,
) -> Generator[Images, None, None]:
    """The images of these indices in their order, batch by batch, but for those that are bad.

    Args:
        batches: indices, as `in_batches` makes them.
        num_workers: processes that read and decode; 0 reads in this one.
        tell: is told of the images that cannot be read, such as `BadFiles.add`.
        warn: is told of workers that had to be replaced.
        poll: called now and then while workers are waited for; what it raises ends the reading.
    """
    size = max(map(len, batches), default=0)
    if size == 0:
        return

    def fill(step: int, images: Tensor) -> tuple[list[int], list[int], list[BadImage]]:
        kept: list[int] = []
        labels: list[int] = []
        bad: list[BadImage] = []
        for index in batches[step] if step < len(batches) else ():
            try:
                image, label = source[index]
            except BadImage as error:
                bad.append(BadImage(error.name, error.reason))  # without what its traceback holds
            else:
                assert image.shape == images.shape[1:], f"item {index} is {tuple(image.shape)}"
                images[len(kept)] = image
                kept.append(index)
                labels.append(label)
        return kept, labels, bad

    def read(images: Tensor, filled: tuple[list[int], list[int], list[BadImage]]) -> Images:
        kept, labels, bad = filled
        tell(bad)
        return Images(kept, labels, images[: len(kept)].clone())

    def empty(make: Callable[..., Any]) -> Tensor:
        return make((size, *source.image_shape), dtype=torch.uint8)

    if num_workers == 0:
        slot = empty(torch.empty)
        for step in range(len(batches)):
            yield read(slot, fill(step, slot))
        return
    with Workers(fill, lambda: empty(shared_empty), num_workers, 0, warn, poll) as workers:
        for _ in batches:
            yield workers.take(read)


def in_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """These indices, `batch_size` at a time."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
