"""What `sample`, `evaluate` and their kin share: a checkpoint, and requests that are answered once.

A request is everything that decides what a command makes. It is stored with the result, so that the same
command again finds it, whatever its files are called and wherever the checkpoint lies.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffussm.build import (
    System,
    choose_device,
    construct,
    describe_fingerprint,
    recorded_autoencoder,
    refuse_foreign_code,
)
from diffussm.commands import note
from diffussm.compose import compose, override_value
from diffussm.config import may_change
from diffussm.data.autoencoder import Autoencoder, IdentityAutoencoder
from diffussm.runtime.errors import ConfigError, RunDirectoryError
from diffussm.training.checkpoint import BEST, Checkpoint, find_checkpoint


def open_checkpoint(options: argparse.Namespace) -> tuple[Checkpoint, DictConfig, DictConfig]:
    """The checkpoint of `checkpoint=`, the configuration it was trained with, and this command's own."""
    given = override_value(options.overrides, "checkpoint")
    if not given:
        raise ConfigError("checkpoint: not set: add checkpoint=RUN_DIRECTORY")
    checkpoint = find_checkpoint(Path(str(given)), note)
    return checkpoint, *configure(checkpoint, options.verb, options.overrides, options.config_dir)


def configure(
    checkpoint: Checkpoint, verb: str, overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[DictConfig, DictConfig]:
    """The configuration that a checkpoint was trained with, and that of a command on it."""
    document = checkpoint.document("config")
    trained = OmegaConf.create(document)
    assert isinstance(trained, DictConfig)
    if override_value(overrides, "trust_checkpoint") is not True:
        refuse_foreign_code(trained, str(checkpoint.path))
    names = ("autoencoder", "sampler", "guidance", "sampling", "evaluation", "data")
    groups = {key: document[key] for key in names}
    config = compose(verb, overrides, config_dir, groups)
    theirs, ours = (str(node.autoencoder._target_).rpartition(".")[2] for node in (trained, config))
    if ours != theirs:
        remedy = "import it anew with this one" if _is_only_imported(checkpoint) else "leave the choice to it"
        raise ConfigError(f"autoencoder: {ours}, but {checkpoint.path} is for {theirs}: {remedy}")
    trained.autoencoder = config.autoencoder  # which may lie elsewhere by now
    return trained, config


def build_system(checkpoint: Checkpoint, trained: DictConfig, device: str) -> System:
    """The parts of the run that made the checkpoint."""
    image_shape = checkpoint.document("train_state")["data"]["image_shape"]
    system = System(trained, image_shape, choose_device(device))
    check_autoencoder(checkpoint, system.autoencoder)
    return system


def check_autoencoder(checkpoint: Checkpoint, autoencoder: Autoencoder) -> None:
    """Refuse, naming both, to decode with another autoencoder than the checkpoint's."""
    theirs = recorded_autoencoder(checkpoint)
    if theirs is not None and theirs != autoencoder.fingerprint:
        ours = describe_fingerprint(autoencoder.fingerprint)
        raise ConfigError(
            f"autoencoder: {ours}, but {checkpoint.path} was trained with {describe_fingerprint(theirs)}: "
            "set autoencoder.pretrained to where that one is"
        )


def _is_only_imported(checkpoint: Checkpoint) -> bool:
    state = checkpoint.document("train_state")
    return state.get("imported") is not None and state["images"] == 0


def make_request(checkpoint: Checkpoint, config: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The checkpoint, sampling settings and `keys` of a configuration, as JSON."""
    chosen = {key: config[key] for key in ("sampling", *keys)}
    settings = OmegaConf.to_container(OmegaConf.create(chosen), resolve=True)
    assert isinstance(settings, dict)
    if not settings["sampling"]["tf32"]:  # requests are older than this choice
        del settings["sampling"]["tf32"]
    autoencoder: Autoencoder = construct(config.autoencoder, "autoencoder")
    if not isinstance(autoencoder, IdentityAutoencoder):  # requests of pixels are older than autoencoders
        kept = {key: value for key, value in config.autoencoder.items() if not may_change(f"autoencoder.{key}")}
        settings["autoencoder"] = {**kept, "fingerprint": autoencoder.fingerprint}
    companion = config.guidance.get("checkpoint")
    if companion is not None and "guidance" in chosen:
        found = find_checkpoint(Path(companion), note, "guidance.checkpoint")
        settings["guidance"]["checkpoint"] = {"path": str(found.path), "sha256": found.sha256}
    return {
        "checkpoint": {"path": str(checkpoint.path), "sha256": checkpoint.sha256},
        **{str(key): value for key, value in settings.items()},
    }


def digest(request: Mapping[str, Any]) -> str:
    """Equal for requests that have one result: where checkpoints and samples lie does not count."""
    subject = "samples" if "samples" in request else "checkpoint"
    essence = {**request, subject: request[subject]["sha256"]}
    guidance = request.get("guidance", {})
    if "checkpoint" in guidance:
        essence["guidance"] = {**guidance, "checkpoint": guidance["checkpoint"]["sha256"]}
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()[:8]


def read_answer(path: Path) -> dict[str, Any] | None:
    """The answer stored at `path`, with its request; None if there is no such file."""
    if not path.exists():
        return None
    try:
        answer = json.loads(path.read_text())
        digest(answer["request"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunDirectoryError(f"{path}: exists and is not ours: move it away") from None
    return answer


def read_history(path: Path) -> list[dict[str, Any]]:
    """All answers stored as lines of `path`; a line that was cut off is left out, with a note."""
    answers = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            answer = json.loads(line)
            digest(answer["request"])
        except (ValueError, KeyError, TypeError):
            note(f"{path}:{number}: damaged: left out")
        else:
            answers.append(answer)
    return answers


def run_path(checkpoint: Checkpoint) -> Path:
    """The run directory of a checkpoint, or its own directory where it lies outside one."""
    parent = checkpoint.path.resolve().parent
    found = parent.parent if parent.name in ("checkpoints", BEST) else checkpoint.path.resolve()
    return Path(os.path.relpath(found))
