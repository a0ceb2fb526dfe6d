"""`diffussm plan`: what a whole training will take, from raw archive to table row."""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffussm.build import System, autoencoder_macs, complexity_of, training_flops_of
from diffussm.commands import print_config, print_table
from diffussm.commands.dry_run import CPU, find_data, image_shape_of, try_step
from diffussm.compose import compose
from diffussm.config import EncodeConfig, nearest
from diffussm.data.autoencoder import FrozenAutoencoder
from diffussm.data.images import Source
from diffussm.data.latents import DTYPES
from diffussm.plan import stages
from diffussm.plan.facts import ARCHIVES, GPUS, Archive, find_archive, find_training
from diffussm.plan.stages import Entry, Known, Machine
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.launch import Place
from diffussm.training.trainer import split

ASSUMED_MFU, ASSUMED_SAMPLES = 0.35, 50_000
MATRIX_SIDE, MATRIX_REPETITIONS = 1024, 5
SMALLER = {
    "h": (60, "min"),
    "GB": (1000, "MB"),
    "GiB": (1024, "MiB"),
    "GMAC": (1000, "MMAC"),
}  # units of small jobs
COLUMNS = ("stage", "quantity", "value", "standing", "how")


def run(options: argparse.Namespace) -> int:
    """Print an entry for everything that can be known, stage by stage."""
    config = compose("plan", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    machine = _machine(config)
    entries = list(_entries(config, machine))
    entries += stages.totals(machine, entries, config.price_per_hour)
    if config.json:
        document = {
            "name": config.name,
            "gpus": machine.count,
            "gpu": machine.title,
            "mfu": dataclasses.asdict(machine.mfu),
            "entries": [dataclasses.asdict(entry) for entry in entries],
        }
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"{config.name} on {machine.count} x {machine.title}, MFU {machine.mfu.value:g} ({machine.mfu.standing})\n"
    )
    rows, before = [], ""
    for entry in entries:
        stage, before = ("" if entry.stage == before else entry.stage), entry.stage
        rows.append((stage, entry.quantity, _show(entry), entry.standing, entry.how))
    print_table(COLUMNS, rows, texts=("quantity", "standing", "how"))
    for entry in entries:
        if entry.remark:
            print(f"\n{entry.stage}, {entry.quantity.removeprefix('... ')}: {entry.remark}.")
    return 0


def _machine(config: DictConfig) -> Machine:
    mfu = Known(ASSUMED_MFU, "assumed") if config.mfu is None else Known(config.mfu, "given")
    if config.gpu == "cpu":
        rate = _matrix_rate()
        return Machine("CPU such as this one", config.gpus, mfu, lambda precision, tf32: rate, "measured")
    if config.gpu not in GPUS:
        known = [*GPUS, "cpu"]
        raise ConfigError(f"gpu={config.gpu}: choose {', '.join(known)}{nearest(config.gpu, known)}")
    gpu = GPUS[config.gpu]
    for key, precision in (("trainer", config.trainer.precision), ("sampling", config.sampling.precision)):
        if precision == "bf16" and not gpu.has_bf16:
            raise ConfigError(f"{key}.precision=bf16: gpu={config.gpu} has none: set it to fp16 or fp32")
    half = "bf16" if gpu.has_bf16 else "fp16"
    return Machine(gpu.title, config.gpus, mfu, gpu.peak, "published", gpu.memory_gib, gpu.watts, half)


def _matrix_rate() -> float:
    """Floating-point operations per second of this machine in a product of large matrices of fp32."""
    a = torch.randn(MATRIX_SIDE, MATRIX_SIDE)
    times = []
    for _ in range(MATRIX_REPETITIONS):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * MATRIX_SIDE**3 / min(times)


def _entries(config: DictConfig, machine: Machine) -> Iterator[Entry]:
    source, _ = find_data(config)
    image_shape = image_shape_of(config) if source is None else source.image_shape
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)  # of the noise schedule's own numbers
    system = System(config, image_shape, CPU, shapes_only)
    parts = split(
        config.trainer.batch_size, Processes(Place(world_size=config.gpus)), config.trainer.device_batch_size
    )
    archive = _archive(config)
    count = _count(config, source, archive)
    encoder, decoder, encoder_precision = _autoencoder_costs(system)
    yield from stages.raw(archive, count)

    autoencoder, settings = system.autoencoder, EncodeConfig()
    has_latents = config.data._target_.endswith(".LatentSet")
    if isinstance(autoencoder, FrozenAutoencoder) and has_latents:
        channels, *sides = system.latent_shape
        row_shape = ((2 if autoencoder.is_stochastic else 1) * channels, *sides)
        images_per_row = 1 if config.data.horizontal_flip is False else 2
        item = DTYPES[config.dtype].itemsize
        size = stages.latent_set_bytes(int(count.value), row_shape, images_per_row, item, settings.shard_size)
        each = images_per_row * math.prod(row_shape) * item
        shape = " x ".join(map(str, (images_per_row, *row_shape)))
        how = f"{shape} in {config.dtype}, {each:,} bytes per image"
        yield from stages.encoding(machine, count, size, how, images_per_row, encoder, encoder_precision)

    trainer = config.trainer
    cost, flops = (
        complexity_of(config.model, system.latent_shape),
        training_flops_of(config.model, system.latent_shape),
    )
    yield from stages.training(
        machine,
        macs=cost.macs,
        ssm_flops=cost.ssm_flops,
        flops=flops,
        total_images=trainer.total_images,
        batch_size=trainer.batch_size,
        precision=trainer.precision,
        tf32=trainer.tf32,
        recomputes=bool(config.model.get("activation_checkpointing", False)),
        encoder_macs=None if has_latents else encoder,
        encoder_precision=encoder_precision,
    )
    yield from stages.compute(cost.macs, trainer.total_images, find_training(_network(config), image_shape[1]))
    num_averages = len(trainer.ema_decays) + len(trainer.ema_power)
    step = try_step(system, shapes_only, len(parts[0]))
    num_shards = config.gpus if trainer.parallel == "fsdp" else 1
    needed = stages.training_memory(cost.parameters, num_averages, step.activation_bytes, num_shards, len(parts))
    yield from stages.memory(machine, needed, len(parts[0]))
    every = trainer.ema_snapshot_every_images
    yield from stages.checkpoints(
        stages.checkpoint_bytes(cost.parameters, num_averages),
        trainer.keep_checkpoints,
        trainer.total_images,
        trainer.save_every_images,
        snapshots=trainer.total_images // every if every else 0,
        snapshot_bytes=stages.BYTES * cost.parameters * len(trainer.ema_power),
    )
    if config.sampler:
        passes, is_guided = _count_passes(system, config)
        sampling = config.sampling
        yield from stages.evaluating(
            machine,
            samples=_samples(config),
            passes=passes,
            how_passes=f"counted: {_sampler_name(config)}, guidance.scale={config.guidance.scale:g}",
            flops=cost.flops + cost.ssm_flops,
            decoder_macs=decoder,
            decoder_precision=encoder_precision,
            precision=sampling.precision,
            tf32=sampling.tf32,
            doubles=not is_guided and config.model.num_classes is not None,
        )


def _archive(config: DictConfig) -> Archive | None:
    if config.archive is None:
        path = "" if "path" not in config.data or OmegaConf.is_missing(config.data, "path") else config.data.path
        return find_archive(f"{config.data._target_.rpartition('.')[2]} {path}")
    if config.archive not in ARCHIVES:
        raise ConfigError(
            f"archive={config.archive}: choose {', '.join(ARCHIVES)}{nearest(config.archive, ARCHIVES)}"
        )
    return ARCHIVES[config.archive]


def _count(config: DictConfig, source: Source | None, archive: Archive | None) -> Known:
    """How many images there are."""
    if config.num_images is not None:
        return Known(config.num_images, "given", "num_images")
    if source is not None:
        return Known(len(source), "computed", "counted in data.path" if "path" in config.data else "counted")
    if archive is None:
        raise ConfigError("num_images=null: the data is not there to be counted: set it, or archive=imagenet")
    return Known(archive.num_images, "published", archive.title)


def _autoencoder_costs(system: System) -> tuple[Known | None, Known | None, str]:
    """Of the encoder and the decoder on an image, where they are known, and the precision that they work in."""
    autoencoder = system.autoencoder
    if not isinstance(autoencoder, FrozenAutoencoder):
        return None, None, "fp32"
    channels, height, width = system.image_shape
    precision = str(system.config.autoencoder.precision)
    found = autoencoder_macs(autoencoder, (channels, height, width))
    if found is None:
        return None, None, precision
    encoder, decoder, is_certain = found
    how = "by its config.json" if is_certain else "Stable Diffusion's network; its config.json is not here"
    standing: stages.Standing = "computed" if is_certain else "assumed"
    return Known(encoder, standing, how), Known(decoder, standing, how), precision


def _network(config: DictConfig) -> tuple[str, int, int, int]:
    model = config.model
    name = model._target_.rpartition(".")[2] if model.get("num_classes") == 1000 else ""
    return name, model.get("hidden_size", 0), model.get("depth", 0), model.get("patch_size", 1)


def _samples(config: DictConfig) -> Known:
    if config.num_samples is not None:
        return Known(config.num_samples, "given", "num_samples")
    if config.evaluation:
        return Known(config.evaluation.num_samples, "computed", "evaluation.num_samples")
    return Known(ASSUMED_SAMPLES, "assumed", "as papers have it; evaluation=none")


class _Counting(nn.Module):
    """Stands for the network: says nothing, and counts for how many images it is asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.num_classes, self.null_label = network.num_classes, network.null_label
        self.channels = 2 if network.learn_sigma else 1
        self.images = 0

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.images += len(x_t)
        return torch.zeros_like(x_t).repeat(1, self.channels, 1, 1)


def _count_passes(system: System, config: DictConfig) -> tuple[int, bool]:
    """Passes of the network for one sample, by drawing one of nothing; and whether guidance is among them."""
    counting = _Counting(system.model)
    generator = system.generator(counting, config)
    x_T = torch.zeros(1, *system.latent_shape)
    y = None if generator.num_classes is None else torch.zeros(1, dtype=torch.long)
    generator.sample(x_T, y, lambda: x_T)
    return counting.images, config.guidance.scale != 1


def _sampler_name(config: DictConfig) -> str:
    sampler = config.sampler
    name = sampler.get("scheduler") or sampler._target_.rpartition(".")[2]
    return f"{name} of {sampler.get('num_steps')} steps"


def _show(entry: Entry) -> str:
    value, unit = entry.value, str(entry.unit)
    if unit in ("images", "samples", "passes"):
        return f"{value:,.0f}"
    if unit == "Gflops":
        return f"{value:.3g} Gflops"
    if unit == "%":
        return f"{round(value, 1) + 0.0:+.1f} %"  # no minus before a zero
    if unit == "h" and value >= 48:
        return f"{value / 24:,.1f} days"
    if unit in SMALLER and value < 0.1:
        factor, unit = SMALLER[unit]
        value *= factor
    number = f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}"
    return f"{number} {unit}".rstrip()
