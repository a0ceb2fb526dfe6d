"""`diffussm sample`: images from a checkpoint, one by one and as a grid."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from diffussm.build import MAX_GRID_ROWS, load_weights
from diffussm.commands import print_config
from diffussm.commands.from_checkpoint import (
    build_system,
    digest,
    make_request,
    open_checkpoint,
    read_answer,
    run_path,
)
from diffussm.report.grid import save_rows
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, RunDirectoryError
from diffussm.runtime.run_dir import write_json
from diffussm.training.checkpoint import Checkpoint
from diffussm.training.logging import Progress

MAX_GRID_COLUMNS = 20
RECORD = "samples.json"  # beside the images: what decides them


def run(options: argparse.Namespace) -> int:
    """Draw what is asked for, unless it is there already."""
    keep_freed_memory()
    checkpoint, trained, config = open_checkpoint(options)
    if options.print_config:
        return print_config(config)
    out, is_new = draw(checkpoint, trained, config)
    if is_new:
        print(f"{out / 'grid.png'}: {config.num_images} images, each in a file beside it")
    else:
        print(f"{out / 'grid.png'}: these {config.num_images} images are there already")
    return 0


def draw(checkpoint: Checkpoint, trained: DictConfig, config: DictConfig) -> tuple[Path, bool]:
    """Draw the images of a configuration of `sample`: where they are, and whether they had to be drawn."""
    check_drawable(checkpoint)
    request = make_request(checkpoint, config, ("sampler", "guidance", "num_images", "classes"))
    default = run_path(checkpoint) / "samples" / f"{checkpoint.path.name}-{digest(request)}"
    out = Path(config.out or default)
    if is_complete(out, request):
        return out, False

    system = build_system(checkpoint, trained, config.device)
    weights = load_weights(checkpoint, system.model, config.sampling.weights)
    generator = system.generator(system.model, config)
    classes, labels = choose_labels(config, generator.num_classes)
    write_json(out / RECORD, {"request": request, "weights": weights, "complete": False})
    progress = Progress(config.num_images, 0, "img")
    batches = []
    for batch in generator.generate(range(config.num_images), labels):
        for index, image in zip(batch.indices, batch.images, strict=True):
            save_image(image, out / f"{index:06d}.png")
        batches.append(batch.images)
        progress.advance(len(batch.indices))
    progress.close()
    _save_grid(torch.cat(batches), classes, labels, out / "grid.png")
    write_json(out / RECORD, {"request": request, "weights": weights, "complete": True})
    return out, True


def save_image(image: UInt8[Tensor, "C H W"], path: Path) -> None:
    """One image as a PNG."""
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)


def check_drawable(checkpoint: Checkpoint) -> None:
    """ConfigError for images that are neither grey nor in colour."""
    channels = checkpoint.document("train_state")["data"]["image_shape"][0]
    if channels not in (1, 3):
        raise ConfigError(
            f"{checkpoint.path}: gives images of {channels} channels, which cannot be drawn: "
            "import the weights anew with the autoencoder of these latents, such as autoencoder=sd3_vae"
        )


def is_complete(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether `out` holds all of this request; RunDirectoryError if it holds anything else."""
    answer = read_answer(out / RECORD)
    if answer is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunDirectoryError(f"out={out}: exists and is not ours: choose another directory")
        return False
    if digest(answer["request"]) != digest(request):
        raise RunDirectoryError(f"out={out}: holds other samples: choose another directory")
    return answer["complete"]


def choose_labels(config: DictConfig, num_classes: int | None) -> tuple[list[int], Tensor | None]:
    """(classes, labels of all images): image i shows class i mod n of the n chosen ones."""
    if num_classes is None:
        if config.classes is not None:
            raise ConfigError(f"classes={config.classes}: the model is unconditional: leave it out")
        return [], None
    chosen = range(min(num_classes, MAX_GRID_ROWS)) if config.classes is None else config.classes
    classes = list(dict.fromkeys(chosen))
    if not classes or not all(0 <= label < num_classes for label in classes):
        raise ConfigError(f"classes={classes}: each must lie in 0..{num_classes - 1}")
    return classes, torch.tensor([classes[index % len(classes)] for index in range(config.num_images)])


def _save_grid(images: Tensor, classes: list[int], labels: Tensor | None, path: Path) -> None:
    """The first images of every class in its row, or the first of all, at most MAX_GRID_COLUMNS wide."""
    if labels is None:
        columns = min(math.ceil(len(images) ** 0.5), MAX_GRID_COLUMNS)
        rows = list(images[: MAX_GRID_COLUMNS * columns].split(columns))
    else:
        classes = classes[: len(images)]
        rows = [images[labels == label][:MAX_GRID_COLUMNS] for label in classes]
    save_rows(rows, path, [str(label) for label in classes] or None)
