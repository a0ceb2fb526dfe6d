"""A reference that is a folder or tar file of images: measured once, and kept as a file beside the answer."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from diffussm.build import build_extractor
from diffussm.commands.in_processes import Job
from diffussm.data.samples import open_samples
from diffussm.evaluation.reference import measure_reference, read_request, save_reference
from diffussm.evaluation.streams import StoredStream
from diffussm.runtime.errors import ConfigError, Preempted
from diffussm.runtime.hashing import hash_text
from diffussm.runtime.seeding import make_generator
from diffussm.training.logging import Progress

REFERENCE_IMAGES = 10_000  # that precision and recall see, as in ADM's references


def use_stored_reference(config: DictConfig, image_shape: Sequence[int], out: Path, job: Job) -> None:
    """Where the reference is a folder or tar file of images, have it measured, and compare with the result."""
    given = Path(str(config.evaluation.reference)).expanduser()
    if given.is_dir() or given.suffix == ".tar":
        found = job.processes.on_first(lambda: _measure_folder(config, given, tuple(image_shape), out, job))
        config.evaluation.reference = str(found)


def _measure_folder(config: DictConfig, path: Path, image_shape: tuple[int, ...], out: Path, job: Job) -> Path:
    """A reference file, beside the answer, of the images at `path`; made once for the same images."""
    extractor = build_extractor(config.evaluation, image_shape)
    images = open_samples(path, image_shape[0], "evaluation.reference")
    if images.image_shape != image_shape:
        raise ConfigError(
            f"evaluation.reference={path}: images of shape {images.image_shape}, the samples have {image_shape}: "
            "choose a reference of that size"
        )
    name = extractor.name or "inception"
    facts = {"name": name, "sha256": extractor.sha256, **extractor.settings}
    request = json.loads(json.dumps({"images": images.sha256, "extractor": facts, "num_images": REFERENCE_IMAGES}))
    made = out.with_name(f"reference-{hash_text(json.dumps(request, sort_keys=True))[:8]}.npz")
    if made.exists() and read_request(made) == request:
        return made
    order = torch.randperm(len(images), generator=make_generator(0, "reference images")).tolist()
    progress = Progress(len(images), 0, "img of the reference")

    def advance(done: int) -> None:
        progress.advance(done)
        if job.stop():
            raise Preempted("stopped by signal, before the reference was measured: run it again")

    batches = (batch.images for batch in StoredStream(images, config.sampling.batch_size).batches(order))
    try:
        arrays = measure_reference(batches, extractor, REFERENCE_IMAGES, job.device, advance)
    finally:
        progress.close()
    texts = {"preprocessing": f"{path.name}, as stored", "extractor": name, "extractor_sha256": extractor.sha256}
    save_reference(made, {**arrays, **{key: np.array(text) for key, text in texts.items()}}, request)
    return made
