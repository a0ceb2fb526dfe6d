"""What of a run is saved: where it stands, and the optimiser's state by the names of parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffussm.runtime.errors import DivergedError, RunDirectoryError


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from its tensors: a checkpoint's train_state.json. By default, before any step."""

    data: Mapping[str, Any]  # the fingerprint of what it was trained on; always with image_shape
    step: int = 0
    images: int = 0
    ema_updates: int = 0
    skipped_steps: int = 0
    loss_scale: Mapping[str, Any] = field(default_factory=dict)
    window: Mapping[str, Any] | None = None
    pending: Sequence[str] = ()  # what was due with this step and is still to be done
    imported: Mapping[str, Any] | None = None  # the file that it began with, if its weights are not its own


def check_train_state(document: Mapping[str, Any], where: object) -> None:
    """RunDirectoryError unless this is what a TrainState becomes as JSON."""
    counts = ("step", "images", "ema_updates", "skipped_steps")
    known = {item.name for item in fields(TrainState)}
    whole = (
        "data" in document
        and document.keys() <= known
        and all(isinstance(document.get(name, 0), int) and document.get(name, 0) >= 0 for name in counts)
        and isinstance(document.get("pending", []), list)
        and isinstance(document.get("window"), dict | None)
    )
    if not whole:
        raise RunDirectoryError(f"{where}/train_state.json: not what a checkpoint holds: use another checkpoint")


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter as `parameter/field`."""
    return {
        f"{name}/{field}": tensor
        for name, parameter in model.named_parameters()
        for field, tensor in optimizer.state.get(parameter, {}).items()
    }


def owners(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Finds the parameter that an entry of `optimizer_state` is of."""
    parameters = dict(model.named_parameters())
    return lambda key: parameters.get(key.rpartition("/")[0])


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_state` gave; RunDirectoryError for what is of no parameter."""
    parameters = dict(model.named_parameters())
    for key, tensor in state.items():
        name, _, field = key.rpartition("/")
        if name not in parameters or tensor.shape not in ((), parameters[name].shape):
            raise RunDirectoryError(f"optimizer.safetensors of the checkpoint: {key} is of no parameter here")
        optimizer.state[parameters[name]][field] = tensor.to(parameters[name].device)


def refuse_non_finite(tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """DivergedError for anything that no checkpoint should hold."""
    for group in tensors.values():
        for name, tensor in group.items():
            if not tensor.isfinite().all():
                raise DivergedError(
                    f"{name} is no longer finite at step {step}, nothing was saved: lower optimizer.lr; "
                    "the checkpoints before it are intact"
                )
