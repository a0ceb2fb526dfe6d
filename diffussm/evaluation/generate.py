"""Generation by index: image i, and its label, are functions of (seed, i) alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from diffussm.runtime.errors import DivergedError
from diffussm.runtime.seeding import SampleNoise, make_generator


@dataclass(frozen=True)
class Generated:
    """A batch of samples with their indices and labels (None: unconditional)."""

    indices: Sequence[int]
    images: UInt8[Tensor, "B C H W"]
    labels: Int[Tensor, "B"] | None


@dataclass(frozen=True)
class Generator:
    """Everything between a seed and pixels.

    Attributes:
        sample: (x_T, labels, noise) to x_0; a sampler over a guided model.
        to_pixels: x_0 to uint8 images.
        latent_shape: (C, H, W) of x_T.
        num_classes: None for an unconditional model.
    """

    sample: Callable[[Tensor, Tensor | None, Callable[[], Tensor]], Tensor]
    to_pixels: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]
    num_classes: int | None
    seed: int
    batch_size: int
    device: torch.device

    def generate(self, indices: Sequence[int], labels: Tensor | None = None) -> Iterator[Generated]:
        """The images of these indices, in batches; labels are `balanced_labels` unless given."""
        if labels is None and self.num_classes is not None:
            labels = balanced_labels(self.seed, indices, self.num_classes)
        for start in range(0, len(indices), self.batch_size):
            part = slice(start, start + self.batch_size)
            noise = SampleNoise(self.seed, indices[part], self.latent_shape, self.device)
            y = None if labels is None else labels[part].to(self.device)
            x_0 = self.sample(noise(), y, noise)
            if not x_0.isfinite().all():
                raise DivergedError(
                    f"samples {indices[part][0]}..{indices[part][-1]} are not finite: try sampling.precision=fp32"
                )
            yield Generated(indices[part], self.to_pixels(x_0).cpu(), None if y is None else y.cpu())


def balanced_labels(seed: int, indices: Sequence[int], num_classes: int) -> Int[Tensor, "N"]:
    """Labels of these indices: every block of num_classes indices holds each class once, shuffled."""
    return choose_labels("balanced", seed, indices, range(num_classes))


def choose_labels(way: str, seed: int, indices: Sequence[int], classes: Sequence[int]) -> Int[Tensor, "N"]:
    """Labels of these indices, of these classes.

    Args:
        way: balanced (every block of as many indices as there are classes holds each once, shuffled), drawn (each
            at random), or cyclic (one class after the other, over and over).
    """
    return torch.tensor([classes[_place(way, seed, index, len(classes))] for index in indices], dtype=torch.long)


def _place(way: str, seed: int, index: int, count: int) -> int:
    block, position = divmod(index, count)
    if way == "cyclic":
        return position
    if way == "drawn":
        return int(torch.randint(count, (), generator=make_generator(seed, "drawn labels", index)))
    assert way == "balanced", way
    return int(torch.randperm(count, generator=make_generator(seed, "labels", block))[position])
