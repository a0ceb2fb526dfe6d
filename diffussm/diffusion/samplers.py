"""Samplers: functions that turn noise into samples with any callable `model(x_t, t, y)`.

`ddpm` samples the learned reverse process (ancestral sampling), `ddim` the non-Markovian family whose
eta interpolates between a deterministic map (0) and DDPM's beta-tilde step (1). Both walk a respaced
schedule from the noisiest step down; `noise()` gives each step its fresh standard normal.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import (
    eps_from_x_0,
    gather,
    learned_range_log_variance,
    posterior_log_variance,
    q_posterior,
    split_prediction,
    x_0_from_eps,
)
from diffussm.diffusion.schedule import Schedule, Spacing, respace, spaced_timesteps

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Noise = Callable[[], Tensor]
Variance = Literal["learned", "beta", "beta_tilde"]


class Sampler(Protocol):
    """A sampler whose options are bound: noise x_T and labels to samples x_0."""

    def __call__(
        self, model: Denoiser, schedule: Schedule, x_T: Tensor, y: Tensor | None, noise: Noise
    ) -> Tensor: ...


@torch.no_grad()
def ddpm(
    model: Denoiser,
    schedule: Schedule,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int = 250,
    spacing: Spacing = "linspace",
    variance: Variance = "learned",
    clip_x_0: bool = False,
) -> Float[Tensor, "B C H W"]:
    """Ancestral sampling: x_{t-1} ~ N(mu(x_t), Sigma(x_t))  (DDPM algorithm 2).

    Args:
        variance: learned (needs a network with learned sigma), beta_t or beta-tilde_t.
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
    """
    schedule = respace(schedule, spaced_timesteps(len(schedule), num_steps, spacing)).to(x_T.device)
    x = x_T
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x),), step, device=x.device)
        x_0, _, v = predict(model, schedule, x, t, y, clip_x_0)
        mean = q_posterior(schedule, x_0, x, t).mean
        if step == 0:
            return mean
        if variance == "learned":
            if v is None:
                raise ValueError("sampler.variance=learned needs a network with learn_sigma: choose beta_tilde")
            log_variance = learned_range_log_variance(schedule, t, v)
        else:
            table = schedule.betas.log() if variance == "beta" else posterior_log_variance(schedule)
            log_variance = gather(table, t, x)
        x = mean + (log_variance / 2).exp() * noise()
    return x


@torch.no_grad()
def ddim(
    model: Denoiser,
    schedule: Schedule,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int = 50,
    spacing: Spacing = "linspace",
    eta: float = 0.0,
    clip_x_0: bool = False,
) -> Float[Tensor, "B C H W"]:
    """DDIM eq. 12: x_{t-1} = sqrt(alphabar_{t-1}) x_0 + sqrt(1 - alphabar_{t-1} - sigma^2) eps + sigma z,

    with sigma^2 = eta^2 beta-tilde_t. The sequence ends at alphabar_{-1} = 1, where x is the predicted x_0.

    Args:
        eta: 0 deterministic .. 1 as noisy as DDPM with beta-tilde.
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must lie in 0..1")
    schedule = respace(schedule, spaced_timesteps(len(schedule), num_steps, spacing)).to(x_T.device)
    variances = eta**2 * schedule.posterior_variance
    x = x_T
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x),), step, device=x.device)
        x_0, eps, _ = predict(model, schedule, x, t, y, clip_x_0)
        direction = (1 - schedule.alphas_cumprod_prev - variances).clamp_min(0).sqrt()
        x = gather(schedule.alphas_cumprod_prev.sqrt(), t, x) * x_0 + gather(direction, t, x) * eps
        if eta > 0 and step > 0:
            x = x + gather(variances.sqrt(), t, x) * noise()
    return x


def predict(
    model: Denoiser, schedule: Schedule, x_t: Tensor, t: Tensor, y: Tensor | None, clip_x_0: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x_0, eps, v) at x_t; where x_0 is clipped, eps is the one that agrees with it."""
    output = model(x_t, schedule.timesteps[t], y).to(x_t.dtype)
    eps, v = split_prediction(output, x_t.shape[1])
    x_0 = x_0_from_eps(schedule, x_t, t, eps)
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = eps_from_x_0(schedule, x_t, t, x_0)
    return x_0, eps, v
