"""The objective of Gaussian diffusion: regression on eps, x_0 or v, and the variational bound.

    L_simple  = |target - prediction|^2, with min-SNR weights if asked for       (DDPM eq. 14, Min-SNR)
    L_hybrid  = L_simple + vb_weight * L_t with the mean detached                (iDDPM eq. 16)
    L_vlb     = T * L_t, an unbiased estimate of the bound                       (DDPM eq. 5)

L_t is the bound's term of one timestep, in bits per dimension.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.special import log_ndtr

from diffussm.diffusion.objective import Draws, Objective, mean_flat, require_schedule
from diffussm.diffusion.process import (
    FixedVariance,
    Gaussian,
    Network,
    PredictionType,
    Predictor,
    Variance,
    check_prediction,
    interpret,
    p_posterior,
    predictor,
    q_posterior,
    q_sample,
    split_prediction,
    v_from_x_0_and_eps,
)
from diffussm.diffusion.schedule import Schedule
from diffussm.diffusion.timesteps import LossSecondMomentTimesteps, TimestepSampler, UniformTimesteps

Loss = Literal["simple", "hybrid", "vlb"]


class DDPMObjective(Objective):
    """Train a network to predict eps, x_0 or v, and its variance if it learns one.

    iDDPM's L_hybrid adds 0.001 L_vlb, whose estimate from one timestep is T L_t: at T = 1000 the weight of L_t
    is 1, at every T it is T / 1000. DiT's public configuration adds L_t unscaled, which at T = 1000 is the same;
    so does ours (`vb_weight=1`), at every T.

    Args:
        loss: simple (a network without learned variance), hybrid (without one, the same as simple) or vlb.
        prediction: what the network's output means.
        vb_weight: weight of L_t in the hybrid loss.
        min_snr_gamma: weigh the squared error of x_0 by min(SNR, gamma), whatever is predicted (Hang et al.
            2023); None: do not weigh the squared error of the prediction.
        fixed_variance: of the reverse process, where the network learns none: beta or beta_tilde.
        timesteps: drawn uniform, or by the loss's second moment (iDDPM section 3.3).
    """

    def __init__(
        self,
        schedule: Schedule,
        loss: Loss = "hybrid",
        prediction: PredictionType = "eps",
        vb_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        fixed_variance: FixedVariance = "beta_tilde",
        timesteps: Literal["uniform", "loss_second_moment"] = "uniform",
    ) -> None:
        require_schedule(schedule)
        if not 0 <= vb_weight < math.inf:
            raise ValueError(f"vb_weight={vb_weight}: must be finite and at least 0")
        if loss != "hybrid" and vb_weight != 1:
            raise ValueError(
                f"vb_weight={vb_weight}: weighs a part of loss=hybrid, not of loss={loss}: set it to 1"
            )
        if min_snr_gamma is not None and not 0 < min_snr_gamma < math.inf:
            raise ValueError(f"min_snr_gamma={min_snr_gamma}: must be positive and finite, or null")
        if min_snr_gamma is not None and loss == "vlb":
            raise ValueError("min_snr_gamma: weights the squared error, and loss=vlb has none: set it to null")
        check_prediction(schedule, prediction)
        if min_snr_gamma is not None and schedule.has_zero_terminal_snr:
            raise ValueError(
                f"min_snr_gamma={min_snr_gamma}: weighs the last timestep by its SNR, which is 0 at "
                "zero_terminal_snr=true, so that it is never trained: set it to null"
            )
        self.schedule, self.loss, self.prediction, self.vb_weight = schedule, loss, prediction, vb_weight
        self.min_snr_gamma, self.fixed_variance = min_snr_gamma, fixed_variance
        by_moments = timesteps == "loss_second_moment"
        self.timesteps: TimestepSampler = (LossSecondMomentTimesteps if by_moments else UniformTimesteps)(
            len(schedule)
        )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.schedule)

    def check_network(self, learn_sigma: bool) -> None:
        """ValueError where a learned variance would remain untrained, or a fixed one unused."""
        if learn_sigma and self.loss == "simple":
            raise ValueError("loss=simple: leaves a learned variance untrained: set model.learn_sigma=false")
        if learn_sigma and self.fixed_variance != "beta_tilde":
            raise ValueError(
                f"fixed_variance={self.fixed_variance}: the network learns another: set model.learn_sigma=false"
            )

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Timesteps and label-drop draws for a global batch of x_0 of this shape."""
        t, weight = self.timesteps.draw(shape[0], generator)
        return Draws(
            t=t,
            drop_uniform=torch.rand(shape[:1], generator=generator),
            weight=weight,
        )

    def __call__(
        self,
        model: Callable[..., Tensor],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
        noise: Float[Tensor, "B *S"],
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms: `loss`, and its parts `mse` (of the prediction) and `vb` (L_t).

        All carry the weight of their draw, so that their means are unbiased however timesteps are drawn.
        """
        schedule, t = self.schedule, draws.t
        x_t = q_sample(schedule, x_0, t, noise)
        output = model(x_t, t, y, drop_uniform=draws.drop_uniform)
        value, variance_output = split_prediction(output.to(x_0.dtype), x_0.shape[1])
        mse = mean_flat((self._target(x_0, t, noise) - value).square())
        terms = {"mse": mse}
        if self.loss == "vlb" or variance_output is not None:
            mean_source = value if self.loss == "vlb" else value.detach()
            prediction = interpret(schedule, x_t, t, mean_source, self.prediction, variance_output)
            predicted = p_posterior(schedule, prediction, x_t, t, self._variance(variance_output))
            terms["vb"] = variational_bound_term(schedule, x_0, x_t, t, predicted)
        if self.loss == "vlb":
            loss = self.num_timesteps * terms["vb"]
        else:
            loss = mse * self._snr_weight(t).to(mse.dtype)
            if "vb" in terms:
                loss = loss + self.vb_weight * terms["vb"]
        return {name: draws.weight * term for name, term in {"loss": loss, **terms}.items()}

    def predictor(self, network: Network) -> Predictor:
        """How samplers see a network that this objective trained."""
        return predictor(network, self.schedule, self.prediction)

    def observe(self, draws: Draws, loss: Float[Tensor, "B"]) -> None:
        """See the (weighted) losses of a whole step, in the order of its draws."""
        self.timesteps.observe(draws.t, loss / draws.weight.to(loss.device))

    def state(self) -> dict[str, Tensor]:
        """What its timestep sampler remembers."""
        return self.timesteps.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.timesteps.load(state)

    def _target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.prediction == "v":
            return v_from_x_0_and_eps(self.schedule, x_0, t, noise)
        return x_0 if self.prediction == "x_0" else noise

    def _snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) over the weight that a plain squared error of the prediction gives that of x_0.

        |eps|^2 weighs |x_0|^2 by SNR, |v|^2 by SNR + 1.
        """
        if self.min_snr_gamma is None:
            return torch.ones((), device=t.device)
        snr = self.schedule.snr[t]
        implied = {"eps": snr, "x_0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return snr.clamp(max=self.min_snr_gamma) / implied

    def _variance(self, variance_output: Tensor | None) -> Variance:
        return self.fixed_variance if variance_output is None else "learned"


def variational_bound_term(
    schedule: Schedule,
    x_0: Float[Tensor, "B *S"],
    x_t: Float[Tensor, "B *S"],
    t: Int[Tensor, "B"],
    predicted: Gaussian,
) -> Float[Tensor, "B"]:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), L_0 = -log p(x_0 | x_1); bits per dimension."""
    kl = mean_flat(normal_kl(q_posterior(schedule, x_0, x_t, t), predicted)) / math.log(2)
    nll = mean_flat(-discretized_gaussian_log_likelihood(x_0, predicted)) / math.log(2)
    return torch.where(t == 0, nll, kl)


def normal_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of diagonal Gaussians, in nats, element by element."""
    difference = p.log_variance - q.log_variance
    return (difference.expm1() - difference + (p.mean - q.mean).square() * (-q.log_variance).exp()) / 2


def discretized_gaussian_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """log of the mass that p gives to the bin of x, in nats; bins 2/255 wide, the outer two open (DDPM eq. 13)."""
    # In float64, for the gradient of log_ndtr in float32 is wrong in the far tail (by a third at -3,000).
    inverse_std = (-p.log_variance.double() / 2).exp()
    centered, half = x.double() - p.mean, 1 / 255
    # The mass of the mirrored bin is the same, and only below the mean are the logarithms of small masses exact.
    mirrored = -centered.abs()
    above, below = (log_ndtr(inverse_std * (mirrored + side)) for side in (half, -half))
    log_mass = above + (-torch.expm1(below - above)).clamp_min(1e-12).log()
    log_mass = torch.where(x > 0.999, log_ndtr(inverse_std * (half - centered)), log_mass)
    return torch.where(x < -0.999, log_ndtr(inverse_std * (half + centered)), log_mass).to(p.mean.dtype)
