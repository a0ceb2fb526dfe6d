"""What a data set, an autoencoder, a model and an objective ask of each other, refused before any is used."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn

from diffussm.build.instantiation import construct, with_key
from diffussm.config import leaves
from diffussm.data.autoencoder import Autoencoder
from diffussm.diffusion.classification import ClassifierObjective
from diffussm.diffusion.objective import Objective
from diffussm.models import NoisyClassifier
from diffussm.models.layers import Denoiser
from diffussm.runtime.errors import ConfigError, UserError
from diffussm.training.checkpoint import Checkpoint


def recorded_autoencoder(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The fingerprint of what a checkpoint's latents came from; None if it does not tell, as of pixels."""
    return checkpoint.document("train_state")["data"].get("autoencoder")


def describe_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """An autoencoder in a few words."""
    rest = {key: str(value)[:12] for key, value in fingerprint.items() if key != "kind"}
    return " ".join([fingerprint["kind"], *(f"{key}={value}" for key, value in rest.items())])


def check_encoder(data: DictConfig, autoencoder: Autoencoder) -> None:
    """Refuse an autoencoder that has not made the latents that the data are, if these are latents and are here."""
    if not str(data.get("_target_")).endswith(".LatentSet"):
        return
    try:
        source = construct(data, "data")
    except UserError:
        return  # nobody needs them to use a trained model
    source.check_autoencoder(autoencoder.fingerprint)


def check_latents(model: DictConfig, latent_shape: tuple[int, int, int]) -> None:
    """Refuse, before it is built, a model that does not take latents of this shape (C, H, W)."""
    channels, height, width = latent_shape
    if model.in_channels != channels:
        raise ConfigError(f"model.in_channels={model.in_channels}: the data gives {channels} channel(s)")
    side = model.get("input_size")
    if side and (height, width) != (side, side):
        remedy = f"set it to {height}" if height == width else "this model takes square latents only"
        raise ConfigError(f"model.input_size={side}: the data gives {height}x{width} latents: {remedy}")
    patch, ratio = model.get("patch_size", 1), model.get("hourglass_ratio", 1)
    if patch < 1 or ratio < 1:
        return  # the model's constructor says so better
    if height % patch or width % patch:
        raise ConfigError(f"model.patch_size={patch}: does not divide the data's {height}x{width} latents")
    tokens = height * width // patch**2
    if tokens % ratio:
        raise ConfigError(f"model.hourglass_ratio={ratio}: does not divide the {tokens} tokens of the data")


def check_objective(model: nn.Module, objective: Objective) -> None:
    """Refuse to train a denoiser as a classifier, the reverse, or a variance that the objective leaves alone."""
    classifies = isinstance(objective, ClassifierObjective)
    misfit = f"objective: {type(objective).__name__} does not train {type(model).__name__}"
    if isinstance(model, NoisyClassifier) and not classifies:
        raise ConfigError(f"{misfit}: set objective=classifier, or choose another model")
    if isinstance(model, Denoiser) and classifies:
        raise ConfigError(f"{misfit}: choose another objective, or model=classifier_tiny or its like")
    try:
        objective.check_network(bool(getattr(model, "learn_sigma", False)))
    except ValueError as error:
        raise ConfigError(with_key("objective", error)) from error


def differences(ours: Any, theirs: Any) -> str:
    """`key: theirs, not ours` of every key in which two groups (or values) differ."""
    before, after = dict(leaves(ours)), dict(leaves(theirs))
    return "; ".join(
        f"{key or 'value'}: {after.get(key, 'absent')}, not {before.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )
