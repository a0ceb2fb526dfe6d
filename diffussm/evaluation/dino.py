"""DINOv2, whose features see more of what people see: the network behind FD-DINOv2 (Stein et al. 2023)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from diffussm.evaluation.features import Features
from diffussm.evaluation.network import FrozenNetwork, load_weights, read_weights
from diffussm.runtime.errors import ConfigError, DataError

KEY = "evaluation.extractor.weights"
SIDE, PATCH, HEAD_WIDTH = 224, 14, 64
OFFSET = 0.1  # with which DINOv2 scales its grid of positions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(FrozenNetwork):
    """The class token of a vision transformer with patches of 14, of images resized to 224 (bicubic, antialiased).

    Args:
        weights: dinov2_vitl14_pretrain.pth of its authors, or these tensors as safetensors; the small and the
            base network are known by their shapes too. There is no published hash: the record holds the file's.
    """

    name = "dinov2"
    image_shape = (3, None, None)

    def __init__(
        self,
        weights: str,
        precision: Literal["fp32", "bf16"] = "fp32",
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(precision, compile, channels_last)
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{KEY}={weights}: no such file: give dinov2_vitl14_pretrain.pth of DINOv2's authors"
            )
        state, self.sha256 = read_weights(path, KEY)
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        if "pos_embed" not in state or not depth:
            raise DataError(
                f"{KEY}={path}: weights of another network: no pos_embed or blocks: choose another file"
            )
        _, positions, width = state["pos_embed"].shape
        self.network = VisionTransformer(width, depth, positions)
        load_weights(self.network, {k: v for k, v in state.items() if k != "mask_token"}, path, KEY)
        self.dims: Mapping[str, int] = {"pool": width}
        self.freeze()

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """There are none for sFID and IS."""
        x = interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return Features(self.network((x - mean) / std), None, None)


class VisionTransformer(nn.Module):
    """DINOv2's encoder under its own names, up to the normalised class token; positions (1 + side^2, width)."""

    def __init__(self, width: int, depth: int, positions: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B width"]:
        x = self.patch_embed["proj"](images)  # (B, width, h, w)
        height, width = x.shape[2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(height, width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions(self, height: int, width: int) -> Float[Tensor, "1 L width"]:
        """Those learned on a square grid, resampled to this one as DINOv2 does."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = [(height + OFFSET) / side, (width + OFFSET) / side]
        grid = interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and MLP, each normalised before, scaled per channel after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x: Float[Tensor, "B L width"]) -> Float[Tensor, "B L width"]:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD_WIDTH))  # (B, L, 3, heads, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        return x + self.ls2["gamma"] * self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))
