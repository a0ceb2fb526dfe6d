"""Samplers of Gaussian diffusion: functions that turn noise into samples with any `Predictor`.

`ddpm` samples the learned reverse process (ancestral sampling), `ddim` the non-Markovian family whose eta
interpolates between a deterministic map (0) and DDPM's beta-tilde step (1); `ddim_inversion` runs the
deterministic map backwards. All walk a respaced schedule; `noise()` gives a step its fresh standard normal.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import (
    Prediction,
    Predictor,
    Variance,
    broadcast,
    eps_from_x_0,
    gather,
    p_posterior,
)
from diffussm.diffusion.schedule import Schedule, Spacing, respace, spaced_timesteps

Noise = Callable[[], Tensor]


class Sampler(Protocol):
    """A sampler whose options are bound: noise x_T and labels to samples x_0, through a process's own schedule."""

    def __call__(
        self, predict: Predictor, process: object, x_T: Tensor, y: Tensor | None, noise: Noise
    ) -> Tensor: ...


@torch.no_grad()
def ddpm(
    predict: Predictor,
    schedule: Schedule,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int | Sequence[int] = 250,
    spacing: Spacing = "linspace",
    variance: Variance = "learned",
    clip_x_0: bool = False,
) -> Float[Tensor, "B C H W"]:
    """Ancestral sampling: x_{t-1} ~ N(mu(x_t), Sigma(x_t))  (DDPM algorithm 2).

    A classifier's gradient shifts the mean by Sigma times it (ADM algorithm 1).

    Args:
        variance: learned (needs a network with learned sigma), beta_t or beta-tilde_t.
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
    """
    short = _respaced(schedule, num_steps, spacing).to(x_T.device)
    x = x_T
    for step in reversed(range(len(short))):
        t = torch.full((len(x),), step, device=x.device)
        prediction = predict(x, short.timesteps[t], y)
        if clip_x_0:
            prediction = prediction._replace(x_0=prediction.x_0.clamp(-1, 1))
        mean, log_variance = p_posterior(short, prediction, x, t, variance)
        if prediction.gradient is not None:
            mean = mean + log_variance.exp() * prediction.gradient
        x = mean if step == 0 else mean + (log_variance / 2).exp() * noise()
    return x


@torch.no_grad()
def ddim(
    predict: Predictor,
    schedule: Schedule,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int | Sequence[int] = 50,
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
    schedule = schedule.to(x_T.device) if isinstance(schedule, Schedule) else schedule
    short = _respaced(schedule, num_steps, spacing)
    variances = eta**2 * short.posterior_variance
    x = x_T
    for step in reversed(range(len(short))):
        t = torch.full((len(x),), step, device=x.device)
        x_0, eps = estimate(predict, schedule, x, short.timesteps[t], y, clip_x_0)
        direction = (1 - short.alphas_cumprod_prev - variances).clamp_min(0).sqrt()
        x = gather(short.alphas_cumprod_prev.sqrt(), t, x) * x_0 + gather(direction, t, x) * eps
        if eta > 0 and step > 0:
            x = x + gather(variances.sqrt(), t, x) * noise()
    return x


@torch.no_grad()
def ddim_inversion(
    predict: Predictor,
    schedule: Schedule,
    x_0: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    *,
    num_steps: int | Sequence[int] = 50,
    spacing: Spacing = "linspace",
    num_iterations: int = 1,
) -> Float[Tensor, "B C H W"]:
    """The x_T from which `ddim` with eta 0 and the same steps comes back to x_0, to first order in the step.

    A step up solves the step down, x_{t-1} = a x_t + b eps(x_t, t), for x_t by fixed-point iteration from x_{t-1}.

    Args:
        num_iterations: 1 is the usual inversion (eps taken at x_{t-1}); more come closer to the exact inverse.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations}: must be at least 1")
    schedule = schedule.to(x_0.device)
    short = _respaced(schedule, num_steps, spacing)
    if short.has_zero_terminal_snr:
        raise ValueError(
            "zero_terminal_snr=true: its last step forgets x_0 and has no inverse: use another diffusion"
        )
    a = (short.alphas_cumprod_prev / short.alphas_cumprod).sqrt()
    b = (1 - short.alphas_cumprod_prev).sqrt() - a * (1 - short.alphas_cumprod).sqrt()
    x = x_0
    for step in range(len(short)):
        t = torch.full((len(x),), step, device=x.device)
        x_t = x
        for _ in range(num_iterations):
            times = short.timesteps[t]
            eps = shifted(schedule, predict(x_t, times, y), times).eps
            x_t = (x - gather(b, t, x) * eps) / gather(a, t, x)
        x = x_t
    return x


def estimate(
    predict: Predictor, schedule: Schedule, x_t: Tensor, t: Tensor, y: Tensor | None, clip_x_0: bool
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) at x_t and training timesteps t: shifted by a classifier's gradient, clipped, in agreement."""
    prediction = shifted(schedule, predict(x_t, t, y), t)
    if not clip_x_0:
        return prediction.x_0, prediction.eps
    x_0 = prediction.x_0.clamp(-1, 1)
    return x_0, eps_from_x_0(schedule, x_t, t, x_0)


def shifted(schedule: Schedule, prediction: Prediction, t: Tensor) -> Prediction:
    """eps - sqrt(1 - alphabar_t) gradient (ADM algorithm 2) and the x_0 that agrees; without gradient, itself.

    At zero terminal SNR it stays as it is: x_t says nothing of y there, and no finite x_0 would agree.
    """
    if prediction.gradient is None:
        return prediction
    alphas_cumprod = schedule.at(t)
    alphas_cumprod = alphas_cumprod.where(alphas_cumprod > 0, 1)
    eps_shift = broadcast((1 - alphas_cumprod).sqrt(), prediction.eps) * prediction.gradient
    x_0_shift = broadcast((1 - alphas_cumprod) * alphas_cumprod.rsqrt(), prediction.eps) * prediction.gradient
    return prediction._replace(x_0=prediction.x_0 + x_0_shift, eps=prediction.eps - eps_shift, gradient=None)


def _respaced(schedule: Schedule, num_steps: int | Sequence[int], spacing: Spacing) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise ValueError(
            "ddpm and ddim reverse a Gaussian diffusion, and this model is one of rectified flow: "
            "choose sampler=flow_euler or flow_heun"
        )
    return respace(schedule, spaced_timesteps(len(schedule), num_steps, spacing))
