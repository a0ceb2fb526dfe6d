"""Noise schedules: the float64 tables of q(x_t | x_0), and shorter schedules cut out of them.

    q(x_t | x_0) = N(sqrt(alphabar_t) x_0, (1 - alphabar_t) I),   alphabar_t = prod_{s <= t} (1 - beta_s)

`linear_schedule`, `quadratic_schedule`, `sigmoid_schedule` and `cosine_schedule` make a `Schedule`, on request
one that ends in pure noise; `respace` keeps a few of its timesteps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int, Real
from torch import Tensor

Spacing = Literal["linspace", "leading", "trailing"]


@dataclass(frozen=True)
class Schedule:
    """alphabar over S steps, and the training timestep that each step stands for.

    Attributes:
        alphas_cumprod: alphabar, strictly decreasing, in (0, 1) but for a zero terminal, which is 0; float64.
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
        """beta_t = 1 - alphabar_t / alphabar_{t-1}; 1 at a zero terminal."""
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @property
    def posterior_variance(self) -> Float[Tensor, "S"]:
        """beta-tilde_t = beta_t (1 - alphabar_{t-1}) / (1 - alphabar_t)  (DDPM eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def snr(self) -> Float[Tensor, "S"]:
        """SNR_t = alphabar_t / (1 - alphabar_t)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def log_snr(self) -> Float[Tensor, "S"]:
        """log SNR_t, natural; -inf at a zero terminal."""
        return self.alphas_cumprod.logit()

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_t of the last step is pure noise, from which no eps can tell x_0."""
        return bool(self.alphas_cumprod[-1] == 0)

    def at(self, t: Real[Tensor, "B"]) -> Float64[Tensor, "B"]:
        """alphabar_t = 1 / (1 + sigma_t^2), where sigma = sqrt((1 - alphabar) / alphabar) is linear between steps.

        Args:
            t: training timesteps in 0 .. T-1, whole or fractional; at whole ones the result is the table's own.
        """
        if not t.is_floating_point():  # the way of training, in which nothing may wait for a GPU
            return self.alphas_cumprod[t]
        assert torch.equal(self.timesteps, torch.arange(len(self), device=self.timesteps.device)), "respaced"
        assert ((t >= 0) & (t <= len(self) - 1)).all(), "t must lie in 0 .. T-1"
        below, above, part = t.floor().long(), t.ceil().long(), t.double().frac()
        sigmas = (1 / self.alphas_cumprod - 1).sqrt()
        sigma = (1 - part) * sigmas[below] + part * sigmas[above]
        # Beside an infinite sigma every mean of sigmas is infinite, or at part = 0 not a number.
        return torch.where(part == 0, self.alphas_cumprod[below], 1 / (1 + sigma.square()))

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on `device`."""
        return Schedule(*(getattr(self, field.name).to(device) for field in fields(self)))


def linear_schedule(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """beta_t evenly spaced (DDPM, section 4); for T other than 1000 scaled by 1000 / T as in iDDPM."""
    start, end = _scaled_range(num_timesteps, beta_start, beta_end)
    betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    return schedule_from_betas(betas, zero_terminal_snr)


def quadratic_schedule(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """sqrt(beta_t) evenly spaced (DDPM's code; the "scaled linear" of latent diffusion); scaled by 1000 / T."""
    start, end = _scaled_range(num_timesteps, beta_start, beta_end)
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), num_timesteps, dtype=torch.float64)
    return schedule_from_betas(roots.square(), zero_terminal_snr)


def sigmoid_schedule(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """beta_t = beta_start + (beta_end - beta_start) sigmoid(s), s evenly spaced in -6 .. 6; scaled by 1000 / T."""
    start, end = _scaled_range(num_timesteps, beta_start, beta_end)
    s = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)
    return schedule_from_betas(start + (end - start) * s.sigmoid(), zero_terminal_snr)


def cosine_schedule(
    num_timesteps: int = 1000, max_beta: float = 0.999, zero_terminal_snr: bool = False
) -> Schedule:
    """alphabar_t = f(t)/f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2), beta clipped (iDDPM eq. 17)."""
    _require_timesteps(num_timesteps)
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta={max_beta}: must lie in (0, 1)")
    s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
    return schedule_from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta), zero_terminal_snr)


def schedule_from_betas(betas: Float[Tensor, "T"], zero_terminal_snr: bool = False) -> Schedule:
    """The full schedule with these betas, each in (0, 1), before `zero_terminal_snr` lowers its alphabar."""
    _require_timesteps(len(betas))
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas={betas.min():g}..{betas.max():g}: each must lie in (0, 1)")
    alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
    if zero_terminal_snr:
        alphas_cumprod = _with_zero_terminal(alphas_cumprod)
    is_falling = alphas_cumprod[0] < 1 and (alphas_cumprod.diff() < 0).all()
    if not is_falling or (alphas_cumprod[-1] == 0 and not zero_terminal_snr):
        raise ValueError(
            f"betas={betas.min():g}..{betas.max():g}: float64 cannot tell alphabar from 1 at the start, from 0 at "
            f"the end, or from one of the {len(betas)} timesteps to the next: choose less extreme betas"
        )
    return Schedule(alphas_cumprod, torch.arange(len(betas)))


def _with_zero_terminal(alphas_cumprod: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """sqrt(alphabar) shifted and scaled so that the last is 0, the first kept (Lin et al. 2023, Algorithm 1)."""
    if len(alphas_cumprod) < 2:
        raise ValueError("num_timesteps=1: zero_terminal_snr needs at least 2, for it keeps the first")
    roots = alphas_cumprod.sqrt()
    # The factor is exactly 1 at the first step and exactly 0 at the last.
    return alphas_cumprod[0] * ((roots - roots[-1]) / (roots[0] - roots[-1])).square()


def _scaled_range(num_timesteps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """Both betas, made for T = 1000, times 1000 / T, so that alphabar ends where it ends at 1000 (iDDPM)."""
    _require_timesteps(num_timesteps)
    scale = 1000 / num_timesteps
    if not 0 < scale * beta_start <= scale * beta_end < 1:
        raise ValueError(
            f"beta_start={beta_start}, beta_end={beta_end}: must rise within (0, 1) when scaled by "
            f"1000/num_timesteps={scale:g}: lower beta_end, take more timesteps, or choose the cosine schedule"
        )
    return scale * beta_start, scale * beta_end


def _require_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")


def spaced_timesteps(num_timesteps: int, num_steps: int | Sequence[int], spacing: Spacing) -> Int[Tensor, "S"]:
    """`num_steps` of 0 .. num_timesteps-1, ascending.

    linspace: from first to last in even strides, rounded (ADM's "250"). leading: multiples of an
    integer stride from 0 (ADM's "ddimN"), for which exactly N must fit. trailing: even strides down
    from the last, rounded (Lin et al. 2023). One step is the last timestep, whatever the spacing.

    Args:
        num_steps: N, or for linspace a list of how many steps each of so many sections gets (ADM's "10,15,20").
    """
    if not isinstance(num_steps, int):
        if len(num_steps) != 1:
            return _sectioned_timesteps(num_timesteps, num_steps, spacing)
        num_steps = num_steps[0]
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps}: must lie in 1..{num_timesteps}")
    if num_steps == 1:
        return torch.tensor([num_timesteps - 1])  # a single step has to start from pure noise
    if spacing == "linspace":
        return _sectioned_timesteps(num_timesteps, [num_steps], spacing)
    if spacing == "trailing":
        down = [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]
        return torch.tensor(down[::-1])
    if spacing == "leading":
        for whole in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, whole)) == num_steps:
                return torch.arange(0, num_timesteps, whole)
        raise ValueError(f"num_steps={num_steps}: no integer stride cuts {num_timesteps} timesteps into so many")
    raise ValueError(f"spacing={spacing!r}: choose linspace, leading or trailing")


def _sectioned_timesteps(num_timesteps: int, counts: Sequence[int], spacing: Spacing) -> Int[Tensor, "S"]:
    """Sections as equal as can be, the longer ones first, each from its first timestep to its last (ADM)."""
    if spacing != "linspace":
        raise ValueError(f"num_steps={[*counts]}: spacing={spacing} takes one number: give one, or use linspace")
    if not counts:
        raise ValueError("num_steps=[]: give a number of steps, or one for each section")
    length, longer = divmod(num_timesteps, len(counts))
    steps: list[int] = []
    first = 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"num_steps={[*counts]}: section {section + 1} of {len(counts)} has {size} timesteps: give it at "
                "least 1 step and at most so many"
            )
        stride = (size - 1) / max(count - 1, 1)
        # Added up rather than multiplied, for that decides to which side a tie falls in ADM.
        steps += [first + round(position) for position in accumulate([stride] * (count - 1), initial=0.0)]
        first += size
    return torch.tensor(steps)


def respace(schedule: Schedule, steps: Int[Tensor, "S"]) -> Schedule:
    """The schedule that visits only these steps, with the same alphabar at each of them."""
    return Schedule(schedule.alphas_cumprod[steps], schedule.timesteps[steps])
