"""What a run will be, in lines for a person: told when it begins, and by `trainer.dry_run=true` in its place."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import nn

from diffussm.models.complexity import Complexity
from diffussm.training.optim import describe_groups

BYTES = 4  # of a number in fp32
ADAM_MOMENTS = 2


def describe_run(
    config: DictConfig,
    *,
    run: str,
    device: str,
    data: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[range],
    world_size: int,
) -> list[str]:
    """The run, its model, data, batch arithmetic, length and optimiser.

    Args:
        run: the run directory and what becomes of it.
        parts: those of a process's share of a batch that it takes at once.
    """
    trainer = config.trainer
    parameters = sum(parameter.numel() for parameter in model.parameters())
    place = f"{world_size} processes, the first on {device}" if world_size > 1 else device
    return [
        f"run          {run}",
        f"model        {type(model).__name__}, {parameters:,} parameters, {trainer.precision} on {place}",
        f"data         {data}",
        f"batch        {trainer.batch_size} images = {world_size} process(es) x {len(parts)} pass(es) x "
        f"{len(parts[0])}",
        f"length       {trainer.total_images:,} images = {-(-trainer.total_images // trainer.batch_size):,} steps",
        *(f"optimizer    {line}" for line in describe_groups(optimizer)),
    ]


def describe_costs(config: DictConfig, cost: Complexity, tokens: int, batch_size: int) -> list[str]:
    """What an image costs, and the memory that a device needs, from the cost of a pass of `batch_size` images."""
    weights = BYTES * cost.parameters
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": ADAM_MOMENTS * weights,
        "averages": len(config.trainer.ema_decays) * weights,
        f"activations of {batch_size} images": cost.activation_bytes,
    }
    return [
        f"cost         {cost.macs / batch_size / 1e9:,.2f} GMAC per image and forward pass; {tokens:,} tokens",
        f"memory       about {_size(sum(memory.values()))} on each device: "
        + ", ".join(f"{what} {_size(size)}" for what, size in memory.items()),
    ]


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
