"""What every training objective is: all randomness of a step drawn first, then terms of any part of the batch.

`draw` makes the numbers of a whole global batch from one generator, `__call__` evaluates the loss of any part of
it: so neither gradient accumulation nor the number of processes changes what a step trains on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What a training step draws at random, sample by sample; `weight` is the one that t's draw gives its loss."""

    t: Int[Tensor, "B"]
    noise: Float[Tensor, "B *S"]
    drop_uniform: Float[Tensor, "B"]
    weight: Float[Tensor, "B"]

    def __getitem__(self, samples: slice) -> "Draws":
        return Draws(*(getattr(self, field.name)[samples] for field in fields(self)))

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`."""
        return Draws(*(getattr(self, field.name).to(device) for field in fields(self)))


class Objective(ABC):
    """What is minimised, and what of it a checkpoint must keep."""

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """T, the range of the timesteps that `draw` draws."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """All random numbers of a step on a global batch of x_0 of this shape."""

    @abstractmethod
    def __call__(
        self,
        model: Callable[..., Tensor],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms, among them `loss`."""

    def observe(self, draws: Draws, loss: Float[Tensor, "B"]) -> None:  # noqa: B027  (most objectives learn nothing)
        """Learn from the losses of a whole step."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """The inverse of `state`."""
