"""The weights of a checkpoint, by the names that users know, and the device that they go to."""

import re

import torch
from torch import Tensor, nn

from diffussm.runtime.errors import ConfigError, note
from diffussm.training import posthoc
from diffussm.training.checkpoint import Checkpoint


def choose_weights(checkpoint: Checkpoint, weights: str, key: str) -> str:
    """The full name of `weights` (ema stands for the first average) of a checkpoint; ConfigError names `key`."""
    if weights.startswith(posthoc.PREFIX):
        posthoc.plan(checkpoint, weights, note, key)
        return weights
    name = checkpoint.ema_names[0] if weights == "ema" else weights
    known = [*checkpoint.ema_names, "model"]
    if name not in known:
        raise ConfigError(f"{key}={weights}: {checkpoint.path} has {', '.join(known)}")
    return name


def read_weights(checkpoint: Checkpoint, name: str, key: str) -> dict[str, Tensor]:
    """The tensors of the weights with a full name; ConfigError names `key`."""
    if name.startswith(posthoc.PREFIX):
        return posthoc.reconstruct(checkpoint, name, note, key)
    return checkpoint.tensors(name)


def load_weights(checkpoint: Checkpoint, model: nn.Module, weights: str, key: str = "sampling.weights") -> str:
    """Load `weights`, as `choose_weights` knows them, into a model; returns their full name."""
    name = choose_weights(checkpoint, weights, key)
    checkpoint.check_model(model.state_dict())
    model.load_state_dict(read_weights(checkpoint, name, key))
    model.requires_grad_(False).eval()
    return name


def check_device_name(name: str) -> None:
    """Refuse what is a device nowhere."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device={name}: choose auto, cpu, cuda or cuda:N")


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    # Counted, not tried out: to touch a GPU is to hold memory there, and a process of many has another one.
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise ConfigError(f"device={name}: not available here: choose auto or cpu")
    return device
