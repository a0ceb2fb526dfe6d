"""Files of weights that others wrote: found, and read without executing anything in them."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffussm.runtime.errors import ConfigError, DataError

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
ACTIVATION = "gelu-approximate"


def find_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and what the config.json of diffusers beside it tells about the model."""
    if path.is_file():
        return path, {}
    if not path.exists():
        raise DataError(f"{path}: no such file")
    for folder in (path, path / "transformer"):
        for name in DIFFUSERS_FILES:
            if (folder / name).is_file() and (folder / "config.json").is_file():
                return folder / name, _read_config(folder / "config.json")
    raise DataError(f"{path}: no config.json with {DIFFUSERS_FILES[0]} there or in transformer/")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        told = {"num_heads": int(config["num_attention_heads"]), "input_size": int(config["sample_size"])}
        activation = config.get("activation_fn", ACTIVATION)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no configuration of DiTTransformer2DModel ({error!r})") from error
    if activation != ACTIVATION:
        raise DataError(f"{path}: activation_fn={activation}: DiT has {ACTIVATION}")
    return told


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, of which nothing is executed."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        if file.suffix not in (".pt", ".pth", ".bin"):
            raise ConfigError(f"{file}: must be .pt, .pth, .safetensors, or a directory that diffusers wrote")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ConfigError):
        raise
    except safetensors.SafetensorError as error:
        raise DataError(f"{file}: damaged: {error}") from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = f"holds {foreign[1]}, and reading that could run code" if foreign else "no file of tensors"
        raise DataError(f"{file}: {why}: save its state dict alone, best as safetensors") from error
    except Exception as error:  # whatever a damaged archive may raise
        raise DataError(f"{file}: damaged, or no file of tensors: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        held = f" (it holds {', '.join(map(str, list(content)[:4]))})" if isinstance(content, dict) else ""
        raise DataError(f"{file}: no state dict, which maps names to tensors{held}: save that alone")
    return content
