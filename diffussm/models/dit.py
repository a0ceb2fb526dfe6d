"""DiT: a diffusion network of transformer blocks over patches, the baseline that DiffuSSM is measured against.

After "Scalable Diffusion Models with Transformers" (Peebles, Xie; ICCV 2023, arXiv 2212.09748), section 3.2.
Parameters bear the names of the authors' public checkpoints. The paper's four ways of conditioning:

    adaln_zero        AdaLNBlock: scale, shift and a gate per branch from c = embed(t) + embed(y); all begin at 0
    adaln             AdaLNBlock without gates
    cross_attention   PlainBlock that also attends to the two tokens embed(t), embed(y)
    in_context        PlainBlock over a sequence that ends in these two tokens
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from diffussm.models.layers import (
    Denoiser,
    gated_sum,
    linear,
    modulate,
    recomputed,
    require_choice,
    require_positive,
    sincos_positions,
    tag,
)

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]


class DiT(Denoiser):
    """Predict the noise, and the variance if `learn_sigma`, of a noisy latent at timestep t.

    Args:
        in_channels: latent channels C.
        num_classes: classes y in 0..num_classes-1; None for an unconditional model, which takes no y.
        input_size: side of the square latents, divisible by `patch_size`; positions are made for this grid.
        patch_size: side of the squares of latent pixels that become one token each.
        hidden_size: width D; divisible by `num_heads`, and by 4 for the positions.
        depth: number of blocks.
        mlp_ratio: width of a block's MLP, in units of D.
        conditioning: how t and y enter, see above.
        class_dropout_prob: share of labels replaced by the null label in training, for guidance.
        learn_sigma: output 2C channels, the noise and the interpolation weight of its variance.
        activation_checkpointing: in training, recompute each block in the backward pass to save memory.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        input_size: int = 32,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        conditioning: Conditioning = "adaln_zero",
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes, learn_sigma)
        require_positive(input_size=input_size, patch_size=patch_size)
        require_positive(hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        require_choice("conditioning", conditioning, Conditioning)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size}: must be divisible by num_heads={num_heads}")
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size}: must be divisible by patch_size={patch_size}")
        mlp_size = round(hidden_size * mlp_ratio)
        if mlp_size < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio}: must make the MLP at least one wide")
        self.input_size, self.patch_size, self.conditioning = input_size, patch_size, conditioning
        self.num_heads, self.activation_checkpointing = num_heads, activation_checkpointing

        side = input_size // patch_size
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.register_buffer("pos_embed", sincos_positions(hidden_size, side, side)[None])
        self.make_embedders(hidden_size, class_dropout_prob)
        self.has_adaln = conditioning in ("adaln_zero", "adaln")
        self.blocks = nn.ModuleList(
            AdaLNBlock(hidden_size, num_heads, mlp_size, gated=conditioning == "adaln_zero")
            if self.has_adaln
            else PlainBlock(hidden_size, num_heads, mlp_size, cross_attention=conditioning == "cross_attention")
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, has_adaln=self.has_adaln)

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
        if (height, width) != (self.input_size, self.input_size):
            raise ValueError(f"input_size={self.input_size}: {height}x{width} latents need another model")
        embeddings = self.embed(t, y, drop_uniform)  # (B, D) each
        x = self.x_embedder(x_t) + self.pos_embed  # (B, L, D); fp32 positions keep the stream fp32 under autocast
        num_tokens = x.shape[1]
        if self.has_adaln:
            condition = sum(embeddings[1:], start=embeddings[0])  # (B, D)
        else:
            condition = torch.stack([embedding.to(x.dtype) for embedding in embeddings], dim=1)  # (B, 1 or 2, D)
        if self.conditioning == "in_context":
            x = torch.cat([x, condition], dim=1)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = recomputed(block, x, condition)
            else:
                x = block(x, condition)
        x = self.final_layer(x[:, :num_tokens], condition)  # (B, L, p p C_out)
        p, side = self.patch_size, self.input_size // self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)


class PatchEmbedder(nn.Module):
    """One linear map of every patch, row by row: (B, C, H, W) -> (B, L, D)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = tag(nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size))
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))  # as the linear map that it is
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class AdaLNBlock(nn.Module):
    """Attention, then an MLP, each after a LayerNorm whose scale and shift come from c.

    With gates (adaLN-Zero) each branch is scaled by a third vector from c. All these vectors are 0 at first,
    so that a gated block begins as the identity and one without gates as a plain transformer block.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(hidden_size, affine=False), _norm(hidden_size, affine=False)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, mlp_size)
        self.is_gated = gated
        self.adaLN_modulation = _modulation(hidden_size, 6 if gated else 4)

    def forward(self, x: Float[Tensor, "B L D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B L D"]:
        vectors = self.adaLN_modulation(c)
        if self.is_gated:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors.chunk(6, dim=-1)
        else:
            shift_msa, scale_msa, shift_mlp, scale_mlp = vectors.chunk(4, dim=-1)
            gate_msa = gate_mlp = torch.ones_like(shift_msa)
        x = gated_sum(x, gate_msa, self.attn(modulate(self.norm1(x), scale_msa, shift_msa)))
        return gated_sum(x, gate_mlp, self.mlp(modulate(self.norm2(x), scale_mlp, shift_mlp)))


class PlainBlock(nn.Module):
    """Attention, attention to the tokens of the condition if wanted, then an MLP, each after a LayerNorm."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, cross_attention: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(hidden_size, affine=True), _norm(hidden_size, affine=True)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm_cross = _norm(hidden_size, affine=True) if cross_attention else None
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross_attention else None
        self.mlp = MLP(hidden_size, mlp_size)

    def forward(self, x: Float[Tensor, "B L D"], tokens: Float[Tensor, "B S D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attn(self.norm1(x))
        if self.norm_cross is not None and self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_cross(x), tokens)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Multi-head attention among tokens; `qkv` holds the maps of queries, keys and values in this order."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(hidden_size, 3 * hidden_size)
        self.proj = linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(_attend(q, k, v, self.num_heads))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to other tokens; `kv` holds the maps of keys and values in this order."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = linear(hidden_size, hidden_size)
        self.kv = linear(hidden_size, 2 * hidden_size)
        self.proj = linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B L D"], tokens: Float[Tensor, "B S D"]) -> Float[Tensor, "B L D"]:
        k, v = self.kv(tokens).chunk(2, dim=-1)
        return self.proj(_attend(self.q(x), k, v, self.num_heads))


class MLP(nn.Module):
    """Two linear maps with a tanh GELU between."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = linear(hidden_size, mlp_size)
        self.fc2 = linear(mlp_size, hidden_size)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """LayerNorm, conditioned if `has_adaln`, and a linear decoder per token, zero-initialised."""

    def __init__(self, hidden_size: int, out_features: int, *, has_adaln: bool) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size, affine=not has_adaln)
        self.linear = linear(hidden_size, out_features, zero=True)
        self.adaLN_modulation = _modulation(hidden_size, 2) if has_adaln else None

    def forward(self, x: Float[Tensor, "B L D"], condition: Tensor) -> Float[Tensor, "B L D_out"]:
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
            x = modulate(x, scale, shift)
        with torch.autocast(x.device.type, enabled=False):  # the prediction itself is not rounded to bf16
            return self.linear(x.to(self.linear.weight.dtype))


def _attend(
    q: Float[Tensor, "B L D"], k: Float[Tensor, "B S D"], v: Float[Tensor, "B S D"], num_heads: int
) -> Float[Tensor, "B L D"]:
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=num_heads) for x in (q, k, v))
    return rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")


def _norm(hidden_size: int, *, affine: bool) -> nn.LayerNorm:
    return tag(nn.LayerNorm(hidden_size, elementwise_affine=affine, eps=1e-6))


def _modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """adaLN's vectors from the condition, all 0 at first."""
    return nn.Sequential(nn.SiLU(), linear(hidden_size, num_vectors * hidden_size, zero=True))
