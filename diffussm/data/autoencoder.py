"""Autoencoders: between images as uint8 and the latents x_0 that diffusion works on."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class Autoencoder(Protocol):
    """Images to latents and back; `latent_shape` tells what a model will see."""

    @property
    def is_stochastic(self) -> bool: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]: ...
    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def to_pixels(self, latents: Tensor) -> Tensor: ...


class IdentityAutoencoder:
    """Diffusion in pixel space: the latent is the image, scaled to [-1, 1]."""

    is_stochastic = False
    fingerprint: Mapping[str, Any] = {"kind": "identity"}

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The image's own shape."""
        return image_shape

    def to_latents(
        self, images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """0..255 to -1..1."""
        return images.float() / 127.5 - 1

    def to_pixels(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """clamp(127.5 x + 128, 0, 255), truncated, as DiT quantises; inverts `to_latents`."""
        return (127.5 * latents + 128).clamp(0, 255).to(torch.uint8)
