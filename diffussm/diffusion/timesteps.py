"""How training draws its timesteps: uniformly, or where the loss is large."""

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TimestepSampler(Protocol):
    """Draws (t, weight): timesteps and what makes the mean of weighted losses unbiased."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...
    def observe(self, t: Tensor, loss: Tensor) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


class UniformTimesteps:
    """t uniform in 0 .. T-1, weight 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def draw(self, count: int, generator: torch.Generator) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """`count` timesteps and their weights."""
        return torch.randint(self.num_timesteps, (count,), generator=generator), torch.ones(count)

    def observe(self, t: Int[Tensor, "B"], loss: Float[Tensor, "B"]) -> None:
        """Nothing depends on the losses."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""


class LossSecondMomentTimesteps:
    """p_t proportional to sqrt(E[L_t^2]), weight 1 / (T p_t)  (iDDPM eq. 18).

    The expectation is over the last `history_size` losses of each timestep; until every timestep has as many, t is
    uniform. A share `uniform_share` of p stays uniform, so that no timestep is forgotten. Lives on the CPU: to
    observe losses of a GPU waits for them.
    """

    def __init__(self, num_timesteps: int, history_size: int = 10, uniform_share: float = 1e-3) -> None:
        self.num_timesteps, self.uniform_share = num_timesteps, uniform_share
        self.history = torch.zeros(num_timesteps, history_size, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def probabilities(self) -> Float[Tensor, "T"]:
        """p_t."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        moments = self.history.square().mean(dim=1).sqrt()
        if (self.counts < self.history.shape[1]).any() or not moments.any():
            return uniform
        return (1 - self.uniform_share) * moments / moments.sum() + self.uniform_share * uniform

    def draw(self, count: int, generator: torch.Generator) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """`count` timesteps and their weights."""
        p = self.probabilities
        t = torch.multinomial(p, count, replacement=True, generator=generator)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def observe(self, t: Int[Tensor, "B"], loss: Float[Tensor, "B"]) -> None:
        """Take in the unweighted losses of a step; those that are not finite are passed over."""
        size = self.history.shape[1]
        for step, value in zip(t.tolist(), loss.double().tolist(), strict=True):
            if abs(value) < float("inf"):
                self.history[step, self.counts[step] % size] = value
                self.counts[step] += 1

    def state(self) -> dict[str, Tensor]:
        """The remembered losses, and how many there were."""
        return {"history": self.history, "counts": self.counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.history, self.counts = state["history"].clone(), state["counts"].clone()
