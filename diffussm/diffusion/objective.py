"""What every training objective is to the trainer, and the random draws that it makes.

An objective first draws what is random about a step (`draw`, for the global batch, from one generator) and then
evaluates the loss of any part of that batch (`__call__`), so that neither gradient accumulation nor the number of
processes changes what a step trains on. Noise is handed to it: there is too much of it to be drawn for samples
that another process sees.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import Network, Predictor
from diffussm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Draws:
    """What a training step draws at random, sample by sample.

    Attributes:
        t: timesteps as the network is told them, 0 .. num_timesteps.
        weight: what makes the mean loss unbiased where timesteps are not drawn uniformly; else 1.
    """

    t: Int[Tensor, "B"] | Float[Tensor, "B"]
    drop_uniform: Float[Tensor, "B"]
    weight: Float[Tensor, "B"]

    def __getitem__(self, samples: slice) -> "Draws":
        return Draws(*(getattr(self, field.name)[samples] for field in fields(self)))

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`."""
        return Draws(*(getattr(self, field.name).to(device) for field in fields(self)))


class Objective:
    """The base of all objectives. One without memory has nothing to observe and no state."""

    @property
    def num_timesteps(self) -> int:
        """T; the timesteps that `draw` draws lie in 0 .. T."""
        raise NotImplementedError

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Timesteps and label-drop draws for a global batch of x_0 of this shape."""
        raise NotImplementedError

    def __call__(
        self,
        model: Callable[..., Tensor],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
        noise: Float[Tensor, "B *S"],
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms, given standard normal noise: `loss`, and what it consists of."""
        raise NotImplementedError

    def check_network(self, learn_sigma: bool) -> None:
        """ValueError where the objective cannot train a network with or without a learned variance."""

    def predictor(self, network: Network) -> Predictor:
        """How samplers see a network that this objective trained."""
        raise ValueError("its objective trains no generative model: there is nothing to draw from it")

    def observe(self, draws: Draws, loss: Float[Tensor, "B"]) -> None:
        """See the losses of a whole step, in the order of its draws."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for checkpoints."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""


def require_schedule(schedule: object) -> None:
    """ValueError for a process that is no Gaussian diffusion."""
    if not isinstance(schedule, Schedule):
        raise ValueError("needs a noise schedule, as diffusion=linear has one: choose it, or objective=flow")


def mean_flat(x: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """Mean over all dimensions but the first."""
    return x.flatten(1).mean(dim=1)
