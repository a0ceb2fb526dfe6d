"""What an autoencoder makes of images: there and back again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffussm.data.autoencoder import Autoencoder

LOW_PSNR = 20.0  # dB; those in use lie well above on photographs


@dataclass(frozen=True)
class Roundtrip:
    """Images, what was decoded of their latents (of the means of posteriors), and how near that is."""

    images: UInt8[Tensor, "N C H W"]
    decoded: UInt8[Tensor, "N C H W"]
    psnr: Float[Tensor, "N"]

    def record(self) -> dict[str, Any]:
        """As JSON; a PSNR is null where nothing is lost."""
        values = {"mean": self.psnr.mean().item(), "worst": self.psnr.min().item()}
        return {
            "images": len(self.images),
            "psnr": {name: value if math.isfinite(value) else None for name, value in values.items()},
        }

    def problems(self) -> list[str]:
        """What is wrong, and what to do."""
        mean = self.psnr.mean().item()
        if mean >= LOW_PSNR:
            return []
        return [
            f"the autoencoder loses much, PSNR {mean:.1f} dB on average: look at reconstructions.png, and choose "
            "another one or a higher data.resolution"
        ]


@torch.no_grad()
def there_and_back(
    autoencoder: Autoencoder,
    images: UInt8[Tensor, "N C H W"],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda images: None,
) -> Roundtrip:
    """Encode and decode; `advance(n)` is told of every n that are done."""
    parts = []
    for part in images.split(batch_size):
        parts.append(autoencoder.to_pixels(autoencoder.to_latents(part.to(device))).cpu())
        advance(len(part))
    decoded = torch.cat(parts)
    return Roundtrip(images, decoded, psnr(images, decoded))


def psnr(images: UInt8[Tensor, "N C H W"], others: UInt8[Tensor, "N C H W"]) -> Float[Tensor, "N"]:
    """Peak signal-to-noise ratio of each pair in dB, 10 log10(255^2 / mean squared error); of equals, infinite."""
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / error)
