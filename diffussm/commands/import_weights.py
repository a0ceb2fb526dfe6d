"""`diffussm import`: a run directory from DiT's public weights, for every verb that takes a checkpoint."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffussm.build import check_latents, construct
from diffussm.commands import note, print_config
from diffussm.commands.weight_files import find_file, read_tensors
from diffussm.compose import compose, override_value
from diffussm.config import TrainConfig
from diffussm.models.layouts import check_weights, detect_layout, from_diffusers, infer_dit_arguments
from diffussm.runtime.errors import ConfigError, DataError, RunDirectoryError
from diffussm.runtime.hashing import hash_file
from diffussm.runtime.run_dir import RunDirectory, write_atomically
from diffussm.training.checkpoint import CheckpointStore
from diffussm.training.ema import average_names
from diffussm.training.train_state import TrainState

# What the public DiTs draw with; other autoencoders of as many channels are to be named.
AUTOENCODERS = {4: "sd_vae_ft_ema"}


def run(options: argparse.Namespace) -> int:
    """Read the weights, find out whose they are, and publish them as a run before its first step."""
    path, overrides = _split(options.overrides)
    name = path.absolute().stem.replace("'", "\\'")
    overrides = [f"name='{name}'", *overrides]
    if override_value(overrides, "init_from") is not None:
        raise ConfigError("init_from: the run begins with the imported weights: leave it out")
    if override_value(overrides, "model") is None:
        overrides = ["model=dit_xl_2", *overrides]  # whatever an experiment names; the weights tell the rest
    compose("import", overrides, options.config_dir)  # a mistyped key ends here, before gigabytes are read
    file, told = find_file(path)
    try:
        layout, state, arguments = _interpret(read_tensors(file), told, overrides)
        known = [f"model.{key}={'null' if value is None else value}" for key, value in arguments.items()]
        usual = _usual_autoencoder(arguments["in_channels"], overrides)
        known += usual
        config = compose("import", [*known, *overrides], options.config_dir)
        if options.print_config:
            return print_config(config)
        with torch.device("meta"):
            model = construct(config.model, "model")
        check_weights(state, model.state_dict())
        state = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in state.items()}
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{broken[0]}: not finite")
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    autoencoder = construct(
        config.autoencoder, "autoencoder"
    )  # of which shapes suffice: its weights may be elsewhere
    latent_shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    image_shape = list(config.image_shape or autoencoder.image_shape(latent_shape))
    check_latents(config.model, autoencoder.latent_shape(tuple(image_shape)))
    trained = OmegaConf.masked_copy(config, [item.name for item in fields(TrainConfig)])
    imported = {"file": file.name, "sha256": hash_file(file), "layout": layout}
    directory = RunDirectory(Path(config.run_dir))
    if not _publish(directory, trained, state, TrainState(data={"image_shape": image_shape}, imported=imported)):
        print(f"{directory.path}: these weights are there already")
        return 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{directory.path}: {type(model).__name__}, {parameters:,} parameters, from {file} ({layout} layout)")
    if usual:
        note(f"{usual[0]}, as for DiT's own weights: import under another name with another if they are for that")
    if image_shape[0] not in (1, 3):
        note(
            f"images of {image_shape[0]} channels cannot be drawn: to sample, import them under another name with "
            "the autoencoder of these latents, such as autoencoder=sd3_vae"
        )
    return 0


def _usual_autoencoder(channels: int, overrides: Sequence[str]) -> list[str]:
    """The override that chooses DiT's own autoencoder, where nothing else does."""
    chosen = any(override_value(overrides, key) is not None for key in ("autoencoder", "experiment"))
    name = None if chosen else AUTOENCODERS.get(channels)
    return [] if name is None else [f"autoencoder={name}"]


def _split(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """FILE, and the overrides around it."""
    files = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    if len(files) != 1:
        given = f"{len(files)} files given" if files else "no FILE given"
        raise ConfigError(f"{given}: write diffussm import FILE key=value ...")
    return Path(files[0]), [argument for argument in arguments if argument != files[0]]


def _interpret(
    state: Mapping[str, Tensor], told: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[str, Mapping[str, Tensor], dict[str, Any]]:
    """(layout, official weights, arguments of DiT); what the file does not tell must be overridden."""
    layout = detect_layout(state)
    if layout == "diffusers":
        size = override_value(overrides, "model.input_size") or told.get("input_size")
        if not isinstance(size, int):
            raise ConfigError("model.input_size: not told by the file: add model.input_size=32 or what it is")
        state = from_diffusers(state, size)
    arguments = {**infer_dit_arguments(state), **told}
    if arguments["num_heads"] is None:
        if override_value(overrides, "model.num_heads") is None:
            raise ConfigError("model.num_heads: not told by the file: add model.num_heads=16 or what it is")
        del arguments["num_heads"]
    return layout, state, arguments


def _publish(
    directory: RunDirectory, config: DictConfig, state: Mapping[str, Tensor], train_state: TrainState
) -> bool:
    """Write what `train` would have before its first step; False if a run with these weights is there already."""
    directory.open()
    store = CheckpointStore(directory.checkpoints, warn=note)
    resolved = OmegaConf.to_container(config, resolve=True)
    there = store.newest_valid()
    if there is not None:
        same_weights = there.document("train_state").get("imported") == train_state.imported
        if not same_weights or there.document("config") != resolved:
            raise RunDirectoryError(f"run_dir={directory.path}: holds another run: choose another name")
        return False
    averages = average_names(config.trainer.ema_decays, config.trainer.ema_power)
    tensors = {"model": state, **dict.fromkeys(averages, state)}
    documents = {"train_state": asdict(train_state), "config": resolved}
    store.save(0, {**tensors, "optimizer": {}}, documents)
    write_atomically(directory.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
    directory.write_status("imported", images=0, step=0, exit_code=0)
    return True
