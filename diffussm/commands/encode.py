"""`diffussm encode`: a data set as latents, encoded once."""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffussm.build import choose_device, construct
from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.data.encoding import Encoding
from diffussm.data.latents import BAD_FILES, SPREAD_RANGE, LatentSet
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError, OutOfMemoryError
from diffussm.runtime.run_dir import OwnedDirectory
from diffussm.runtime.signals import StopRequest
from diffussm.training.logging import Progress


def run(options: argparse.Namespace) -> int:
    """Check everything, take the directory, encode what is missing."""
    config = compose("encode", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    processes, to = Processes.from_environment(), Path(config.to).expanduser()
    if processes.is_first:
        OwnedDirectory(to, "to", "directory").check()
    device = processes.own_device(choose_device(config.device))
    with StopRequest() as stop, processes:
        source = construct(config.data, "data")
        if isinstance(source, LatentSet):
            raise ConfigError("data=latents: encoded already: choose images")
        autoencoder = construct(config.autoencoder, "autoencoder")
        if not hasattr(autoencoder, "encode"):
            name = config.autoencoder._target_.rpartition(".")[2]
            raise ConfigError(f"autoencoder: {name} has nothing to encode: choose another, or train on the images")
        processes.start(device)
        encoding = Encoding(
            source,
            autoencoder.to(device),
            to,
            batch_size=config.batch_size,
            dtype=config.dtype,
            shard_size=config.shard_size,
            num_workers=config.num_workers,
            device=device,
            processes=processes,
            stop=lambda: stop,
        )
        try:
            is_complete = encoding.open()
            latents = LatentSet(encoding.path) if is_complete else _encode(encoding, config)
        finally:
            encoding.close()
    if processes.is_first:
        _report(latents, is_complete)
    return 0


def _encode(encoding: Encoding, config: DictConfig) -> LatentSet:
    if not encoding.processes.is_first:
        return encoding.run()
    total, done = len(encoding.source), encoding.num_done
    _summarize(encoding, done)
    progress = Progress(total, done, "img")
    try:
        return encoding.run(lambda encoded: progress.advance(done + encoded - progress.done))
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of memory on {encoding.device} with {config.batch_size} images at once: lower batch_size"
        ) from error
    finally:
        progress.close()


def _summarize(encoding: Encoding, done: int) -> None:
    total, path, processes = len(encoding.source), encoding.path, encoding.processes
    shards = encoding.shards
    gigabytes = encoding.num_bytes * (total - done) / total / 1e9
    lines = [
        f"latents      {path}" + (f" (continues at {done:,} images)" if done else " (new)"),
        f"images       {total:,} of {encoding.source.image_shape}",
        f"shards       {len(shards):,} of {shards.shard_size:,} images, {gigabytes:.3g} GB to write",
        f"processes    {processes.world_size}, the first on {encoding.device}"
        + ", with one thread each, whose roundings are the same everywhere" * (encoding.device.type == "cpu"),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    if (idle := processes.world_size - len(shards)) > 0:
        found = f"{idle:,} of {processes.world_size} processes find nothing to do"
        note(f"{found}: lower shard_size={shards.shard_size}")
    if shutil.disk_usage(path).free / 1e9 < gigabytes:
        note(f"to={path}: that is more than is free there now")


def _report(latents: LatentSet, was_complete: bool) -> None:
    spread, bad = latents.manifest["spread"], latents.manifest["num_bad_files"]
    print(
        f"{latents.path}: {len(latents):,} images as latents of {latents.latent_shape}, "
        f"mean {spread['mean']:.3f}, standard deviation {spread['std']:.3f}"
        + "; they are there already, nothing to do"
        * was_complete
    )
    if bad:
        print(f"{latents.path / BAD_FILES}: {bad:,} images that could not be read")
    low, high = SPREAD_RANGE
    if not low <= spread["std"] <= high:
        note(f"a standard deviation near 1 is expected: autoencoder.scale={latents.scale:g} seems wrong")
