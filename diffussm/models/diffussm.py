"""DiffuSSM: a diffusion network that mixes tokens with bidirectional state-space models, not attention.

After "Diffusion Models Without Attention" (Yan, Gu, Rush; CVPR 2024, arXiv 2311.18257), section 4 and
figure 2. Latents are flattened row by row, so token l stands for one latent pixel. Only the dense layers
work on the shortened sequence J = L / M; the state-space model always sees all L tokens.

    DiffuSSM            embed -> N x DiffuSSMBlock -> FinalLayer
    DiffuSSMBlock       adaLN-Zero residual around  HourglassDense -> S4D -> HourglassFusion
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from diffussm.models.layers import (
    DownScale,
    LabelEmbedder,
    TimestepEmbedder,
    UpScale,
    linear,
    modulate,
)
from diffussm.models.ssm import S4D, Discretization, Init


class DiffuSSM(nn.Module):
    """Predict the noise, and the variance if `learn_sigma`, of a noisy latent at timestep t.

    Args:
        in_channels: latent channels C.
        num_classes: classes y in 0..num_classes-1; None for an unconditional model, which takes no y.
        hidden_size: width D; divisible by `hourglass_ratio`.
        depth: number of blocks.
        hourglass_ratio: M, by which the dense layers shorten the sequence; H * W must be divisible by it.
        class_dropout_prob: share of labels replaced by the null label in training, for guidance.
        learn_sigma: output 2C channels, the noise and the interpolation weight of its variance.
        d_state, init, discretization, dt_min, dt_max, learn_B: the state-space layers, see `S4D`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        hidden_size: int = 1152,
        depth: int = 29,
        hourglass_ratio: int = 2,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        d_state: int = 64,
        init: Init = "lin",
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learn_B: bool = True,
    ) -> None:
        super().__init__()
        if hourglass_ratio < 1:
            raise ValueError(f"hourglass_ratio={hourglass_ratio}: must be at least 1")
        if hidden_size % hourglass_ratio:
            raise ValueError(f"hidden_size={hidden_size}: must be divisible by hourglass_ratio={hourglass_ratio}")
        for name, value in (("hidden_size", hidden_size), ("depth", depth), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: must be at least 1, or null for an unconditional model")
        self.in_channels, self.num_classes, self.learn_sigma = in_channels, num_classes, learn_sigma
        self.hourglass_ratio = hourglass_ratio

        self.x_embedder = linear(in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = (
            None if num_classes is None else LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        )
        self.blocks = nn.ModuleList(
            DiffuSSMBlock(
                hidden_size,
                hourglass_ratio,
                S4D(
                    hidden_size,
                    d_state,
                    init=init,
                    discretization=discretization,
                    dt_min=dt_min,
                    dt_max=dt_max,
                    learn_B=learn_B,
                ),
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, in_channels * (2 if learn_sigma else 1))

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", None if the model knows none."""
        return None if self.y_embedder is None else self.y_embedder.null_label

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Int[Tensor, "B"] | Float[Tensor, "B"],
        y: Int[Tensor, "B"] | None = None,
        drop_uniform: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B C_out H W"]:
        """The prediction for `x_t`.

        Args:
            t: timesteps, in the units of training (0 .. T-1).
            y: labels; None asks a conditional model for its unconditional prediction.
            drop_uniform: draws in [0, 1) that decide, in training mode only, which labels are dropped;
                by default they come from torch's global generator.
        """
        height, width = x_t.shape[-2:]
        if height * width % self.hourglass_ratio:
            raise ValueError(
                f"{height}x{width} latents have {height * width} tokens, which hourglass_ratio="
                f"{self.hourglass_ratio} does not divide"
            )
        c = self.t_embedder(t)  # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y, len(x_t), drop_uniform)
        elif y is not None:
            raise ValueError("this model is unconditional (num_classes is null): call it without labels")
        x = self.x_embedder(rearrange(x_t, "b c h w -> b (h w) c"))  # (B, L, D)
        x = x.to(x_t.dtype)  # the residual stream stays fp32 under autocast: it sums 29 small increments
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, L, C_out)
        return rearrange(x, "b (h w) c -> b c h w", h=height)


class DiffuSSMBlock(nn.Module):
    """x + alpha * Fusion(h, SSM(Dense(h))) with h = LayerNorm(x) (1 + gamma) + beta (figure 2b)."""

    def __init__(self, hidden_size: int, hourglass_ratio: int, ssm: S4D) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = linear(hidden_size, 3 * hidden_size, zero=True)
        self.dense = HourglassDense(hidden_size, hourglass_ratio)
        self.ssm = ssm
        self.fusion = HourglassFusion(hidden_size, hourglass_ratio)

    def forward(self, x: Float[Tensor, "B L D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B L D"]:
        gamma, beta, alpha = self.adaLN_modulation(silu(c)).chunk(3, dim=-1)
        h = modulate(self.norm(x), scale=gamma, shift=beta)
        shortened, u = self.dense(h)  # (B, J, D), (B, L, D)
        y = self.ssm(u)  # (B, L, 2D)
        return x + alpha[:, None] * self.fusion(shortened, y)


class HourglassDense(nn.Module):
    """I_j = concat_k Wx_k h_{Mj+k} and U_l = s(W_k^up s(W^0 I_j)); returns (I, U), at J and L tokens."""

    def __init__(self, hidden_size: int, hourglass_ratio: int) -> None:
        super().__init__()
        self.down = DownScale(hourglass_ratio, hidden_size, hidden_size // hourglass_ratio)
        self.mlp = linear(hidden_size, hidden_size)
        self.up = UpScale(hourglass_ratio, hidden_size, hidden_size)

    def forward(self, h: Float[Tensor, "B L D"]) -> tuple[Float[Tensor, "B J D"], Float[Tensor, "B L D"]]:
        shortened = self.down(h)
        return shortened, gelu(self.up(gelu(self.mlp(shortened))))


class HourglassFusion(nn.Module):
    """I'_j = concat_k s(W_k^down Y_{Mj+k}), O_j = W^3 (s(W^2 I'_j) * s(W^1 I_j)), o_l = W_k^out O_j."""

    def __init__(self, hidden_size: int, hourglass_ratio: int) -> None:
        super().__init__()
        self.down = DownScale(hourglass_ratio, 2 * hidden_size, 2 * hidden_size // hourglass_ratio)
        self.gate = linear(hidden_size, hidden_size)  # W^1
        self.value = linear(2 * hidden_size, hidden_size)  # W^2
        self.out = linear(hidden_size, hidden_size)  # W^3
        self.up = UpScale(hourglass_ratio, hidden_size, hidden_size)

    def forward(self, shortened: Float[Tensor, "B J D"], y: Float[Tensor, "B L D2"]) -> Float[Tensor, "B L D"]:
        value = self.value(gelu(self.down(y)))
        return self.up(self.out(gelu(value) * gelu(self.gate(shortened))))


class FinalLayer(nn.Module):
    """Conditioned LayerNorm and a linear decoder per token, zero-initialised: (B, L, D) -> (B, L, C_out)."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = linear(hidden_size, 2 * hidden_size, zero=True)
        self.linear = linear(hidden_size, out_channels, zero=True)

    def forward(self, x: Float[Tensor, "B L D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B L C_out"]:
        scale, shift = self.adaLN_modulation(silu(c)).chunk(2, dim=-1)
        x = modulate(self.norm(x), scale=scale, shift=shift)
        with torch.autocast(x.device.type, enabled=False):  # the prediction itself is not rounded to bf16
            return self.linear(x.to(self.linear.weight.dtype))
