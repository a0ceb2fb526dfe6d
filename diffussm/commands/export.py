"""`diffussm export`: the weights of a checkpoint for other programs.

As a pipeline, a directory that `diffussm.pipeline.DiffuSSMPipeline` loads and diffusers' tools understand. In
the official layout, one safetensors file with the names of the model itself. In that of diffusers, a directory
for `DiTTransformer2DModel.from_pretrained(to, low_cpu_mem_usage=False)`, whose outputs differ slightly from
DiT's: its timestep sinusoid has other frequencies (shift 1), which no weight can undo.
"""

import argparse
import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from omegaconf import DictConfig, OmegaConf

from diffussm.build import choose_weights, construct, load_weights, read_weights
from diffussm.commands import print_config
from diffussm.commands.from_checkpoint import (
    check_autoencoder,
    open_checkpoint,
    read_answer,
    read_history,
    run_path,
)
from diffussm.data.autoencoder import Autoencoder, FrozenAutoencoder
from diffussm.models import DiT
from diffussm.models.layouts import State, diffusers_config, infer_dit_arguments, to_diffusers
from diffussm.report.model_card import DDPM, CardFacts, model_card
from diffussm.runtime.errors import ConfigError, RunDirectoryError, StorageError
from diffussm.runtime.run_dir import sync_directory, write_and_sync, write_atomically, write_json
from diffussm.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from diffussm.diffusion.flow import StraightPath

SUFFIXES = {"pipeline": "-pipeline", "official": ".safetensors", "diffusers": "-diffusers"}
FIXED_VARIANCES = {"beta": "fixed_large", "beta_tilde": "fixed_small"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def run(options: argparse.Namespace) -> int:
    """Convert, then write where nothing is yet."""
    checkpoint, trained, config = open_checkpoint(options)
    if options.print_config:
        return print_config(config)
    weights = choose_weights(checkpoint, config.weights, "weights")
    suffix = SUFFIXES[config.layout]
    default = run_path(checkpoint) / "export" / f"{checkpoint.path.name}-{weights}{suffix}"
    to = Path(config.to or default)
    if config.layout == "official" and to.suffix != suffix:
        raise ConfigError(f"to={to}: must end in {suffix}")
    if to.exists():
        raise RunDirectoryError(f"to={to}: exists: choose another, or move it away")
    if config.layout == "pipeline":
        _export_pipeline(checkpoint, weights, trained, to)
    elif config.layout == "official":
        _write(read_weights(checkpoint, weights, "weights"), to)
    else:
        _export_to_diffusers(read_weights(checkpoint, weights, "weights"), trained, to)
    print(f"{to}: {weights} of {checkpoint.path}, layout {config.layout}")
    return 0


def _export_pipeline(checkpoint: Checkpoint, weights: str, trained: DictConfig, to: Path) -> None:
    state = checkpoint.document("train_state")
    channels, height, width = state["data"]["image_shape"]
    if channels not in (1, 3):
        raise ConfigError(
            f"layout=pipeline: the model gives images of {channels} channels, which cannot be drawn: "
            "choose layout=official"
        )
    with torch.device("meta"):
        network = type(construct(trained.model, "model"))
    # Here rather than above, because diffusers takes seconds to import.
    from diffussm.pipeline import COMPONENTS, DiffuSSMPipeline

    if network not in COMPONENTS:
        known = " and ".join(sorted(known.__name__ for known in COMPONENTS))
        raise ConfigError(f"layout=pipeline: knows {known}, not {network.__name__}: choose layout=official")
    arguments = {key: value for key, value in trained.model.items() if key != "_target_"}
    model = COMPONENTS[network](**arguments)
    load_weights(checkpoint, model, weights, "weights")
    autoencoder: Autoencoder = construct(trained.autoencoder, "autoencoder")
    check_autoencoder(checkpoint, autoencoder)
    scheduler = _make_scheduler(trained, autoencoder.latent_shape((channels, height, width)))
    vae, vae_files = None, {}
    if isinstance(autoencoder, FrozenAutoencoder):
        vae, vae_files = autoencoder.network, autoencoder.written_out()
    flow = type(scheduler).__name__ != DDPM
    pipeline = DiffuSSMPipeline(model, scheduler, vae=vae, image_size=[height, width], flow=flow)
    versions = {name: version(name) for name in ("diffussm", "torch", "diffusers")}
    metadata = {
        "format": "pt",
        "weights": weights,
        "images": str(state["images"]),
        "steps": str(state["step"]),
        "checkpoint_sha256": checkpoint.sha256,
        "diffussm_version": versions["diffussm"],
    }
    facts = CardFacts(
        folder=to.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=weights,
        config=OmegaConf.to_container(trained, resolve=True),  # type: ignore[arg-type]
        train_state=state,
        checkpoint_sha256=checkpoint.sha256,
        scheduler=type(scheduler).__name__,
        autoencoder=autoencoder.fingerprint,
        versions=versions,
        **_find_results(checkpoint, weights, trained),
    )
    with _new_directory(to) as directory:
        for path, content in (
            (Path("README.md"), model_card(facts).encode()),
            (Path("model_index.json"), pipeline.to_json_string().encode()),
            (Path("scheduler/scheduler_config.json"), scheduler.to_json_string().encode()),
            (Path("transformer/config.json"), model.to_json_string().encode()),
            (Path("transformer") / WEIGHTS_FILE, safetensors.torch.save(model.state_dict(), metadata)),
            *((Path("vae") / name, content) for name, content in vae_files.items()),
        ):
            (directory / path).parent.mkdir(exist_ok=True)
            write_and_sync(directory / path, content)


def _make_scheduler(trained: DictConfig, latent_shape: Sequence[int]) -> "SchedulerMixin":
    """diffusers' scheduler of the process that the run trains."""
    from diffussm.pipeline import PREDICTION_TYPES, ddpm_scheduler, flow_scheduler

    if trained.objective._target_.endswith("FlowObjective"):
        path: StraightPath = construct(trained.diffusion, "diffusion")
        return flow_scheduler(path.shift_factor(math.prod(latent_shape[1:])))
    prediction = trained.objective.prediction
    if prediction not in PREDICTION_TYPES:
        raise ConfigError(f"layout=pipeline: diffusers knows no objective.prediction={prediction}")
    sampler = trained.sampler or {}
    fixed = sampler.get("variance", trained.objective.fixed_variance)
    return ddpm_scheduler(
        construct(trained.diffusion, "diffusion"),
        prediction=prediction,
        variance_type="learned_range" if trained.model.learn_sigma else FIXED_VARIANCES.get(fixed, "fixed_small"),
        clip_x_0=sampler.get("clip_x_0", False),
    )


def _find_results(checkpoint: Checkpoint, weights: str, trained: DictConfig) -> dict[str, Any]:
    """What the run has measured of these weights: of samples, by its own sampler if it did, and of images."""
    path = run_path(checkpoint) / "results.json"
    latest = read_answer(path)
    answers = [*read_history(path.with_suffix(".jsonl")), *([] if latest is None else [latest])]
    ours = [
        answer
        for answer in reversed(answers)
        if answer["request"].get("checkpoint", {}).get("sha256") == checkpoint.sha256
        and answer["weights"] == weights
    ]
    of_samples = [answer for answer in ours if "metrics" in answer]
    by_own_sampler = [
        answer
        for answer in of_samples
        if all(answer["request"][key] == trained[key] for key in ("sampler", "guidance"))
    ]
    of_images = [answer for answer in ours if "vlb" in answer.get("image_metrics", {})]
    return {
        "results": next(iter(by_own_sampler + of_samples), None),
        "image_results": next(iter(of_images), None),
    }


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A directory that takes its name when all is in it; StorageError, and nothing left, if a write fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        yield temporary
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"to={path}: {error.strerror or error}: free space, or choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _export_to_diffusers(state: State, trained: DictConfig, to: Path) -> None:
    with torch.device("meta"):
        model = construct(trained.model, "model")
    if not isinstance(model, DiT):
        raise ConfigError(f"layout=diffusers: diffusers has no {type(model).__name__}: choose layout=pipeline")
    if model.num_classes is not None and model.null_label is None:
        raise ConfigError("layout=diffusers: needs a null label, and the model has class_dropout_prob=0")
    try:
        converted = to_diffusers(state)
    except ValueError as error:
        raise ConfigError(f"layout=diffusers: {error}") from error
    arguments = {**infer_dit_arguments(state), "num_heads": model.num_heads}
    _write(converted, to / WEIGHTS_FILE)
    write_json(to / "config.json", diffusers_config(arguments))  # last: with it the directory is complete


def _write(state: State, path: Path) -> None:
    write_atomically(path, safetensors.torch.save(dict(state), metadata={"format": "pt"}))
