"""Guidance: denoisers made from denoisers."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import split_prediction


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], scale: float, null_label: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """eps = eps_u + scale (eps_c - eps_u) on all latent channels (Ho & Salimans 2022, in DiT's convention).

    Scale 1 is the conditional model, 0 the unconditional one. The variance stays the conditional one.
    Both halves run as one batch.
    """

    def guided(
        x_t: Float[Tensor, "B C H W"], t: Int[Tensor, "B"] | Float[Tensor, "B"], y: Int[Tensor, "B"] | None
    ) -> Float[Tensor, "B C_out H W"]:
        if y is None:
            raise ValueError("guidance needs labels")
        labels = torch.cat([y, torch.full_like(y, null_label)])
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        eps, v = split_prediction(output, x_t.shape[1])
        conditional, unconditional = eps.chunk(2)
        eps = unconditional + scale * (conditional - unconditional)
        return eps if v is None else torch.cat([eps, v.chunk(2)[0]], dim=1)

    return guided
