"""`diffussm stats`: the reference statistics and images of a data set, as samples are compared with."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from diffussm.build import build_extractor, choose_device, construct
from diffussm.commands import print_config
from diffussm.compose import compose
from diffussm.data.bad_files import BadFiles
from diffussm.data.images import ImageSource
from diffussm.data.loader import is_latent_set
from diffussm.data.reading import in_batches, read_images
from diffussm.evaluation.reference import measure_reference, read_request, save_reference
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import BadImage, ConfigError, RunDirectoryError
from diffussm.runtime.hashing import hash_text
from diffussm.runtime.run_dir import refuse_unwritable
from diffussm.runtime.seeding import make_generator
from diffussm.training.logging import Progress


def run(options: argparse.Namespace) -> int:
    """Measure every image, unless the file holds the answer already."""
    keep_freed_memory()
    config = compose("stats", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    _refuse_idle_keys(options.overrides)
    path = Path(config.to)
    _check_place(path)
    device = choose_device(config.device)
    source: ImageSource = construct(config.data, "data")
    if is_latent_set(source):
        raise ConfigError("data: holds latents, and statistics are of images: choose the data that was encoded")
    extractor = build_extractor(config.evaluation, source.image_shape)
    name = extractor.name or "inception"
    request = json.loads(
        json.dumps(
            {
                "data": source.fingerprint,
                "preprocessing": _preprocessing(source),
                "extractor": {"name": name, "sha256": extractor.sha256, **extractor.settings},
                "num_images": min(config.num_images, len(source)),
                "seed": config.seed,
            }
        )
    )
    if path.exists():
        _refuse_another(path, request)
        print(f"{path}: holds these statistics already: nothing to do")
        return 0

    path.parent.mkdir(parents=True, exist_ok=True)
    listed = path.with_suffix(".bad_files.jsonl")
    listed.unlink(missing_ok=True)  # of a run that found too many
    bad_files = BadFiles(listed, len(source), source.max_bad_fraction)
    progress = Progress(len(source), 0, "img")

    def tell(bad: list[BadImage]) -> None:
        bad_files.add(bad)
        if bad:
            progress.advance(len(bad))

    batches = _batches(source, config, tell)
    try:
        arrays = measure_reference(batches, extractor, request["num_images"], device, progress.advance)
    finally:
        progress.close()
    texts = {
        "preprocessing": request["preprocessing"],
        "preprocessing_sha256": hash_text(source.preprocessing),
        "data_sha256": hash_text(json.dumps(request["data"], sort_keys=True)),
        "extractor": name,
        "extractor_sha256": extractor.sha256,
    }
    save_reference(path, {**arrays, **{key: np.array(text) for key, text in texts.items()}}, request)
    _report(path, arrays, texts, bad_files)
    return 0


def _refuse_idle_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("evaluation.") and not key.startswith("evaluation.extractor"):
            raise ConfigError(f"{key}: decides nothing of a reference: leave it out, and say it to `evaluate`")


def _check_place(path: Path) -> None:
    if path.suffix != ".npz":
        raise ConfigError(f"to={path}: must end in .npz")
    refuse_unwritable(path.parent, f"to={path}", "file")


def _refuse_another(path: Path, request: Mapping[str, Any]) -> None:
    there = read_request(path)
    if there is None:
        raise RunDirectoryError(f"to={path}: exists and is not ours: choose another file")
    other = [key for key in request if there.get(key) != request[key]]
    if other:
        raise RunDirectoryError(
            f"to={path}: holds statistics of another request (other {', '.join(other)}): choose another file"
        )


def _batches(
    source: ImageSource, config: DictConfig, tell: Callable[[list[BadImage]], object]
) -> Iterator[Tensor]:
    """All images: first `num_images` random ones, if so many can be read, then the others in their order."""

    def read(indices: Tensor) -> Iterator[Tensor]:
        numbers = indices.tolist()
        for batch in read_images(source, in_batches(numbers, config.batch_size), config.num_workers, tell):
            yield batch.images

    order = torch.randperm(len(source), generator=make_generator(config.seed, "reference images"))
    chosen = position = 0
    while chosen < config.num_images and position < len(order):
        part = order[position : position + config.num_images - chosen]
        position += len(part)
        for images in read(part):
            chosen += len(images)
            yield images
    yield from read(order[position:].sort().values)


def _preprocessing(source: ImageSource) -> str:
    """In words: where the images are from, and what was done to them."""
    kind = [str(source.fingerprint[key]) for key in ("source", "split") if source.fingerprint.get(key)]
    return f"{' '.join(kind)}, {source.preprocessing}"


def _report(path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str], bad_files: BadFiles) -> None:
    shape = "x".join(map(str, arrays["arr_0"].shape[1:]))
    lines = {
        "reference": str(path),
        "statistics": f"of {int(arrays['count']):,} images, by {texts['extractor']}",
        "images": f"{len(arrays['arr_0']):,} of {shape}",
        "pixels": texts["preprocessing"],
    }
    if bad_files.reasons:
        lines["left out"] = f"{len(bad_files.reasons):,} unreadable images, listed in {bad_files.path}"
    for key, text in lines.items():
        print(f"{key:<12} {text}")
