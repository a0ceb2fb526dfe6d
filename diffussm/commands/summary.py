"""What a run will be, in lines for a person: told when it begins, and by `trainer.dry_run=true` in its place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import nn

from diffussm.build import complexity_of, training_flops_of
from diffussm.data.loader import is_latent_set
from diffussm.models.complexity import Complexity
from diffussm.plan.stages import BYTES, training_memory
from diffussm.training.optim import describe_groups

if TYPE_CHECKING:
    from diffussm.build import System
    from diffussm.data.images import Source
    from diffussm.training.trainer import Trainer


def summarize(system: "System", source: "Source", trainer: "Trainer") -> str:
    """A line for each thing to know."""
    config, total = system.config, trainer.total_images
    cost = complexity_of(config.model, system.latent_shape)
    flops = training_flops_of(config.model, system.latent_shape)
    parameters = _numel(trainer.model)
    ssm = f" and {_scaled(cost.ssm_flops)}FLOP of SSM" if cost.ssm_flops else ""
    lines = [
        ("run", f"{config.run_dir} ({_foresee(trainer)})"),
        ("model", f"{_name(config.model)}, {parameters:,} parameters, {_scaled(cost.macs)}MAC{ssm} per image"),
        ("data", _describe_data(system, source)),
        (
            "batch",
            f"{_count(trainer.batch_size, 'image')} = "
            + _arithmetic(trainer.batch_size, trainer.processes.world_size, trainer.parts),
        ),
        (
            "length",
            f"{total:,} images = {_count(-(-total // trainer.batch_size), 'step')}, "
            f"{total / len(source):,.1f} times the data",
        ),
        (
            "compute",
            f"{_scaled(flops)}FLOP per image, {_scaled(total * flops)}FLOP in all{_hours(trainer, flops)}",
        ),
        ("devices", f"{_describe_devices(trainer)}, {config.trainer.precision}"),
        *(("optimizer", line) for line in describe_groups(trainer.optimizer)),
        ("logged to", ", ".join(["metrics.jsonl", *map(str, config.logger)])),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


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
    num_shards: int = 1,
) -> list[str]:
    """A run that is only thought of: its model, data, batch arithmetic, length and optimiser.

    Args:
        run: the run directory and what becomes of it.
        parts: those of a process's share of a batch that it takes at once.
        num_shards: that together are the model.
    """
    trainer = config.trainer
    parameters = _numel(model)
    place = f"{world_size} processes, the first on {device}" if world_size > 1 else device
    place += _describe_shards(num_shards)
    return [
        f"run          {run}",
        f"model        {type(model).__name__}, {parameters:,} parameters, {trainer.precision} on {place}",
        f"data         {data}",
        f"batch        {trainer.batch_size:,} images = {_arithmetic(trainer.batch_size, world_size, parts)}",
        f"length       {trainer.total_images:,} images = {-(-trainer.total_images // trainer.batch_size):,} steps",
        *(f"optimizer    {line}" for line in describe_groups(optimizer)),
    ]


def describe_costs(
    config: DictConfig,
    cost: Complexity,
    *,
    model: nn.Module,
    tokens: int,
    parts: Sequence[range],
    num_shards: int = 1,
) -> list[str]:
    """What an image costs, and the memory that a device needs, from the cost of a process's first pass."""
    batch_size, num_averages = len(parts[0]), len(config.trainer.ema_decays) + len(config.trainer.ema_power)
    memory = training_memory(cost.parameters, num_averages, cost.activation_bytes, num_shards, len(parts))
    memory[f"activations of {batch_size} images"] = memory.pop("activations")
    drawing = ""
    if num_shards > 1:
        memory["blocks at work"] = _size_at_work(model)
        whole = BYTES * cost.parameters
        drawing = f"; {_size(whole)} for a whole average while pictures are drawn" if config.sampler else ""
    return [
        f"cost         {cost.macs / batch_size / 1e9:,.2f} GMAC per image and forward pass; {tokens:,} tokens",
        f"memory       about {_size(sum(memory.values()))} on each device: "
        + ", ".join(f"{what} {_size(size)}" for what, size in memory.items())
        + drawing,
    ]


def _size_at_work(model: nn.Module) -> int:
    """Bytes of the weights of a model in parts that are whole at a time, and of as many gradients.

    They are those of a block, of the one that comes next, and of all that is in no block.
    """
    blocks = getattr(model, "blocks", None)
    sizes = [_numel(block) for block in blocks] if isinstance(blocks, nn.ModuleList) else []
    return 2 * BYTES * (_numel(model) - sum(sizes) + sum(sorted(sizes)[-2:]))


def _foresee(trainer: "Trainer") -> str:
    """Where the run will begin."""
    found = trainer.checkpoints.foresee()
    if found is None:
        return "new"
    paths, images = trainer.checkpoints.paths(), found.document("train_state").get("images")
    reached = f", at {_count(images, 'image')}" if isinstance(images, int) else ""  # else it will be refused
    damaged = len(paths) - 1 - paths.index(found.path)
    passed = f", passing over {_count(damaged, 'damaged checkpoint')}" if damaged else ""
    return f"continues from {found.path.name}{reached}{passed}"


def _describe_data(system: "System", source: "Source") -> str:
    shape, latents = (" x ".join(map(str, sizes)) for sizes in (source.image_shape, system.latent_shape))
    classes = "no classes" if source.num_classes is None else _count(source.num_classes, "class", "es")
    if source.image_shape == system.latent_shape:
        seen = "seen as they are"
    else:
        made = "read" if is_latent_set(source) else "made"
        seen = f"seen as latents of {latents}, {made} by {_name(system.config.autoencoder)}"
    return f"{_count(len(source), 'image')} of {shape}, {classes}, {seen}"


def _arithmetic(batch_size: int, num_processes: int, parts: Sequence[range]) -> str:
    """The batch as processes, passes and images."""
    largest = max(len(part) for part in parts)
    is_even = batch_size == num_processes * len(parts) * largest
    images = _count(largest, "image")
    return " x ".join(
        [
            _count(num_processes, "process", "es"),
            _count(len(parts), "pass", "es"),
            images if is_even else "up to " + images,
        ]
    )


def _hours(trainer: "Trainer", flops: int) -> str:
    peak = trainer.throughput.peak if trainer.throughput else None
    if peak is None:
        return ""
    hours = trainer.total_images * flops / peak / trainer.processes.world_size / 3600
    return f" ({hours:,.1f} hours at an MFU of 100 %)"


def _describe_devices(trainer: "Trainer") -> str:
    count, device = trainer.processes.world_size, trainer.device
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device}{' for the first' if count > 1 else ''})"
    else:
        name = f"{device} with {_count(torch.get_num_threads(), 'thread')}{' each' if count > 1 else ''}"
    processes = f"{_count(count, 'process', 'es')} on " if count > 1 else ""
    return processes + name + _describe_shards(trainer.parallel.num_shards)


def _describe_shards(count: int) -> str:
    """What each device has of the model, if it is not all."""
    return f", 1/{count} of weights, moments and averages on each" if count > 1 else ""


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _name(node: Any) -> str:
    """The class, or a class whose method makes it."""
    return next(part for part in reversed(node._target_.split(".")) if part[:1].isupper())


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}{plural}"


def _scaled(number: float) -> str:
    """Three digits and the prefix of the unit that follows."""
    prefixes = iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while number >= 999.5 and prefix != "E":
        number, prefix = number / 1000, next(prefixes)
    return f"{number:,.3g} {prefix}" if number < 999.5 else f"{number:,.0f} {prefix}"


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
