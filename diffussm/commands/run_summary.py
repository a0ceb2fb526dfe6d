"""What `diffussm train` says before it begins: what the run is, what it will take, and where it goes on."""

from typing import TYPE_CHECKING, Any

import torch

from diffussm.build import complexity_of, training_flops_of
from diffussm.data.loader import is_latent_set
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
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    ssm = f" and {_scaled(cost.ssm_flops)}FLOP of SSM" if cost.ssm_flops else ""
    lines = [
        ("run", f"{config.run_dir} ({_foresee(trainer)})"),
        ("model", f"{_name(config.model)}, {parameters:,} parameters, {_scaled(cost.macs)}MAC{ssm} per image"),
        ("data", _describe_data(system, source)),
        ("batch", f"{_count(trainer.batch_size, 'image')} = {_arithmetic(trainer)}"),
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


def _foresee(trainer: "Trainer") -> str:
    """Where the run will begin."""
    found = trainer.checkpoints.foresee()
    if found is None:
        return "new"
    paths, images = trainer.checkpoints.paths(), found.document("train_state")["images"]
    damaged = len(paths) - 1 - paths.index(found.path)
    passed = f", passing over {_count(damaged, 'damaged checkpoint')}" if damaged else ""
    return f"continues from {found.path.name}, at {_count(images, 'image')}{passed}"


def _describe_data(system: "System", source: "Source") -> str:
    shape, latents = (" x ".join(map(str, sizes)) for sizes in (source.image_shape, system.latent_shape))
    classes = "no classes" if source.num_classes is None else _count(source.num_classes, "class", "es")
    if source.image_shape == system.latent_shape:
        seen = "seen as they are"
    else:
        made = "read" if is_latent_set(source) else "made"
        seen = f"seen as latents of {latents}, {made} by {_name(system.config.autoencoder)}"
    return f"{_count(len(source), 'image')} of {shape}, {classes}, {seen}"


def _arithmetic(trainer: "Trainer") -> str:
    """The batch as processes, passes and images."""
    num_processes, num_passes = trainer.processes.world_size, len(trainer.parts)
    largest = max(len(part) for part in trainer.parts)
    is_even = trainer.batch_size == num_processes * num_passes * largest
    images = _count(largest, "image")
    return " x ".join(
        [
            _count(num_processes, "process", "es"),
            _count(num_passes, "pass", "es"),
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
    processes = f"{_count(count, 'process', 'es')} on " if count > 1 else ""
    if device.type == "cuda":
        return f"{processes}{torch.cuda.get_device_name(device)} ({device}{' for the first' if count > 1 else ''})"
    return f"{processes}{device} with {_count(torch.get_num_threads(), 'thread')}{' each' if count > 1 else ''}"


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
