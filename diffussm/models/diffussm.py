"""DiffuSSM: a diffusion network that mixes tokens with bidirectional state-space models, not attention.

After "Diffusion Models Without Attention" (Yan, Gu, Rush; CVPR 2024, arXiv 2311.18257), section 4 and
figure 2. Latents are flattened row by row, so token l stands for one latent pixel (or patch). Only the dense
layers work on the shortened sequence J = L / M; the state-space model always sees all L tokens.

    DiffuSSM            to_tokens, embed -> run_blocks: N x DiffuSSMBlock -> FinalLayer
    DiffuSSMBlock       adaLN-Zero residual around  HourglassDense -> S4D -> HourglassFusion

The paper's text and equations allow two readings. `figure`: the residual stream has L tokens, each block
shortens it and lengthens it again by learned maps. `equation`: the stream itself has J tokens, M latent pixels
each, and the gate is 2D wide. `figure` is nearer to the paper's parameter count.

The functions below `DiffuSSM` are what networks of these blocks share.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from diffussm.models.layers import (
    Denoiser,
    DownScale,
    UpScale,
    gated_sum,
    linear,
    modulate,
    recomputed,
    require_choice,
    require_positive,
    sincos_positions,
)
from diffussm.models.ssm import S4D, Discretization, Init

Reading = Literal["figure", "equation"]
TokenOrder = Literal["raster", "serpentine", "alternating"]
Positions = Literal["none", "sincos"]


class DiffuSSM(Denoiser):
    """Predict the noise, and the variance if `learn_sigma`, of a noisy latent at timestep t.

    Args:
        in_channels: latent channels C.
        num_classes: classes y in 0..num_classes-1; None for an unconditional model, which takes no y.
        hidden_size: width D; divisible by `hourglass_ratio`.
        depth: number of blocks.
        hourglass_ratio: M, by which the dense layers shorten the sequence; L must be divisible by it.
        patch_size: side of the square of latent pixels that makes a token; the paper uses 1.
        reading: of the paper's block, `figure` or `equation` (see the module).
        bidirectional: whether each block also runs a state-space model from the last token to the first.
        token_order: in which order the state-space models see the tokens: `raster`, row by row; `serpentine`,
            every other row backwards; `alternating`, row by row and column by column in turn.
        positions: add DiT's fixed `sincos` positions to the embedded tokens, or `none` as in the paper.
        class_dropout_prob: share of labels replaced by the null label in training, for guidance.
        learn_sigma: output 2C channels, the noise and the interpolation weight of its variance.
        d_state, init, discretization, dt_min, dt_max, learn_B: the state-space layers, see `S4D`.
        activation_checkpointing: in training, keep only each block's input and compute the block twice.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        hidden_size: int = 1152,
        depth: int = 29,
        hourglass_ratio: int = 2,
        patch_size: int = 1,
        reading: Reading = "figure",
        bidirectional: bool = True,
        token_order: TokenOrder = "raster",
        positions: Positions = "none",
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        d_state: int = 64,
        init: Init = "lin",
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learn_B: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes, learn_sigma)
        require_options(hidden_size, depth, hourglass_ratio, patch_size, token_order, positions)
        require_choice("reading", reading, Reading)
        self.hourglass_ratio, self.patch_size, self.positions = hourglass_ratio, patch_size, positions
        self.token_order, self.activation_checkpointing = token_order, activation_checkpointing
        # how many tokens share one vector of the residual stream
        self.group_size = hourglass_ratio if reading == "equation" else 1

        pixels = patch_size**2 * self.group_size
        self.x_embedder = linear(in_channels * pixels, hidden_size)
        self.make_embedders(hidden_size, class_dropout_prob)
        ssm = partial(S4D, hidden_size, d_state, bidirectional, init, discretization, dt_min, dt_max, learn_B)
        self.blocks = make_blocks(hidden_size, depth, hourglass_ratio, ssm, reading)
        self.final_layer = FinalLayer(hidden_size, self.out_channels * pixels)

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
        embeddings = self.embed(t, y, drop_uniform)
        c = sum(embeddings[1:], start=embeddings[0])  # (B, D)
        tokens, (height, width) = to_tokens(x_t, self.patch_size, self.hourglass_ratio)
        x = self.x_embedder(rearrange(tokens, "b (j m) i -> b j (m i)", m=self.group_size))  # (B, L or J, D)
        x = x.to(x_t.dtype)  # the residual stream stays fp32 under autocast: it sums 29 small increments
        if self.positions == "sincos":
            x = x + sincos_positions(x.shape[-1], height, width, x.device)[:: self.group_size].to(x)
        recompute = self.activation_checkpointing and self.training
        x = run_blocks(self.blocks, x, c, (height, width), self.token_order, recompute=recompute)
        x = self.final_layer(x, c)
        x = rearrange(x, "b j (m o) -> b (j m) o", m=self.group_size)  # (B, L, C_out p p)
        p = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)


def require_options(
    hidden_size: int, depth: int, hourglass_ratio: int, patch_size: int, token_order: str, positions: str
) -> None:
    """ValueError names the first option with which no network of DiffuSSM's blocks can be made."""
    require_positive(hidden_size=hidden_size, depth=depth)
    require_positive(hourglass_ratio=hourglass_ratio, patch_size=patch_size)
    if hidden_size % hourglass_ratio:
        raise ValueError(f"hidden_size={hidden_size}: must be divisible by hourglass_ratio={hourglass_ratio}")
    require_choice("token_order", token_order, TokenOrder)
    require_choice("positions", positions, Positions)
    if positions == "sincos":
        sincos_positions(hidden_size, 1, 1)  # refuses a width that it does not fit


def make_blocks(
    hidden_size: int, depth: int, hourglass_ratio: int, ssm: Callable[[], S4D], reading: Reading = "figure"
) -> nn.ModuleList:
    """`depth` blocks, each around a state-space layer of its own that `ssm` makes."""
    return nn.ModuleList(DiffuSSMBlock(hidden_size, hourglass_ratio, ssm(), reading) for _ in range(depth))


def to_tokens(
    x: Float[Tensor, "B C H W"], patch_size: int, hourglass_ratio: int
) -> tuple[Float[Tensor, "B L p_p_C"], tuple[int, int]]:
    """Latents as one vector per patch, row by row, and the rows and columns of this grid.

    ValueError if the latents cannot be cut into patches, or their tokens into groups of `hourglass_ratio`.
    """
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} latents: not divisible by {patch_size=}")
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    if tokens.shape[1] % hourglass_ratio:
        raise ValueError(
            f"{height}x{width} latents have {tokens.shape[1]} tokens, which {hourglass_ratio=} does not divide"
        )
    return tokens, (height // patch_size, width // patch_size)


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "B T D"],
    c: Float[Tensor, "B D"],
    grid: tuple[int, int],
    token_order: TokenOrder,
    *,
    recompute: bool = False,
) -> Float[Tensor, "B T D"]:
    """The residual stream after all blocks, whose state-space models see a grid's tokens in `token_order`.

    With `recompute` the backward pass needs each block's input only and computes the block again.
    """
    if token_order == "alternating":
        names = [("raster", "columns")[index % 2] for index in range(len(blocks))]
    else:
        names = [token_order] * len(blocks)
    orders = {name: _token_order(name, *grid, x.device) for name in set(names)}
    for block, name in zip(blocks, names, strict=True):
        inputs = x, c, orders[name]
        x = recomputed(block, *inputs) if recompute else block(*inputs)
    return x


def _token_order(
    name: str, height: int, width: int, device: torch.device
) -> tuple[Int[Tensor, "L"], Int[Tensor, "L"]] | None:
    """Which token of the raster comes at each place of the sequence, and the inverse; None for the raster."""
    if name == "raster":
        return None
    raster = torch.arange(height * width, device=device).view(height, width)
    if name == "columns":
        places = raster.T.flatten()
    else:
        even = torch.arange(height, device=device)[:, None] % 2 == 0
        places = torch.where(even, raster, raster.flip(1)).flatten()
    return places, places.argsort()


class DiffuSSMBlock(nn.Module):
    """x + alpha * Fusion(h, SSM(Dense(h))) with h = LayerNorm(x) (1 + gamma) + beta (figure 2b)."""

    def __init__(self, hidden_size: int, hourglass_ratio: int, ssm: S4D, reading: Reading = "figure") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = linear(hidden_size, 3 * hidden_size, zero=True)
        self.dense = HourglassDense(hidden_size, hourglass_ratio, reading)
        self.ssm = ssm
        ssm_features = hidden_size * (2 if ssm.bidirectional else 1)
        self.fusion = HourglassFusion(hidden_size, hourglass_ratio, ssm_features, reading)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        c: Float[Tensor, "B D"],
        order: tuple[Int[Tensor, "L"], Int[Tensor, "L"]] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """T is L, or J in the `equation` reading; `order` is the places of tokens for the SSM, and back."""
        gamma, beta, alpha = self.adaLN_modulation(silu(c)).chunk(3, dim=-1)
        h = modulate(self.norm(x), scale=gamma, shift=beta)
        shortened, u = self.dense(h)  # (B, J, D), (B, L, D)
        if order is None:
            y = self.ssm(u)  # (B, L, 2D)
        else:
            places, back = order
            y = self.ssm(u[:, places])[:, back]
        return gated_sum(x, alpha, self.fusion(shortened, y))


class HourglassDense(nn.Module):
    """I_j and U_l = s(W_k^up s(W^0 I_j)); returns (I, U), at J and L tokens.

    I_j = concat_k Wx_k h_{Mj+k} in the `figure` reading, I = h in the `equation` reading.
    """

    def __init__(self, hidden_size: int, hourglass_ratio: int, reading: Reading) -> None:
        super().__init__()
        self.down = (
            DownScale(hourglass_ratio, hidden_size, hidden_size // hourglass_ratio)
            if reading == "figure"
            else nn.Identity()
        )
        self.mlp = linear(hidden_size, hidden_size)  # W^0
        self.up = UpScale(hourglass_ratio, hidden_size, hidden_size)

    def forward(self, h: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B J D"], Float[Tensor, "B L D"]]:
        shortened = self.down(h)
        return shortened, gelu(self.up(gelu(self.mlp(shortened))))


class HourglassFusion(nn.Module):
    """I'_j = concat_k s(W_k^down Y_{Mj+k}), O_j = W^3 (s(W^2 I'_j) * s(W^1 I_j)).

    The `figure` reading gates at width D and ends with o_l = W_k^out O_j at L tokens; `equation` gates at
    width 2D and ends with O at J tokens. Y has `ssm_features` (2D if bidirectional) features.
    """

    def __init__(self, hidden_size: int, hourglass_ratio: int, ssm_features: int, reading: Reading) -> None:
        super().__init__()
        is_figure = reading == "figure"
        gate_size = hidden_size if is_figure else 2 * hidden_size
        self.down = DownScale(hourglass_ratio, ssm_features, ssm_features // hourglass_ratio)
        self.gate = linear(hidden_size, gate_size)  # W^1
        self.value = linear(ssm_features, gate_size)  # W^2
        self.out = linear(gate_size, hidden_size)  # W^3
        self.up = UpScale(hourglass_ratio, hidden_size, hidden_size) if is_figure else nn.Identity()

    def forward(self, shortened: Float[Tensor, "B J D"], y: Float[Tensor, "B L D_y"]) -> Float[Tensor, "B T D"]:
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
