"""The Gaussian diffusion process: forward sampling, conversions, the posterior and the learned reverse.

Functions over a `Schedule`; `t` indexes its steps. Tables are float64, results have the dtype of `x`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.schedule import Schedule


class Gaussian(NamedTuple):
    """A diagonal Gaussian; `log_variance` broadcasts against `mean`."""

    mean: Tensor
    log_variance: Tensor


def gather(table: Float[Tensor, "S"], t: Int[Tensor, "B"], x: Tensor) -> Tensor:
    """table[t] as (B, 1, 1, ...) against `x`, cast to its dtype only after the float64 look-up."""
    return table[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def q_sample(
    schedule: Schedule, x_0: Float[Tensor, "B *S"], t: Int[Tensor, "B"], noise: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """x_t = sqrt(alphabar_t) x_0 + sqrt(1 - alphabar_t) eps  (DDPM eq. 4)."""
    alphas_cumprod = schedule.alphas_cumprod
    return gather(alphas_cumprod.sqrt(), t, x_0) * x_0 + gather((1 - alphas_cumprod).sqrt(), t, x_0) * noise


def x_0_from_eps(
    schedule: Schedule, x_t: Float[Tensor, "B *S"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """x_0 = (x_t - sqrt(1 - alphabar_t) eps) / sqrt(alphabar_t)."""
    alphas_cumprod = schedule.alphas_cumprod
    return gather(alphas_cumprod.rsqrt(), t, x_t) * x_t - gather((1 / alphas_cumprod - 1).sqrt(), t, x_t) * eps


def eps_from_x_0(
    schedule: Schedule, x_t: Float[Tensor, "B *S"], t: Int[Tensor, "B"], x_0: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """eps = (x_t - sqrt(alphabar_t) x_0) / sqrt(1 - alphabar_t), the inverse of `x_0_from_eps`."""
    alphas_cumprod = schedule.alphas_cumprod
    numerator = x_t - gather(alphas_cumprod.sqrt(), t, x_t) * x_0
    return numerator * gather((1 - alphas_cumprod).rsqrt(), t, x_t)


def q_posterior(
    schedule: Schedule, x_0: Float[Tensor, "B *S"], x_t: Float[Tensor, "B *S"], t: Int[Tensor, "B"]
) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7: variance beta-tilde_t and mean

    sqrt(alphabar_{t-1}) beta_t / (1 - alphabar_t) x_0 + sqrt(alpha_t) (1 - alphabar_{t-1}) / (1 - alphabar_t) x_t.
    """
    previous, betas, rest = schedule.alphas_cumprod_prev, schedule.betas, 1 - schedule.alphas_cumprod
    of_x_0 = previous.sqrt() * betas / rest
    of_x_t = (1 - betas).sqrt() * (1 - previous) / rest
    mean = gather(of_x_0, t, x_t) * x_0 + gather(of_x_t, t, x_t) * x_t
    return Gaussian(mean, gather(posterior_log_variance(schedule), t, x_t))


def posterior_log_variance(schedule: Schedule) -> Float[Tensor, "S"]:
    """log beta-tilde_t, where the zero of t = 0 takes the value of t = 1 (iDDPM)."""
    variance = schedule.posterior_variance
    if len(variance) == 1:
        return schedule.betas.log()
    return torch.cat([variance[1:2], variance[1:]]).log()


def learned_range_log_variance(
    schedule: Schedule, t: Int[Tensor, "B"], v: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """log Sigma = f log beta_t + (1 - f) log beta-tilde_t with f = (v + 1) / 2  (iDDPM eq. 15)."""
    f = (v + 1) / 2
    upper, lower = gather(schedule.betas.log(), t, v), gather(posterior_log_variance(schedule), t, v)
    return f * upper + (1 - f) * lower


def split_prediction(output: Tensor, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's output as (eps, v); v is None where the network does not learn sigma."""
    if output.shape[1] == num_channels:
        return output, None
    if output.shape[1] != 2 * num_channels:
        raise ValueError(f"the network gave {output.shape[1]} channels for latents of {num_channels}")
    eps, v = output.chunk(2, dim=1)
    return eps, v
