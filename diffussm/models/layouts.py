"""Layouts of DiT's weights: pure functions between state dicts, and what a state dict tells about its network.

    official     the authors' public checkpoints; the names and shapes of `DiT` itself
    diffusers    `DiTTransformer2DModel`: q, k and v apart, both embedders copied into every block, no pos_embed

Whatever does not fit is a ValueError that names it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffussm.models.layers import sincos_positions

Layout = Literal["official", "diffusers"]
State = Mapping[str, Tensor]

PUBLISHED_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}  # of (width, depth): S, B, L, XL
MAX_NAMES = 3  # how many of the names that do not fit are shown

# Official name, then the one of diffusers; each stands for a weight and a bias.
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),  # joined along the first axis
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_COPIED = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}


def detect_layout(state: State) -> Layout:
    """Whose names these are."""
    if any(name.startswith(("x_embedder.proj.", "blocks.0.attn.")) for name in state):
        return "official"
    if any(name.startswith(("pos_embed.proj.", "transformer_blocks.")) for name in state):
        return "diffusers"
    raise ValueError(f"neither the official DiT's names nor those of diffusers: {_some(state)}")


def infer_dit_arguments(state: State) -> dict[str, Any]:
    """The arguments of `DiT` that official weights tell by their shapes.

    num_heads shows in no shape: it is that of the published size with this width and depth, else None. A label
    table is taken to end in the null label; class_dropout_prob is then the official 0.1.
    """
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(state, "pos_embed", 3)
    outputs, _ = _shape(state, "final_layer.linear.weight", 2)
    mlp_size, _ = _shape(state, "blocks.0.mlp.fc1.weight", 2)
    depth = _depth(state, "blocks")
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"pos_embed: {tokens} tokens are no square grid")
    if outputs not in (channels * patch**2, 2 * channels * patch**2):
        raise ValueError(f"final_layer.linear.weight: {outputs} outputs are not once or twice {channels} channels")
    has_labels = "y_embedder.embedding_table.weight" in state
    return {
        "in_channels": channels,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1 if has_labels else None,
        "input_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": PUBLISHED_HEADS.get((width, depth)),
        "mlp_ratio": mlp_size / width,
        "conditioning": _conditioning(state),
        "class_dropout_prob": 0.1,
        "learn_sigma": outputs == 2 * channels * patch**2,
    }


def check_weights(state: State, wanted: State) -> None:
    """Refuse, in one line, a state dict without exactly the names and shapes of `wanted`."""
    misshapen = [
        f"{name}: {list(tensor.shape)} instead of {list(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    _refuse_misfits(state, wanted, misshapen)


def from_diffusers(state: State, input_size: int) -> dict[str, Tensor]:
    """Official weights from those of diffusers, whose every copy of an embedder must be the same.

    `input_size` is the side of the latents, which decides the table of positions.
    """
    joined, copied = _correspondence(_depth(state, "transformer_blocks"))
    _refuse_misfits(state, [name for parts in (joined | copied).values() for name in parts])
    official = {}
    for name, parts in joined.items():
        shapes = {state[part].shape for part in parts}
        if len(shapes) > 1 or shapes == {torch.Size()}:
            raise ValueError(f"{', '.join(parts)}: shapes that do not go together")
        official[name] = torch.cat([state[part] for part in parts])
    for name, copies in copied.items():
        for copy in copies:
            if not torch.equal(state[copy], state[copies[0]]):
                raise ValueError(f"{copy}: differs from {copies[0]}: DiT has one embedder for all blocks")
        official[name] = state[copies[0]]
    width, _, patch, _ = _shape(official, "x_embedder.proj.weight", 4)
    if input_size % patch:
        raise ValueError(f"input_size={input_size}: must be divisible by patch_size={patch}")
    official["pos_embed"] = sincos_positions(width, input_size // patch, input_size // patch)[None]
    return official


def to_diffusers(state: State) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`; refuses what diffusers has no place for."""
    arguments = infer_dit_arguments(state)
    for name, only in (("conditioning", "adaln_zero"), ("mlp_ratio", 4.0)):
        if arguments[name] != only:
            raise ValueError(f"{name}={arguments[name]}: diffusers has {only} only")
    if arguments["num_classes"] is None:
        raise ValueError("num_classes=None: diffusers has no unconditional DiT")
    width, side = arguments["hidden_size"], arguments["input_size"] // arguments["patch_size"]
    positions = state["pos_embed"]
    if not torch.allclose(positions[0].float(), sincos_positions(width, side, side), atol=1e-5):
        raise ValueError("pos_embed: not the sin-cos table, and diffusers knows no other")
    joined, copied = _correspondence(arguments["depth"])
    _refuse_misfits(state, ["pos_embed", *joined, *copied])
    # Every tensor has a memory of its own, without which safetensors does not write it.
    theirs: dict[str, Tensor] = {}
    for name, parts in joined.items():
        theirs |= {part: piece.clone() for part, piece in zip(parts, state[name].chunk(len(parts)), strict=True)}
    for name, copies in copied.items():
        theirs |= {copy: state[name].clone() for copy in copies}
    return theirs


def diffusers_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of `DiTTransformer2DModel` for these arguments of `DiT`.

    One difference remains: diffusers divides the exponents of the timestep's sinusoid by 127, DiT by 128.
    """
    heads, channels = arguments["num_heads"], arguments["in_channels"]
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": arguments["hidden_size"] // heads,
        "in_channels": channels,
        "out_channels": channels * (2 if arguments["learn_sigma"] else 1),
        "num_layers": arguments["depth"],
        "sample_size": arguments["input_size"],
        "patch_size": arguments["patch_size"],
        "num_embeds_ada_norm": arguments["num_classes"],
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_eps": 1e-6,  # its default is 1e-5
    }


def _correspondence(depth: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Official names to those of diffusers: parts to be joined (often one), and copies."""
    modules = {name: [theirs] for name, theirs in _OUTSIDE.items()}
    for n in range(depth):
        for name, parts in _IN_BLOCK.items():
            modules[f"blocks.{n}.{name}"] = [f"transformer_blocks.{n}.{part}" for part in parts]
    joined = {
        f"{name}.{kind}": [f"{part}.{kind}" for part in parts]
        for name, parts in modules.items()
        for kind in ("weight", "bias")
    }
    copied = {name: [f"transformer_blocks.{n}.{theirs}" for n in range(depth)] for name, theirs in _COPIED.items()}
    return joined, copied


def _conditioning(state: State) -> str:
    if "blocks.0.adaLN_modulation.1.weight" not in state:
        return "cross_attention" if "blocks.0.cross_attn.q.weight" in state else "in_context"
    rows, width = _shape(state, "blocks.0.adaLN_modulation.1.weight", 2)
    names = {6 * width: "adaln_zero", 4 * width: "adaln"}
    if rows not in names:
        raise ValueError(f"blocks.0.adaLN_modulation.1.weight: {rows} rows are neither 6 nor 4 times {width}")
    return names[rows]


def _depth(state: State, prefix: str) -> int:
    """The number of blocks; if theirs are not 0 to depth - 1, names will be found missing and unknown."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def _shape(state: State, name: str, num_axes: int) -> torch.Size:
    if name not in state:
        raise ValueError(f"{name}: missing")
    if state[name].ndim != num_axes:
        raise ValueError(f"{name}: has shape {list(state[name].shape)}, not {num_axes} axes")
    return state[name].shape


def _refuse_misfits(names: Iterable[str], wanted: Iterable[str], misshapen: Iterable[str] = ()) -> None:
    names, wanted = dict.fromkeys(names), dict.fromkeys(wanted)
    misfits = {
        "missing": [name for name in wanted if name not in names],
        "unknown": [name for name in names if name not in wanted],
        "of another shape": list(misshapen),
    }
    said = [f"{len(found)} {kind}: {_some(found)}" for kind, found in misfits.items() if found]
    if said:
        raise ValueError("weights do not fit: " + "; ".join(said))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
