"""Noise schedules: the float64 tables of q(x_t | x_0), and shorter schedules cut out of them.

    q(x_t | x_0) = N(sqrt(alphabar_t) x_0, (1 - alphabar_t) I),   alphabar_t = prod_{s <= t} (1 - beta_s)

`linear_schedule` and `cosine_schedule` make a `Schedule`; `respace` keeps a few of its timesteps.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Spacing = Literal["linspace", "leading"]


@dataclass(frozen=True)
class Schedule:
    """alphabar over S steps, and the training timestep that each step stands for.

    Attributes:
        alphas_cumprod: alphabar, strictly decreasing, in (0, 1), float64.
        timesteps: what the network is told at each step; 0 .. T-1 unless respaced.
    """

    alphas_cumprod: Float[Tensor, "S"]
    timesteps: Int[Tensor, "S"]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alphas_cumprod_prev(self) -> Float[Tensor, "S"]:
        """alphabar_{t-1}, with alphabar_{-1} = 1."""
        return torch.cat([torch.ones_like(self.alphas_cumprod[:1]), self.alphas_cumprod[:-1]])

    @property
    def betas(self) -> Float[Tensor, "S"]:
        """beta_t = 1 - alphabar_t / alphabar_{t-1}."""
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @property
    def posterior_variance(self) -> Float[Tensor, "S"]:
        """beta-tilde_t = beta_t (1 - alphabar_{t-1}) / (1 - alphabar_t)  (DDPM eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on `device`."""
        return Schedule(*(getattr(self, field.name).to(device) for field in fields(self)))


def schedule_from_betas(betas: Float[Tensor, "T"]) -> Schedule:
    """The full schedule with these betas, each in (0, 1)."""
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError("every beta must lie in (0, 1)")
    alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
    return Schedule(alphas_cumprod, torch.arange(len(betas)))


def linear_schedule(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
    """beta_t evenly spaced (DDPM, section 4); for T other than 1000 scaled by 1000 / T as in iDDPM."""
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * beta_start, scale * beta_end, num_timesteps, dtype=torch.float64)
    if not 0 < betas[0] <= betas[-1] < 1:
        raise ValueError(
            f"beta_start={beta_start}, beta_end={beta_end}: must rise within (0, 1) (scaled by 1000/T={scale:g})"
        )
    return schedule_from_betas(betas)


def cosine_schedule(num_timesteps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """alphabar_t = f(t)/f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2), beta clipped (iDDPM eq. 17)."""
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta={max_beta}: must lie in (0, 1)")
    s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
    return schedule_from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def spaced_timesteps(num_timesteps: int, num_steps: int, spacing: Spacing) -> Int[Tensor, "S"]:
    """`num_steps` of 0 .. num_timesteps-1, ascending.

    linspace: from first to last in even strides, rounded (ADM's "250"). leading: multiples of an
    integer stride from 0 (ADM's "ddimN"), for which exactly N must fit.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps}: must lie in 1..{num_timesteps}")
    if num_steps == 1:
        return torch.tensor([num_timesteps - 1])  # a single step has to start from pure noise
    if spacing == "linspace":
        stride = (num_timesteps - 1) / (num_steps - 1)
        return torch.tensor([round(i * stride) for i in range(num_steps)])
    if spacing == "leading":
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == num_steps:
                return torch.arange(0, num_timesteps, stride)
        raise ValueError(f"num_steps={num_steps}: no integer stride cuts {num_timesteps} timesteps into so many")
    raise ValueError(f"spacing={spacing!r}: choose linspace or leading")


def respace(schedule: Schedule, steps: Int[Tensor, "S"]) -> Schedule:
    """The schedule that visits only these steps, with the same alphabar at each of them."""
    return Schedule(schedule.alphas_cumprod[steps], schedule.timesteps[steps])
