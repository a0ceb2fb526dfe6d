"""`diffussm sample`: images from a checkpoint, as files and as a grid."""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

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
from diffussm.commands.in_processes import Job, in_processes
from diffussm.data.sample_files import NPZ, NpzFile, PngFiles, SampleFiles, TarFiles
from diffussm.data.samples import RECORD, SampleArchive, SampleFolder, SampleTars, StoredSamples
from diffussm.evaluation.generate import Generator
from diffussm.evaluation.streams import GeneratedStream
from diffussm.report.grid import save_rows
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, RunDirectoryError
from diffussm.runtime.run_dir import write_json
from diffussm.runtime.work_list import Tell, WorkList
from diffussm.training.checkpoint import Checkpoint

MAX_GRID_COLUMNS = 20
UNFINISHED = "unfinished"  # what is known of finished ranges, until all are


def run(options: argparse.Namespace) -> int:
    """Draw what is asked for and missing; nothing if all of it is there."""
    keep_freed_memory()
    if options.print_config:
        return print_config(open_checkpoint(options)[2])
    return in_processes(options, lambda job: _sample(options, job))


def _sample(options: argparse.Namespace, job: Job) -> int:
    checkpoint, trained, config = job.processes.on_all(lambda: open_checkpoint(options))
    out, is_new = draw(checkpoint, trained, config, job)
    if job.processes.is_first:
        where = "each in a file beside it" if config.format == "png" else f"as {config.format} beside it"
        said = (
            f"{config.num_images} images, {where}"
            if is_new
            else f"these {config.num_images} images are there already"
        )
        print(f"{out / 'grid.png'}: {said}")
    return 0


def draw(checkpoint: Checkpoint, trained: DictConfig, config: DictConfig, job: Job) -> tuple[Path, bool]:
    """Draw the images of a configuration of `sample`: where they are, and whether some had to be drawn."""
    processes = job.processes
    request = processes.on_all(lambda: request_of(checkpoint, config))
    out = Path(config.out or run_path(checkpoint) / "samples" / f"{checkpoint.path.name}-{digest(request)}")
    if processes.on_first(lambda: is_complete(out, request)):
        processes.on_first(lambda: _refuse_gaps(out, config))
        return out, False

    def build() -> tuple[GeneratedStream, str]:
        system = build_system(checkpoint, trained, str(job.device))
        weights = load_weights(checkpoint, system.model, config.sampling.weights)
        generator = system.generator(system.model, config)
        return choose_stream(generator, config), weights

    stream, weights = processes.on_all(build)
    record = {"request": request, "weights": weights}
    work = WorkList(out / UNFINISHED, len(stream), config.range_size, ".json")
    work.open(digest(request), processes)
    try:
        files = _choose_files(config.format, out, work, checkpoint)
        if processes.is_first:
            write_json(out / RECORD, {**record, "complete": False})
        with job.undertake(work) as (undertaking, show):
            work.work_off(lambda number, tell: _draw(stream, work, number, files, tell), undertaking, show)
        processes.on_first(lambda: _finish(record, stream, work, files, config, _image_shape(checkpoint)[0]))
    finally:
        work.close()
    return out, True


def check_drawable(checkpoint: Checkpoint) -> None:
    """ConfigError for images that are neither grey nor in colour."""
    channels = _image_shape(checkpoint)[0]
    if channels not in (1, 3):
        raise ConfigError(
            f"{checkpoint.path}: gives images of {channels} channels, which cannot be drawn: "
            "import the weights anew with the autoencoder of these latents, such as autoencoder=sd3_vae"
        )


def choose_stream(generator: Generator, config: DictConfig) -> GeneratedStream:
    """The images of a configuration of `sample`."""
    classes = configured_classes(config, generator.num_classes)
    return GeneratedStream(generator, config.num_images, config.labels, classes)


def configured_classes(config: DictConfig, num_classes: int | None) -> list[int] | None:
    """Those of a configuration of `sample`, as `choose_classes` gives them."""
    chosen = None if config.classes is None else list(dict.fromkeys(config.classes))  # a row for each
    return choose_classes(chosen, config.labels, num_classes)


def request_of(checkpoint: Checkpoint, config: DictConfig) -> dict[str, Any]:
    """All that decides which images these are; ConfigError if they cannot be drawn."""
    check_drawable(checkpoint)
    request = make_request(checkpoint, config, ("sampler", "guidance", "num_images", "classes"))
    # There are requests older than these choices.
    if config.labels != "cyclic":
        request["labels"] = config.labels
    if config.format != "png":
        request["format"] = config.format
    if config.format == "tar":
        request["range_size"] = config.range_size
    return request


def _image_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    channels, height, width = checkpoint.document("train_state")["data"]["image_shape"]
    return channels, height, width


def is_complete(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether `out` holds all of this request; RunDirectoryError if it holds anything else."""
    answer = read_answer(out / RECORD)
    if answer is None:
        if out.exists() and (not out.is_dir() or any(file.name != UNFINISHED for file in out.iterdir())):
            raise RunDirectoryError(f"out={out}: exists and is not ours: choose another directory")
        return False
    if digest(answer["request"]) != digest(request):
        raise RunDirectoryError(f"out={out}: holds other samples: choose another directory")
    if answer["complete"] and (out / UNFINISHED).exists():  # killed at the very end
        shutil.rmtree(out / UNFINISHED)
    return answer["complete"]


def _refuse_gaps(out: Path, config: DictConfig) -> None:
    """RunDirectoryError if complete samples have lost a file since."""
    if config.format == "npz":
        names = [NPZ]
    elif config.format == "tar":
        names = [f"shard-{number:06d}.tar" for number in range(math.ceil(config.num_images / config.range_size))]
    else:
        names = [f"{index:06d}.png" for index in range(config.num_images)]
    there = {file.name for file in out.iterdir()}
    if gone := [name for name in names if name not in there]:
        raise RunDirectoryError(f"{out / gone[0]}: is gone: delete {out} to draw all anew, or choose another out=")


def choose_classes(
    chosen: Sequence[int] | None, way: str, num_classes: int | None, key: str = "classes"
) -> list[int] | None:
    """Those that images are drawn of, None for an unconditional model; ConfigError names `key`."""
    if num_classes is None:
        for name, value in ((key, chosen), ("labels", None if way == "cyclic" else way)):
            if value is not None:
                raise ConfigError(f"{name}={value}: the model is unconditional: leave it out")
        return None
    few = range(min(num_classes, MAX_GRID_ROWS) if way == "cyclic" else num_classes)
    classes = list(few if chosen is None else chosen)
    if not classes or not all(0 <= label < num_classes for label in classes):
        raise ConfigError(f"{key}={classes}: each must lie in 0..{num_classes - 1}")
    return classes


def _choose_files(form: str, out: Path, work: WorkList, checkpoint: Checkpoint) -> SampleFiles:
    if form == "npz":
        return NpzFile(out, work.path, _image_shape(checkpoint))
    return TarFiles(out) if form == "tar" else PngFiles(out)


def _draw(stream: GeneratedStream, work: WorkList, number: int, files: SampleFiles, tell: Tell) -> None:
    """Draw a range, and declare it finished when its images are on the disk."""
    indices = work.indices(number)
    images, labels = [], []
    for batch in stream.batches(indices):
        images.append(batch.images)
        labels += [] if batch.labels is None else batch.labels.tolist()
        tell(len(batch.indices))
    pixels = torch.cat(images)
    files.write(number, indices, pixels, labels or None)
    content = hashlib.sha256(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    write_json(
        work.file(number),
        {"indices": [indices.start, indices.stop], "sha256": content.hexdigest(), "labels": labels},
    )


def _finish(
    record: Mapping[str, Any],
    stream: GeneratedStream,
    work: WorkList,
    files: SampleFiles,
    config: DictConfig,
    channels: int,
) -> None:
    """Make of all ranges what was asked for."""
    out, ranges = work.path.parent, [work.indices(number) for number in range(len(work))]
    records = [json.loads(work.file(number).read_bytes()) for number in range(len(work))]
    drawn = [index for part in records for index in range(*part["indices"])]
    assert drawn == list(range(len(stream))), "not the images that were asked for"
    labels = [label for part in records for label in part["labels"]]
    files.finish(ranges, labels or None)
    _save_grid(_read_back(out, config.format, channels, labels), out / "grid.png", config, stream.classes)
    content = hashlib.sha256("".join(part["sha256"] for part in records).encode()).hexdigest()
    noted = {"labels": labels} if labels and config.format == "png" else {}
    write_json(
        out / RECORD, {**record, "range_size": work.range_size, "sha256": content, **noted, "complete": True}
    )
    work.remove()


def _read_back(out: Path, form: str, channels: int, labels: Sequence[int]) -> StoredSamples:
    if form == "npz":
        return SampleArchive(out / NPZ, channels, "out")
    return SampleTars(out, channels, "out") if form == "tar" else SampleFolder(out, channels, "out", labels)


def _save_grid(samples: StoredSamples, path: Path, config: DictConfig, classes: Sequence[int] | None) -> None:
    """The first images of every class in its row, or the first of all, at most MAX_GRID_COLUMNS wide."""
    labels, shown = samples.labels or [], list(classes or [])[: None if config.classes else MAX_GRID_ROWS]
    rows = [[index for index, label in enumerate(labels) if label == chosen] for chosen in shown]
    rows = [row[:MAX_GRID_COLUMNS] for row in rows]
    names = [str(label) for label, row in zip(shown, rows, strict=True) if row]
    if not names:
        columns = min(math.ceil(len(samples) ** 0.5), MAX_GRID_COLUMNS)
        first = range(min(len(samples), MAX_GRID_COLUMNS * columns))
        rows = [list(first[start : start + columns]) for start in range(0, len(first), columns)]
    pictures = [torch.stack([samples[index][0] for index in row]) for row in rows if row]
    save_rows(pictures, path, names or None)
