"""What a model makes of given images: the variational bound on -log p(x_0 | y), and its training loss."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.loss import normal_kl, variational_bound_term
from diffussm.diffusion.objective import Draws, Objective, mean_flat
from diffussm.diffusion.process import FixedVariance, Gaussian, Predictor, broadcast, p_posterior, q_sample
from diffussm.diffusion.samplers import Noise
from diffussm.diffusion.schedule import Schedule


@torch.no_grad()
def variational_bound(
    predict: Predictor,
    schedule: Schedule,
    x_0: Float[Tensor, "B *S"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    fixed_variance: FixedVariance = "beta_tilde",
    clip_x_0: bool = False,
) -> dict[str, Float[Tensor, "B"]]:
    """L_vlb = L_T + sum_{t=1}^{T-1} L_t + L_0 (DDPM eq. 5) of each sample, in bits per dimension.

    Every L_t is estimated at one x_t, with fresh noise; x_0 are pixels in [-1, 1] of 8 bits.

    Args:
        fixed_variance: of p(x_{t-1} | x_t), where the network learns none.
        clip_x_0: clamp the predicted x_0 to [-1, 1], as iDDPM's and ADM's published figures do.

    Returns `vlb`, and of its parts `vlb_prior` (L_T) and `vlb_decoder` (L_0).
    """
    schedule = schedule.to(x_0.device)
    prior = prior_term(schedule, x_0)
    total, term = prior.clone(), prior
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x_0),), step, device=x_0.device)
        x_t = q_sample(schedule, x_0, t, noise())
        prediction = predict(x_t, schedule.timesteps[t], y)
        if clip_x_0:
            prediction = prediction._replace(x_0=prediction.x_0.clamp(-1, 1))
        variance = fixed_variance if prediction.variance_output is None else "learned"
        term = variational_bound_term(schedule, x_0, x_t, t, p_posterior(schedule, prediction, x_t, t, variance))
        total += term
    return {"vlb": total, "vlb_prior": prior, "vlb_decoder": term}


@torch.no_grad()
def mean_loss(
    objective: Objective,
    model: Callable[..., Tensor],
    x_0: Float[Tensor, "B *S"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    num_times: int = 16,
) -> dict[str, Float[Tensor, "B"]]:
    """The objective's terms of each sample, mean over timesteps (k + 1/2) T / num_times, with fresh noise at each.

    Models that see the same noise at the same timesteps differ in this by less than they do by random timesteps.

    Args:
        model: in evaluation mode, so that no labels are dropped.

    Returns `loss`, and what it consists of as `loss_mse` and the like.
    """
    sums: dict[str, Tensor] = {}
    ones = torch.ones(len(x_0), device=x_0.device)
    for k in range(num_times):
        t = torch.full_like(ones, (2 * k + 1) * objective.num_timesteps // (2 * num_times), dtype=torch.long)
        for name, values in objective(model, x_0, y, Draws(t, ones, ones), noise()).items():
            sums[name] = sums.get(name, 0) + values / num_times
    return {name if name == "loss" else f"loss_{name}": total for name, total in sums.items()}


def prior_term(schedule: Schedule, x_0: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """L_T = KL(q(x_T | x_0) || N(0, I)), in bits per dimension."""
    last = schedule.alphas_cumprod[-1:].expand(len(x_0))
    q = Gaussian(broadcast(last.sqrt(), x_0) * x_0, broadcast((1 - last).log(), x_0))
    return mean_flat(normal_kl(q, Gaussian(torch.zeros_like(x_0), torch.zeros_like(x_0)))) / math.log(2)
