"""Randomness as a function of (seed, purpose, index): nothing to save, the same on any number of processes."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """63 bits of SHA-256 over the arguments: unrelated streams for different purposes and indices."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for this purpose and index, whatever was drawn before."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def draw_normal(seed: int, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(samples), *shape) of a step, each row a function of its place in the batch alone.

    So a process draws no more than it uses, whatever its part of the batch is.
    """
    noise, generator = torch.empty(len(samples), *shape), torch.Generator()
    for row, sample in zip(noise, samples, strict=True):
        generator.manual_seed(derive_seed(seed, purpose, step, sample))
        torch.randn(row.shape, generator=generator, out=row)
    return noise


class SampleNoise:
    """Standard normal noise for a batch of samples, each from a generator of its own (seed, index).

    Called once for x_T and then once for every step that needs noise; sample i gets the same numbers in
    any batch.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [make_generator(seed, "sample", index) for index in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """The next draw, (len(indices), *shape)."""
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device)
