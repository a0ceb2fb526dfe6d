"""Latents of a whole data set, encoded once: moments of the posterior of both mirror images, and their reader."""

import torch
from jaxtyping import Float
from torch import Tensor


def sample_posterior(
    moments: Float[Tensor, "B K h w"], noise: Float[Tensor, "B c h w"] | None, scale: float, shift: float
) -> Float[Tensor, "B c h w"]:
    """x_0 = (mean + exp(log_variance / 2) noise - shift) scale, in float32; without noise, of the mean."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = torch.addcmul(mean, (log_variance / 2).exp(), noise)
    return (mean - shift) * scale
