"""`init_from=`: the weights of another run, checkpoint or file that a run of its own begins with.

Tensors are all that is taken: nothing that a checkpoint's configuration names is built, so it need not be trusted.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffussm.build import choose_weights
from diffussm.commands.weight_files import DIFFUSERS_FILES, find_file, read_tensors
from diffussm.config import leaves
from diffussm.models.layouts import Layout, detect_layout, from_diffusers
from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.hashing import hash_file
from diffussm.training.checkpoint import find_checkpoint
from diffussm.training.initial import InitialWeights, match_weights

# Arguments of models in which fine-tuning may differ: they say what data is like, how to begin, how to compute.
MAY_DIFFER = frozenset(
    ("num_classes", "class_dropout_prob", "input_size", "activation_checkpointing", "init", "dt_min", "dt_max")
)
TOLD = ("autoencoder._target_", "diffusion", "objective._target_", "objective.prediction")
MAX_NAMES = 3  # how many tensors a line names


@dataclass(frozen=True)
class _Found:
    """Tensors, what is known of the configuration they were trained with, and where they come from."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    said: str


def read_initial_weights(config: DictConfig, model: nn.Module, tell: Callable[[str], None]) -> InitialWeights:
    """What `init_from` and `init_weights` name, found to fit the model.

    ConfigError names both sides if they differ in architecture; `tell` hears what is loaded, made anew, left out.
    """
    setting = f"init_from={config.init_from}"
    found = _read(config)
    _check_architecture(setting, found.config, config)
    try:
        match = match_weights(model.state_dict(), found.tensors, getattr(model, "made_for_data", ()))
    except ValueError as error:
        raise ConfigError(f"{setting}: does not fit {type(model).__name__}: {error}") from error
    tell(f"init_from: {len(match.loaded)} tensors of {found.said}")
    for what, names in (("made anew", match.remade), ("left out", match.skipped)):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            tell(f"init_from: {what}: {', '.join(names[:MAX_NAMES])}{more}")
    if other := _differences(found.config, config):
        tell(f"init_from: was trained otherwise: {'; '.join(other)}")
    return InitialWeights(match.loaded, {**found.provenance, "remade": match.remade, "skipped": match.skipped})


def _read(config: DictConfig) -> _Found:
    path = Path(config.init_from)
    is_of_diffusers = any(
        (folder / name).is_file() for folder in (path, path / "transformer") for name in DIFFUSERS_FILES
    )
    if path.is_file() or is_of_diffusers:
        return _read_file(path, config)
    checkpoint = find_checkpoint(path, key="init_from")
    name = choose_weights(checkpoint, config.init_weights, "init_weights")
    theirs = checkpoint.document("config")
    where = f"{theirs.get('name', path.name)}/{checkpoint.path.name}"
    provenance = {"file": where, "sha256": checkpoint.sha256, "weights": name}
    if (before := checkpoint.document("train_state").get("imported")) is not None:
        provenance["imported"] = before  # which it began with itself
    return _Found(checkpoint.tensors(name), theirs, provenance, f"{name} of {where}")


def _read_file(path: Path, config: DictConfig) -> _Found:
    if config.init_weights != "ema":
        raise ConfigError(f"init_weights={config.init_weights}: {path} holds one kind of weights: leave it out")
    file, told = find_file(path)
    state: Mapping[str, Tensor] = read_tensors(file)
    layout: Layout = "official"  # whatever the model calls its own
    with contextlib.suppress(ValueError):  # if it is no DiT
        layout = detect_layout(state)
    if layout == "diffusers":
        size = told.get("input_size") or config.model.get("input_size")
        if size is None:
            raise ConfigError(f"init_from={path}: weights of a DiT, and the model is {config.model._target_}")
        try:
            state = from_diffusers(state, size)
        except ValueError as error:
            raise DataError(f"{file}: {error}") from error
    theirs = {"model": {"num_heads": told["num_heads"]}} if "num_heads" in told else {}
    provenance = {"file": file.name, "sha256": hash_file(file), "layout": layout}
    return _Found(state, theirs, provenance, f"{file} ({layout} layout)")


def _check_architecture(setting: str, theirs: Mapping[str, Any], ours: DictConfig) -> None:
    """Refuse what the shapes of tensors need not show, such as another order of tokens."""
    there, here = theirs.get("model", {}), OmegaConf.to_container(ours.model)
    assert isinstance(here, dict)
    differing = [
        f"model.{key}: {there[key]} there, {here[key]} here"
        for key in map(str, here)
        if key in there and key not in MAY_DIFFER and there[key] != here[key]
    ]
    if differing:
        raise ConfigError(f"{setting}: weights of another architecture ({'; '.join(differing)}): choose the same")


def _differences(theirs: Mapping[str, Any], ours: DictConfig) -> list[str]:
    """What else than the architecture gives the weights their meaning, where it is not the same."""
    there, here = dict(leaves(dict(theirs))), dict(leaves(ours))
    return [
        f"{key}: {there[key]} there, {here[key]} here"
        for key in here
        if key.startswith(TOLD) and key in there and there[key] != here[key]
    ]
