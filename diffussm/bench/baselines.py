"""What our layers are measured against, in their plainest form."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffussm.models import S4D


class TextbookS4D(nn.Module):
    """S4D as its equations stand: (B, L, D) -> (B, L, 2D), equal to the `S4D` (zero-order hold) it is made from.

    The kernel is a complex Vandermonde product, K_l = 2 Re sum_n C_n B_n (exp(dt A_n) - 1) / A_n exp(dt A_n l),
    with an exponential for every channel, state and position; each direction has an FFT convolution of its
    own, the anticausal one on the reversed sequence. Autograd does the rest.
    """

    def __init__(self, layer: S4D) -> None:
        super().__init__()
        if not layer.bidirectional or layer.discretization != "zoh":
            raise ValueError("the textbook layer is bidirectional, with zero-order hold")
        self.log_dt, self.log_A_real, self.A_imag = map(_copy, (layer.log_dt, layer.log_A_real, layer.A_imag))
        self.C, self.D = _copy(layer.C), _copy(layer.D)
        self.B = None if layer.B is None else _copy(layer.B)

    def forward(self, u: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D_out"]:
        with torch.autocast(u.device.type, enabled=False):  # complex numbers have no bf16
            y = self.convolve(rearrange(u, "b l d -> b d l").to(self.C.dtype))
        return rearrange(y, "b d l -> b l d").to(u.dtype)

    def convolve(self, u: Float[Tensor, "B D L"]) -> Float[Tensor, "B channels L"]:
        """The layer in channel-major order: causal outputs, then anticausal ones."""
        D = u.shape[1]
        causal = self._convolve_causally(u, slice(0, D))
        anticausal = self._convolve_causally(u.flip(-1), slice(D, 2 * D)).flip(-1)
        return torch.cat([causal, anticausal], dim=1)

    def _convolve_causally(self, u: Tensor, channels: slice) -> Tensor:
        length = u.shape[-1]
        n = 2 * length
        kernel = self._kernel(channels, length)
        y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., :length]
        return y + self.D[channels, None] * u

    def _kernel(self, channels: slice, length: int) -> Tensor:
        dt = self.log_dt[channels, None].exp()
        A = torch.complex(-self.log_A_real[channels].exp(), self.A_imag[channels])  # (D, N/2)
        C = torch.view_as_complex(self.C[channels])
        if self.B is not None:
            C = C * torch.view_as_complex(self.B[channels])
        C = C * (torch.exp(dt * A) - 1) / A
        vandermonde = torch.exp((dt * A)[..., None] * torch.arange(length, device=dt.device))  # (D, N/2, L)
        return 2 * torch.einsum("dn,dnl->dl", C, vandermonde).real


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


class NoSSM(nn.Module):
    """No state-space model: both halves of the output are the input."""

    def forward(self, u: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D_out"]:
        return torch.cat([u, u], dim=-1)

    def convolve(self, u: Float[Tensor, "B D L"]) -> Float[Tensor, "B channels L"]:
        """The same in channel-major order."""
        return torch.cat([u, u], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with heads of 64 by torch's fused kernel: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.num_heads = d_model // 64
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        q, k, v = rearrange(self.qkv(x), "b l (s h d) -> s b h l d", s=3, h=self.num_heads)
        return self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class DiffusersDiT(nn.Module):
    """DiT as the diffusers library has it, called like our models; each block embeds t and y for itself."""

    def __init__(self, input_size: int, patch_size: int, hidden_size: int, depth: int) -> None:
        super().__init__()
        make: Any = DiTTransformer2DModel  # a lazy name, which the type checker takes for a module
        self.model = make(
            num_attention_heads=hidden_size // 64,
            attention_head_dim=64,
            in_channels=4,
            out_channels=8,
            num_layers=depth,
            sample_size=input_size,
            patch_size=patch_size,
        )

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x_t, timestep=t, class_labels=y, return_dict=False)[0]


class MatrixProduct(nn.Module):
    """The rate that dense layers can hope for: one product of large matrices."""

    def forward(self, a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
        return a @ b
