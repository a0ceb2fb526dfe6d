"""What can be measured: images with labels, by index, whether they are generated or stored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffussm.evaluation.generate import Generated, Generator, choose_labels


class ImageStream(Protocol):
    """`len` images, of which any can be had in batches."""

    def __len__(self) -> int: ...
    def batches(self, indices: Sequence[int]) -> Iterator[Generated]: ...


class Images(Protocol):
    """An indexed collection of (uint8 image, label), -1 without labels."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class GeneratedStream:
    """Images that a generator makes when they are asked for.

    Attributes:
        labels: how they are chosen, as `choose_labels` has it.
        classes: of which; None: of all that the generator knows.
    """

    generator: Generator
    count: int
    labels: str = "balanced"
    classes: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.count

    def batches(self, indices: Sequence[int]) -> Iterator[Generated]:
        """In batches of the generator's."""
        generator, labels = self.generator, None
        if generator.num_classes is not None:
            classes = range(generator.num_classes) if self.classes is None else self.classes
            labels = choose_labels(self.labels, generator.seed, indices, classes)
        return generator.generate(indices, labels)


@dataclass(frozen=True)
class StoredStream:
    """Images that are there already."""

    images: Images
    batch_size: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Sequence[int]) -> Iterator[Generated]:
        """In their order."""
        for start in range(0, len(indices), self.batch_size):
            part = indices[start : start + self.batch_size]
            images, labels = zip(*(self.images[index] for index in part), strict=True)
            is_labelled = all(label >= 0 for label in labels)
            yield Generated(part, torch.stack(images), torch.tensor(labels) if is_labelled else None)
