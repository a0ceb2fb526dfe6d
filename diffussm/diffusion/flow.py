"""Rectified flow: straight paths from data to noise, their velocity, and ODE samplers along it.

    x_t = (1 - t) x_0 + t eps,   dx/dt = v = eps - x_0,   t in 0 (data) .. 1 (noise)

(Liu et al. 2022; times and shift as in SD3, Esser et al. 2024.) Networks are told 1000 t, so that their timestep
embedding sees the range that it sees in DDPM.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.objective import Draws, Objective, mean_flat
from diffussm.diffusion.process import Network, Prediction, Predictor, broadcast, split_prediction
from diffussm.diffusion.samplers import Noise

TIME_SCALE = 1000


class StraightPath:
    """The process of rectified flow, and its time shift for resolutions other than the reference.

    Args:
        reference_pixels: number of latent pixels H W for which times are as drawn; others are shifted by
            s = sqrt(H W / reference_pixels), so that larger latents see more noise. None: no shift.
    """

    def __init__(self, reference_pixels: int | None = None) -> None:
        if reference_pixels is not None and reference_pixels < 1:
            raise ValueError(f"reference_pixels={reference_pixels}: must be at least 1, or null for no shift")
        self.reference_pixels = reference_pixels

    def shift(self, times: Float[Tensor, "S"], latent_pixels: int) -> Float[Tensor, "S"]:
        """t -> s t / (1 + (s - 1) t)  (SD3 eq. 23), which keeps 0 and 1."""
        s = self.shift_factor(latent_pixels)
        return s * times / (1 + (s - 1) * times)

    def shift_factor(self, latent_pixels: int) -> float:
        """s, 1 without a reference."""
        return 1.0 if self.reference_pixels is None else math.sqrt(latent_pixels / self.reference_pixels)

    def to(self, device: torch.device | str) -> "StraightPath":
        """Itself: it holds no tensors."""
        return self


class FlowObjective(Objective):
    """E |(eps - x_0) - v_theta(x_t, t)|^2 (SD3 eq. 8 with weight 1).

    Args:
        times: drawn `uniform`, or `logit_normal`: the sigmoid of N(mean, std^2), which favours the middle.
    """

    num_timesteps = TIME_SCALE

    def __init__(
        self,
        schedule: StraightPath,
        times: Literal["logit_normal", "uniform"] = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        if not isinstance(schedule, StraightPath):
            raise ValueError("rectified flow has straight paths only: choose diffusion=rectified_flow")
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"std={std}: must be positive, and mean={mean} finite")
        self.path, self.times, self.mean, self.std = schedule, times, mean, std

    def check_network(self, learn_sigma: bool) -> None:
        """A flow is deterministic: there is no variance to learn."""
        if learn_sigma:
            raise ValueError("a velocity has no variance: set model.learn_sigma=false")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Times (as 1000 t) and label-drop draws for a global batch of x_0 of this shape."""
        if self.times == "uniform":
            t = torch.rand(shape[:1], generator=generator)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(shape[:1], generator=generator))
        return Draws(
            t=TIME_SCALE * self.path.shift(t, math.prod(shape[2:])),
            drop_uniform=torch.rand(shape[:1], generator=generator),
            weight=torch.ones(shape[0]),
        )

    def __call__(
        self,
        model: Callable[..., Tensor],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
        noise: Float[Tensor, "B *S"],
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms: `loss`."""
        t = broadcast(draws.t / TIME_SCALE, x_0)
        x_t = (1 - t) * x_0 + t * noise
        velocity = model(x_t, draws.t, y, drop_uniform=draws.drop_uniform).to(x_0.dtype)
        return {"loss": mean_flat((noise - x_0 - velocity).square())}

    def predictor(self, network: Network) -> Predictor:
        """x_0 = x_t - t v and eps = x_t + (1 - t) v, for a network that predicts v."""

        def predict(x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
            velocity, _ = split_prediction(network(x_t, t, y).to(x_t.dtype), x_t.shape[1])
            time = broadcast(t / TIME_SCALE, x_t)
            return Prediction(x_t - time * velocity, x_t + (1 - time) * velocity)

        return predict


@torch.no_grad()
def flow_euler(
    predict: Predictor,
    path: StraightPath,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int = 50,
    clip_x_0: bool = False,
) -> Float[Tensor, "B C H W"]:
    """dx/dt = v by Euler's method from t = 1 to 0 in evenly spaced (and shifted) times.

    Args:
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
    """
    times = _times(path, num_steps, x_T)
    x = x_T
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * _velocity(predict, x, now, y, clip_x_0)
    return x


@torch.no_grad()
def flow_heun(
    predict: Predictor,
    path: StraightPath,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    num_steps: int = 25,
    clip_x_0: bool = False,
) -> Float[Tensor, "B C H W"]:
    """dx/dt = v by Heun's method: two evaluations a step, the last step Euler's, 2 num_steps - 1 in all.

    Args:
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
    """
    times = _times(path, num_steps, x_T)
    x = x_T
    for now, after in itertools.pairwise(times):
        velocity = _velocity(predict, x, now, y, clip_x_0)
        guess = x + (after - now) * velocity
        if after > 0:  # at t = 0 a network was hardly trained
            velocity = (velocity + _velocity(predict, guess, after, y, clip_x_0)) / 2
        x = x + (after - now) * velocity
    return x


def _times(path: StraightPath, num_steps: int, x_T: Tensor) -> list[float]:
    if not isinstance(path, StraightPath):
        raise ValueError(
            "flow samplers follow the paths of rectified flow, and this model is one of Gaussian diffusion: "
            "choose sampler=ddpm, ddim or one of the solvers"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return path.shift(even, math.prod(x_T.shape[2:])).tolist()


def _velocity(predict: Predictor, x_t: Tensor, time: float, y: Tensor | None, clip_x_0: bool) -> Tensor:
    """v = eps - x_0; where x_0 is clipped, the velocity that leads to it: (x_t - x_0) / t."""
    t = torch.full((len(x_t),), TIME_SCALE * time, device=x_t.device)
    prediction = predict(x_t, t, y)
    if prediction.gradient is not None:
        raise ValueError("guidance by a classifier is for Gaussian diffusion: choose classifier_free")
    if clip_x_0:
        return (x_t - prediction.x_0.clamp(-1, 1)) / time
    return prediction.eps - prediction.x_0
