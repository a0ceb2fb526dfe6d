"""Layers that the networks share, and the shape alphabet of the whole package.

    B batch      C latent channels      H W latent height, width      L tokens = H W
    M hourglass ratio      J = L / M shortened length      D width      N SSM state size
    E width of the conditioning vector

`tag` marks each parameter, where it is made, with the role that the optimiser needs to know.
"""

import math
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Role = Literal["decay", "no_decay", "ssm"]
Tagged = TypeVar("Tagged", bound=nn.Parameter | nn.Module)


def tag(item: Tagged, role: Role | None = None) -> Tagged:
    """Give a parameter, or every parameter of a module, its optimiser role; returns the item itself.

    decay: matrices, subject to weight decay. no_decay: biases, gains, embeddings. ssm: A, B and dt of a
    state-space model, with a learning rate of their own and no decay. Without a role, matrices decay.
    """
    parameters = [item] if isinstance(item, nn.Parameter) else list(item.parameters())
    for parameter in parameters:
        parameter.role = role or ("decay" if parameter.ndim > 1 else "no_decay")  # type: ignore[attr-defined]
    return item


def require_positive(**sizes: int) -> None:
    """ValueError names the first size that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def require_choice(name: str, value: str, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value}: choose {', '.join(get_args(choices))}")


def linear(in_features: int, out_features: int, *, zero: bool = False) -> nn.Linear:
    """A tagged `nn.Linear`, xavier-uniform (or zero) with zero bias."""
    layer = nn.Linear(in_features, out_features)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return tag(layer)


class _Bank(nn.Module):
    """M linear maps, one for each position k within a group of M neighbouring tokens."""

    def __init__(self, num_maps: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(num_maps, out_features, in_features)))
        self.bias = tag(nn.Parameter(torch.zeros(num_maps, out_features)), "no_decay")
        for weight in self.weight.data:
            nn.init.xavier_uniform_(weight)


class DownScale(_Bank):
    """Shorten: map token k of each group by W_k and lay the M results side by side.

    (B, L, in_features) -> (B, L/M, M * out_features).
    """

    def forward(self, x: Float[Tensor, "B L D_in"]) -> Float[Tensor, "B J M_D_out"]:
        x = rearrange(x, "b (j m) i -> b j m i", m=len(self.weight))
        x = torch.einsum("bjmi,moi->bjmo", x, self.weight) + self.bias
        return x.flatten(2)


class UpScale(_Bank):
    """Lengthen: token k of each group is W_k applied to the group's vector.

    (B, L/M, in_features) -> (B, L, out_features).
    """

    def forward(self, x: Float[Tensor, "B J D_in"]) -> Float[Tensor, "B L D_out"]:
        x = nn.functional.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return rearrange(x, "b j (m o) -> b (j m) o", m=len(self.weight))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP: (B,) -> (B, E)."""

    def __init__(self, embedding_dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        layers = linear(frequency_dim, embedding_dim), linear(embedding_dim, embedding_dim)
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1])

    def forward(self, t: Int[Tensor, "B"] | Float[Tensor, "B"]) -> Float[Tensor, "B E"]:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_sinusoid(t, self.frequency_dim).to(dtype))


def timestep_sinusoid(
    t: Int[Tensor, "B"] | Float[Tensor, "B"], dim: int, max_period: float = 10_000.0
) -> Float[Tensor, "B dim"]:
    """[cos(t w_k), sin(t w_k)] with w_k = max_period^(-k / (dim/2)), k = 0 .. dim/2 - 1, in fp32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    phase = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def sincos_positions(
    dim: int, height: int, width: int, device: torch.device | None = None
) -> Float[Tensor, "L dim"]:
    """DiT's fixed positions of a grid, row by row: half of `dim` for the column, half for the row, fp32.

    Each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-4k / dim); `dim` is divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"hidden_size={dim}: must be divisible by 4 for sin-cos positions")
    frequency = 10_000.0 ** (-4 * torch.arange(dim // 4, dtype=torch.float64, device=device) / dim)
    row, column = (torch.arange(side, device=device)[:, None] * frequency for side in (height, width))
    row, column = (torch.cat([phase.sin(), phase.cos()], dim=1).float() for phase in (row, column))
    shape = height, width, dim // 2
    return torch.cat([column.expand(shape), row[:, None].expand(shape)], dim=2).flatten(0, 1)


class LabelEmbedder(nn.Module):
    """Class labels to vectors: (B,) in 0..num_classes-1 -> (B, E); the only place where labels are dropped.

    With `dropout_prob` > 0 the table has one more row, the null label, which stands for "no class".
    """

    def __init__(self, num_classes: int, embedding_dim: int, dropout_prob: float) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: must be at least 1, or null for an unconditional model")
        if not 0 <= dropout_prob < 1:
            raise ValueError(f"class_dropout_prob={dropout_prob}: must be at least 0 and below 1")
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.null_label = num_classes if dropout_prob > 0 else None
        table = nn.Embedding(num_classes + (self.null_label is not None), embedding_dim)
        nn.init.normal_(table.weight, std=0.02)
        self.embedding_table = tag(table, "no_decay")

    def forward(
        self, y: Int[Tensor, "B"] | None, batch_size: int, drop_uniform: Float[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B E"]:
        """Embed `y` (None: the null label); in training replace a label where its uniform draw is < p."""
        if y is None:
            if self.null_label is None:
                raise ValueError("labels are needed: without class_dropout_prob there is no null label")
            device = next(self.embedding_table.parameters()).device
            y = torch.full((batch_size,), self.null_label, device=device)
        if self.training and self.null_label is not None:
            if drop_uniform is None:
                drop_uniform = torch.rand(y.shape, device=y.device)
            y = torch.where(self.dropped(drop_uniform), self.null_label, y)
        return self.embedding_table(y)

    def dropped(self, drop_uniform: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Which labels these uniform draws in [0, 1) drop."""
        return drop_uniform < self.dropout_prob


class Denoiser(nn.Module):
    """What the networks have in common: they are called as (x_t, t, y, drop_uniform) and embed t and y alike.

    `made_for_data`: how the names of tensors begin that another data set, or size of its images, has made anew.
    """

    made_for_data: ClassVar[tuple[str, ...]] = ("y_embedder.", "pos_embed")

    def __init__(self, in_channels: int, num_classes: int | None, learn_sigma: bool) -> None:
        super().__init__()
        require_positive(in_channels=in_channels)
        self.in_channels, self.num_classes, self.learn_sigma = in_channels, num_classes, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)

    def make_embedders(self, hidden_size: int, class_dropout_prob: float) -> None:
        """Add `t_embedder` and `y_embedder` (None for an unconditional model)."""
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = (
            None if self.num_classes is None else LabelEmbedder(self.num_classes, hidden_size, class_dropout_prob)
        )

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", None if the model knows none."""
        return None if self.y_embedder is None else self.y_embedder.null_label

    def embed(
        self, t: Tensor, y: Int[Tensor, "B"] | None, drop_uniform: Float[Tensor, "B"] | None
    ) -> list[Float[Tensor, "B D"]]:
        """The vectors of t and, in a conditional model, of y; None for y is the null label."""
        if self.y_embedder is None:
            if y is not None:
                raise ValueError("this model is unconditional (num_classes is null): call it without labels")
            return [self.t_embedder(t)]
        return [self.t_embedder(t), self.y_embedder(y, len(t), drop_uniform)]


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """A block's output, of whose computation only the inputs are kept: it is done again in the backward pass."""
    # Blocks draw no random numbers, so there is no state to keep for the second time.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def modulate(
    x: Float[Tensor, "B L D"], scale: Float[Tensor, "B D"], shift: Float[Tensor, "B D"]
) -> Float[Tensor, "B L D"]:
    """adaLN: x (1 + scale) + shift, the same for every token."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated_sum(
    x: Float[Tensor, "B L D"], gate: Float[Tensor, "B D"], branch: Float[Tensor, "B L D"]
) -> Float[Tensor, "B L D"]:
    """adaLN-Zero: x + gate branch, the gate the same for every token."""
    return torch.addcmul(x, gate[:, None], branch)
