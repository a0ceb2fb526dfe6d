"""Measures of a model on real images rather than on samples, such as bits per dimension."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffussm.runtime.seeding import SampleNoise, make_generator

# (x_0, y, noise) to terms (B,) by name
ImageMeasure = Callable[[Tensor, Tensor | None, Callable[[], Tensor]], Mapping[str, Tensor]]


class Images(Protocol):
    """An indexed collection of (uint8 image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def measure_images(
    source: Images,
    measures: Mapping[str, ImageMeasure],
    to_latents: Callable[[Tensor], Tensor],
    *,
    indices: Sequence[int],
    with_labels: bool,
    seed: int,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Means over the images of these indices; the noise for image i is a function of (seed, i)."""
    sums: dict[str, float] = {}
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        items = [source[index] for index in part]
        x_0 = to_latents(torch.stack([image for image, _ in items]).to(device))
        y = torch.tensor([label for _, label in items], device=device) if with_labels else None
        for measure in measures.values():
            noise = SampleNoise(seed, part, x_0.shape[1:], device)
            for name, values in measure(x_0, y, noise).items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
        advance(len(part))
    return {**{name: total / len(indices) for name, total in sums.items()}, "num_samples": len(indices)}


def chosen_images(length: int, count: int, seed: int) -> list[int]:
    """`count` of `length` indices, spread over all of them: a function of (seed, length, count)."""
    order = torch.randperm(length, generator=make_generator(seed, "measured images"))
    return sorted(order[:count].tolist())
