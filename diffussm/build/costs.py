"""What a configured model costs, and the autoencoder that makes its latents."""

import functools
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffussm.build.instantiation import construct
from diffussm.data.autoencoder import FrozenAutoencoder
from diffussm.models.complexity import Complexity, measure_complexity, measure_module
from diffussm.training.throughput import training_flops


@functools.cache
def _complexity_of(model: str, latent_shape: tuple[int, ...]) -> Complexity:
    # Of a model without memory, whatever becomes of the one that is trained: it may be compiled or sharded.
    with torch.device("meta"):
        network = construct(OmegaConf.create(model), "model")  # type: ignore[arg-type]
    return measure_complexity(network, latent_shape)


def complexity_of(model: DictConfig, latent_shape: tuple[int, ...]) -> Complexity:
    """What a configured model costs on latents (C, H, W); measured once."""
    return _complexity_of(OmegaConf.to_yaml(model, resolve=True), latent_shape)


def training_flops_of(model: DictConfig, latent_shape: tuple[int, ...]) -> int:
    """Floating-point operations of training a configured model on one image."""
    cost = complexity_of(model, latent_shape)
    return training_flops(cost.flops + cost.ssm_flops, bool(model.get("activation_checkpointing", False)))


# Of every AutoencoderKL with a factor of 8 that there is a preset for, whose config.json need not be here.
_STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def autoencoder_macs(
    autoencoder: FrozenAutoencoder, image_shape: tuple[int, int, int]
) -> tuple[int, int, bool] | None:
    """Multiply-accumulates of encoder and decoder on one whole image (C, H, W), and whether they are certain.

    They are where config.json is here. Where it is not, Stable Diffusion's network is taken for any with its
    factor; None for another.
    """
    import diffusers  # here, because it takes seconds

    is_here = autoencoder.files.is_here
    if is_here:
        config = dict(autoencoder.files.config)
    elif autoencoder.class_name == "AutoencoderKL" and autoencoder.factor == 8:
        config = {**_STABLE_DIFFUSION, "latent_channels": autoencoder.latent_channels}
    else:
        return None
    with torch.device("meta"):
        network = getattr(diffusers, autoencoder.class_name).from_config(config)
    latent_shape = autoencoder.latent_shape(image_shape)
    encoder, decoder = (
        measure_module(_Half(network, name), torch.zeros(1, *shape, device="meta")).macs
        for name, shape in (("encode", image_shape), ("decode", latent_shape))
    )
    return encoder, decoder, is_here


class _Half(nn.Module):
    """The encoder or the decoder of an autoencoder of diffusers."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: Tensor) -> Any:
        return getattr(self.network, self.name)(x, return_dict=False)
