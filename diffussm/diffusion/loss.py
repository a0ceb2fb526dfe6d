"""The training objective: noise regression plus the variational bound that trains the variance."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.objective import Draws, Objective
from diffussm.diffusion.process import (
    Gaussian,
    learned_range_log_variance,
    q_posterior,
    q_sample,
    split_prediction,
    x_0_from_eps,
)
from diffussm.diffusion.schedule import Schedule


class DDPMObjective(Objective):
    """L_hybrid = |eps - eps_theta|^2 + vb_weight * L_vb, the latter with the mean detached (iDDPM eq. 16).

    L_vb is the one-timestep term of the bound in bits per dimension. At weight 1 and T = 1000 this is
    DiT's public configuration and iDDPM's (which scales by T / 1000). Networks that do not learn sigma
    are trained on the first term alone.
    """

    def __init__(self, schedule: Schedule, vb_weight: float = 1.0) -> None:
        if not 0 <= vb_weight < math.inf:
            raise ValueError(f"vb_weight={vb_weight}: must be finite and at least 0")
        self.schedule, self.vb_weight = schedule, vb_weight

    @property
    def num_timesteps(self) -> int:
        """T, the range of the timesteps that `draw` draws."""
        return len(self.schedule)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Timesteps (uniform), noise and label-drop draws for a global batch of x_0 of this shape."""
        return Draws(
            t=torch.randint(len(self.schedule), shape[:1], generator=generator),
            noise=torch.randn(shape, generator=generator),
            drop_uniform=torch.rand(shape[:1], generator=generator),
            weight=torch.ones(shape[:1]),
        )

    def __call__(
        self,
        model: Callable[..., Tensor],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms: `loss`, and its parts `mse` and (with a learned sigma) `vb`."""
        schedule = self.schedule
        x_t = q_sample(schedule, x_0, draws.t, draws.noise)
        output = model(x_t, schedule.timesteps[draws.t], y, drop_uniform=draws.drop_uniform)
        eps, v = split_prediction(output.to(x_0.dtype), x_0.shape[1])
        mse = mean_flat((draws.noise - eps).square())
        if v is None:
            return {"loss": mse, "mse": mse}
        vb = variational_bound_term(schedule, x_0, x_t, draws.t, eps.detach(), v)
        return {"loss": mse + self.vb_weight * vb, "mse": mse, "vb": vb}


def variational_bound_term(
    schedule: Schedule,
    x_0: Float[Tensor, "B *S"],
    x_t: Float[Tensor, "B *S"],
    t: Int[Tensor, "B"],
    eps: Float[Tensor, "B *S"],
    v: Float[Tensor, "B *S"],
) -> Float[Tensor, "B"]:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), L_0 = -log p(x_0 | x_1); bits per dimension."""
    true = q_posterior(schedule, x_0, x_t, t)
    mean = q_posterior(schedule, x_0_from_eps(schedule, x_t, t, eps), x_t, t).mean
    predicted = Gaussian(mean, learned_range_log_variance(schedule, t, v))
    kl = mean_flat(normal_kl(true, predicted)) / math.log(2)
    nll = mean_flat(-discretized_gaussian_log_likelihood(x_0, predicted)) / math.log(2)
    return torch.where(t == 0, nll, kl)


def normal_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of diagonal Gaussians, in nats, element by element."""
    difference = p.log_variance - q.log_variance
    return (difference.exp() - 1 - difference + (p.mean - q.mean).square() * (-q.log_variance).exp()) / 2


def discretized_gaussian_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """log of the mass that p gives to the bin of x, in nats; bins 2/255 wide, the outer two open (DDPM eq. 13)."""
    inverse_std = (-p.log_variance / 2).exp()
    centered = x - p.mean
    upper = torch.special.ndtr(inverse_std * (centered + 1 / 255))
    lower = torch.special.ndtr(inverse_std * (centered - 1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()


def mean_flat(x: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """Mean over all dimensions but the first."""
    return x.flatten(1).mean(dim=1)
