"""The Gaussian diffusion process: forward sampling, what networks predict, the posterior and the learned reverse.

    q_sample                              x_0 to x_t
    predictor                             a network that predicts eps, x_0 or v as samplers see it
    x_0_from_eps, eps_from_x_0, ...       conversions, at training timesteps of a full schedule
    q_posterior, p_posterior              q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t), at steps of any schedule

Tables are float64, results have the dtype of `x`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.schedule import Schedule

PredictionType = Literal["eps", "x_0", "v"]
FixedVariance = Literal["beta", "beta_tilde"]
Variance = Literal["learned", "beta", "beta_tilde"]

# (x_t, t, y) to channels: t in training timesteps, y None where there are no labels
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Prediction(NamedTuple):
    """What is known about a noisy x_t.

    Attributes:
        x_0, eps: estimates that agree with each other and with x_t.
        variance_output: the network's channels for its variance (iDDPM's v, -1 .. 1); None if it learns none.
        gradient: scale times the gradient of log p(y | x_t), from a classifier; each sampler applies it in its
            own way.
    """

    x_0: Float[Tensor, "B *S"]
    eps: Float[Tensor, "B *S"]
    variance_output: Float[Tensor, "B *S"] | None = None
    gradient: Float[Tensor, "B *S"] | None = None


Predictor = Callable[[Tensor, Tensor, Tensor | None], Prediction]


class Gaussian(NamedTuple):
    """A diagonal Gaussian; `log_variance` broadcasts against `mean`."""

    mean: Tensor
    log_variance: Tensor


def gather(table: Float[Tensor, "S"], t: Int[Tensor, "B"], x: Tensor) -> Tensor:
    """table[t] as (B, 1, 1, ...) against `x`, cast to its dtype only after the float64 look-up."""
    return broadcast(table[t], x)


def broadcast(values: Float[Tensor, "B"], x: Tensor) -> Tensor:
    """One value per sample as (B, 1, 1, ...) against `x`, in its dtype."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def q_sample(
    schedule: Schedule, x_0: Float[Tensor, "B *S"], t: Int[Tensor, "B"], noise: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """x_t = sqrt(alphabar_t) x_0 + sqrt(1 - alphabar_t) eps  (DDPM eq. 4)."""
    alphas_cumprod = schedule.alphas_cumprod
    return gather(alphas_cumprod.sqrt(), t, x_0) * x_0 + gather((1 - alphas_cumprod).sqrt(), t, x_0) * noise


def predictor(network: Network, schedule: Schedule, prediction: PredictionType = "eps") -> Predictor:
    """The `Prediction`s of a network that was trained on this full schedule to predict eps, x_0 or v."""
    check_prediction(schedule, prediction)

    def predict(x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        value, variance_output = split_prediction(network(x_t, t, y).to(x_t.dtype), x_t.shape[1])
        return interpret(schedule, x_t, t, value, prediction, variance_output)

    return predict


def interpret(
    schedule: Schedule,
    x_t: Float[Tensor, "B *S"],
    t: Tensor,
    value: Float[Tensor, "B *S"],
    prediction: PredictionType,
    variance_output: Float[Tensor, "B *S"] | None = None,
) -> Prediction:
    """The `Prediction` that a predicted value of eps, x_0 or v stands for."""
    if prediction == "eps":
        return Prediction(x_0_from_eps(schedule, x_t, t, value), value, variance_output)
    if prediction == "x_0":
        return Prediction(value, eps_from_x_0(schedule, x_t, t, value), variance_output)
    return Prediction(*x_0_and_eps_from_v(schedule, x_t, t, value), variance_output)


def check_prediction(schedule: Schedule, prediction: PredictionType) -> None:
    """Refuse a prediction that leaves x_0 open at the schedule's noisiest step."""
    if prediction == "eps" and schedule.has_zero_terminal_snr:
        raise ValueError("prediction=eps: tells nothing about x_0 at zero_terminal_snr=true: choose v or x_0")


def x_0_from_eps(
    schedule: Schedule, x_t: Float[Tensor, "B *S"], t: Tensor, eps: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """x_0 = (x_t - sqrt(1 - alphabar_t) eps) / sqrt(alphabar_t)."""
    alphas_cumprod = schedule.at(t)
    return broadcast(alphas_cumprod.rsqrt(), x_t) * x_t - broadcast((1 / alphas_cumprod - 1).sqrt(), x_t) * eps


def eps_from_x_0(
    schedule: Schedule, x_t: Float[Tensor, "B *S"], t: Tensor, x_0: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """eps = (x_t - sqrt(alphabar_t) x_0) / sqrt(1 - alphabar_t), the inverse of `x_0_from_eps`."""
    alphas_cumprod = schedule.at(t)
    return (x_t - broadcast(alphas_cumprod.sqrt(), x_t) * x_0) * broadcast((1 - alphas_cumprod).rsqrt(), x_t)


def v_from_x_0_and_eps(
    schedule: Schedule, x_0: Float[Tensor, "B *S"], t: Tensor, eps: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """v = sqrt(alphabar_t) eps - sqrt(1 - alphabar_t) x_0  (Salimans & Ho 2022, section 4)."""
    alphas_cumprod = schedule.at(t)
    return broadcast(alphas_cumprod.sqrt(), x_0) * eps - broadcast((1 - alphas_cumprod).sqrt(), x_0) * x_0


def x_0_and_eps_from_v(
    schedule: Schedule, x_t: Float[Tensor, "B *S"], t: Tensor, v: Float[Tensor, "B *S"]
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
    """x_0 = sqrt(alphabar_t) x_t - sqrt(1 - alphabar_t) v, eps = sqrt(1 - alphabar_t) x_t + sqrt(alphabar_t) v."""
    alphas_cumprod = schedule.at(t)
    a, s = broadcast(alphas_cumprod.sqrt(), x_t), broadcast((1 - alphas_cumprod).sqrt(), x_t)
    return a * x_t - s * v, s * x_t + a * v


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


def p_posterior(
    schedule: Schedule, prediction: Prediction, x_t: Float[Tensor, "B *S"], t: Int[Tensor, "B"], variance: Variance
) -> Gaussian:
    """p(x_{t-1} | x_t): the posterior's mean at the predicted x_0, and one of three variances.

    learned: between beta-tilde and beta, as the network says (iDDPM eq. 15). beta, beta_tilde: fixed (DDPM 3.2).
    """
    mean = q_posterior(schedule, prediction.x_0, x_t, t).mean
    if variance != "learned":
        return Gaussian(mean, gather(fixed_log_variance(schedule, variance), t, x_t))
    if prediction.variance_output is None:
        raise ValueError("variance=learned: needs a network with learn_sigma=true: choose beta_tilde or beta")
    return Gaussian(mean, learned_range_log_variance(schedule, t, prediction.variance_output))


def fixed_log_variance(schedule: Schedule, variance: FixedVariance) -> Float[Tensor, "S"]:
    """log beta_t or log beta-tilde_t, both with log beta-tilde_1 at t = 0, the decoder's (iDDPM)."""
    log_variance = posterior_log_variance(schedule)
    if variance == "beta":
        return torch.cat([log_variance[:1], schedule.betas[1:].log()])
    return log_variance


def posterior_log_variance(schedule: Schedule) -> Float[Tensor, "S"]:
    """log beta-tilde_t, where the zero of t = 0 takes the value of t = 1 (iDDPM)."""
    variance = schedule.posterior_variance
    if len(variance) == 1:
        return schedule.betas.log()
    return torch.cat([variance[1:2], variance[1:]]).log()


def learned_range_log_variance(
    schedule: Schedule, t: Int[Tensor, "B"], variance_output: Float[Tensor, "B *S"]
) -> Float[Tensor, "B *S"]:
    """log Sigma = f log beta_t + (1 - f) log beta-tilde_t with f = (v + 1) / 2  (iDDPM eq. 15)."""
    f = (variance_output + 1) / 2
    upper = gather(schedule.betas.log(), t, variance_output)
    lower = gather(posterior_log_variance(schedule), t, variance_output)
    return f * upper + (1 - f) * lower


def split_prediction(output: Tensor, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's output as (prediction, variance output); the latter None where it does not learn sigma."""
    if output.shape[1] == num_channels:
        return output, None
    if output.shape[1] != 2 * num_channels:
        raise ValueError(f"the network gave {output.shape[1]} channels for latents of {num_channels}")
    value, variance_output = output.chunk(2, dim=1)
    return value, variance_output
