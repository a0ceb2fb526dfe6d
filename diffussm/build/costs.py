"""What a configured model costs."""

import functools

import torch
from omegaconf import DictConfig, OmegaConf

from diffussm.build.instantiation import construct
from diffussm.models.complexity import Complexity, measure_complexity
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
