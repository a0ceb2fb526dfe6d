"""`diffussm export`: the weights of a checkpoint for other programs.

In the official layout, one safetensors file with the names of the model itself. In that of diffusers, a
directory for `DiTTransformer2DModel.from_pretrained(out, low_cpu_mem_usage=False)`, whose outputs differ
slightly from DiT's: its timestep sinusoid has other frequencies (shift 1), which no weight can undo.
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch
from omegaconf import DictConfig

from diffussm.build import choose_weights, construct
from diffussm.commands import print_config
from diffussm.commands.from_checkpoint import open_checkpoint, run_path
from diffussm.models import DiT
from diffussm.models.layouts import State, diffusers_config, infer_dit_arguments, to_diffusers
from diffussm.runtime.errors import ConfigError, RunDirectoryError
from diffussm.runtime.run_dir import write_atomically, write_json


def run(options: argparse.Namespace) -> int:
    """Convert, then write where nothing is yet."""
    checkpoint, trained, config = open_checkpoint(options)
    if options.print_config:
        return print_config(config)
    weights = choose_weights(checkpoint, config.weights, "weights")
    suffix = ".safetensors" if config.layout == "official" else "-diffusers"
    default = run_path(checkpoint) / "export" / f"{checkpoint.path.name}-{weights}{suffix}"
    out = Path(config.out or default)
    if config.layout == "official" and out.suffix != suffix:
        raise ConfigError(f"out={out}: must end in {suffix}")
    if out.exists():
        raise RunDirectoryError(f"out={out}: exists: choose another, or move it away")
    state = checkpoint.tensors(weights)
    if config.layout == "official":
        _write(state, out)
    else:
        _export_to_diffusers(state, trained, out)
    print(f"{out}: {weights} of {checkpoint.path}, layout {config.layout}")
    return 0


def _export_to_diffusers(state: State, trained: DictConfig, out: Path) -> None:
    with torch.device("meta"):
        model = construct(trained.model, "model")
    if not isinstance(model, DiT):
        raise ConfigError(f"layout=diffusers: diffusers has no {type(model).__name__}: choose layout=official")
    if model.num_classes is not None and model.null_label is None:
        raise ConfigError("layout=diffusers: needs a null label, and the model has class_dropout_prob=0")
    try:
        converted = to_diffusers(state)
    except ValueError as error:
        raise ConfigError(f"layout=diffusers: {error}") from error
    arguments = {**infer_dit_arguments(state), "num_heads": model.num_heads}
    _write(converted, out / "diffusion_pytorch_model.safetensors")
    write_json(out / "config.json", diffusers_config(arguments))  # last: with it the directory is complete


def _write(state: State, path: Path) -> None:
    write_atomically(path, safetensors.torch.save(dict(state), metadata={"format": "pt"}))
