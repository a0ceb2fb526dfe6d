"""What the trainer knows of its parts: protocols, so that it never knows a concrete model, data set or loss."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffussm.runtime.distributed import Undertaking


class Batch(Protocol):
    """This process's share of a batch: what `to_latents` turns into x_0, and labels (None: unconditional)."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def noise(self) -> Tensor | None: ...


class Batches(Protocol):
    """This process's share of every batch by step, from any step on."""

    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def starting_at(self, step: int) -> Generator[Batch, None, None]: ...


class Draws(Protocol):
    """An objective's random draws for a batch, sliceable by sample."""

    @property
    def t(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    def __getitem__(self, samples: slice) -> "Draws": ...
    def to(self, device: torch.device) -> "Draws": ...


class Objective(Protocol):
    """What is minimised: `draw` what is random about a global batch, then terms (B,) of any slice of it and noise.

    It may `observe` the losses of a whole step; what it then remembers is its `state`.
    """

    @property
    def num_timesteps(self) -> int: ...
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Any: ...
    def __call__(
        self, model: Callable[..., Tensor], x_0: Tensor, y: Tensor | None, draws: Any, noise: Tensor
    ) -> dict[str, Tensor]: ...
    def observe(self, draws: Any, loss: Tensor) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Periodic:
    """Something to do with the averaged model every so many images and at the end (None: only then).

    All processes do it together. What `action(model, images, undertaking)` returns in the first of them is logged.
    It must leave torch's global state as it finds it.
    """

    name: str
    every_images: int | None
    action: Callable[[nn.Module, int, Undertaking], Mapping[str, Any]]
    is_judged: bool = False  # whether its result says how good the checkpoint of this step is
