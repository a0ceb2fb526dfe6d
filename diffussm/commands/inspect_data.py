"""`diffussm inspect`: what is in a data set and what is wrong with it, for its owner's eyes."""

import argparse
import hashlib
import json
import math
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import interpolate

from diffussm.build import choose_device, construct
from diffussm.commands import print_config
from diffussm.compose import compose
from diffussm.data.autoencoder import Autoencoder, IdentityAutoencoder
from diffussm.data.bad_files import listing
from diffussm.data.images import ImageSource
from diffussm.data.inspection import Classes, Examination, choose_by_class, examine, labels_of, read_some
from diffussm.data.loader import BatchLoader, LatentSource, is_latent_set
from diffussm.data.roundtrip import there_and_back
from diffussm.data.workers import SLOTS
from diffussm.report.grid import save_rows
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import DataError, RunDirectoryError
from diffussm.runtime.run_dir import refuse_unwritable, write_atomically, write_json
from diffussm.runtime.seeding import make_generator
from diffussm.training.logging import Progress

FACTS, BAD_FILES = "inspect.json", "bad_files.jsonl"
SAMPLES, RECONSTRUCTIONS = "samples.png", "reconstructions.png"
MAX_CLASSES, MAX_COLUMNS, PAIR_COLUMNS, MAX_PAIR_ROWS = 10, 16, 8, 4
MAX_TITLE = 24  # characters of a class in front of its row
MAX_CELL = 256  # pixels of a sample; larger ones are reduced
NAMED = 5  # examples in a line
MAX_WIDTH = 110  # characters


def run(options: argparse.Namespace) -> int:
    """Look, print what was found, and leave it with pictures in a directory. The same request looks anew."""
    keep_freed_memory()
    config = compose("inspect", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    device = choose_device(config.device)
    source: ImageSource = construct(config.data, "data")
    autoencoder: Any = construct(config.autoencoder, "autoencoder")
    if isinstance(autoencoder, IdentityAutoencoder):
        autoencoder = None
    request = json.loads(
        json.dumps(
            {
                "data": source.fingerprint,
                "autoencoder": autoencoder and autoencoder.fingerprint,
                **{key: config[key] for key in ("examined", "num_images", "seed")},
            }
        )
    )
    out = Path(config.out or f"inspect/{source.fingerprint['source']}-{_digest(request)}")
    _check_place(out, request)
    if autoencoder is not None:
        if is_latent_set(source):
            source.check_autoencoder(autoencoder.fingerprint)
        else:
            autoencoder.latent_shape(source.image_shape)  # refuses what it cannot encode
        autoencoder = autoencoder.to(device)

    write_json(out / FACTS, {"request": request, "complete": False})
    found = Findings(out)
    inspect = _inspect_latents if is_latent_set(source) else _inspect_images
    inspect(source, autoencoder, config, device, found)
    write_json(out / FACTS, {"request": request, "complete": True, **found.facts, "problems": found.problems})
    found.print()
    return 0


class Findings:
    """What was found so far: `facts` for programs, lines for people, `problems` for both."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.facts: dict[str, Any] = {}
        self.problems: list[str] = []
        self._lines: list[tuple[str, str]] = []

    def say(self, key: str, text: str) -> None:
        """Add a line."""
        self._lines.append((key, text))

    def save(self, rows: Sequence[Tensor], name: str, labels: Sequence[str] | None = None) -> None:
        """A grid of pictures; none if they cannot be shown as colours."""
        if rows and rows[0].shape[1] in (1, 3):
            save_rows(rows, self.out / name, labels)
            self.say("pictures", str(self.out / name))

    def print(self) -> None:
        """All of it, problems last."""
        previous = ""
        for key, text in self._lines:
            print(f"{key if key != previous else '':<12} {text}")
            previous = key
        print(f"{'results':<12} {self.out / FACTS}")
        print(f"{'problems':<12} {len(self.problems) or 'none found'}")
        width = min(shutil.get_terminal_size((MAX_WIDTH, 0)).columns, MAX_WIDTH)
        for number, problem in enumerate(self.problems, start=1):
            lead = f"{number:>4}. "
            print(
                textwrap.fill(
                    problem, width, initial_indent=lead, subsequent_indent=" " * len(lead),
                    break_long_words=False, break_on_hyphens=False,
                )
            )  # fmt: skip


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]


def _check_place(out: Path, request: Mapping[str, Any]) -> None:
    refuse_unwritable(out, f"out={out}", "directory")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        there = json.loads((out / FACTS).read_text())["request"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunDirectoryError(f"out={out}: exists and is not ours: choose another directory") from None
    if there != request:
        raise RunDirectoryError(f"out={out}: holds another inspection: choose another directory")


def _inspect_images(
    source: ImageSource,
    autoencoder: Autoencoder | None,
    config: DictConfig,
    device: torch.device,
    found: Findings,
) -> None:
    shape = "x".join(map(str, source.image_shape))
    found.say("data", f"{source.fingerprint['source']}, {len(source):,} images, read as {shape}")
    labels = _count_classes(source, found)
    order = torch.randperm(len(source), generator=make_generator(config.seed, "inspect"))
    chosen = order[: config.examined].sort().values.tolist()
    progress = Progress(len(chosen), 0, "img")
    try:
        images = examine(source, chosen, config.batch_size, config.num_workers, progress.advance)
    finally:
        progress.close()
    write_atomically(found.out / BAD_FILES, listing(images.bad))
    found.facts["images"] = images.record()
    found.problems += images.problems()
    _describe(images, found)
    if len(images.bad) > source.max_bad_fraction * images.num_examined or not images.num_readable:
        found.say("loader", "not timed: too many images cannot be read")
    else:
        _time_loader(source, config, found)
    _save_samples(source, labels, config, found)
    if autoencoder is not None:
        _save_reconstructions(source, order.tolist(), autoencoder, config, device, found)


def _count_classes(source: ImageSource, found: Findings) -> Tensor:
    """The labels of all images."""
    labels = labels_of(source)
    classes = Classes.of(source, labels)
    found.facts |= {"data": dict(source.fingerprint), "classes": classes.record()}
    found.problems += classes.problems()
    most, least = classes.largest, classes.smallest
    if most is None or least is None:
        found.say("classes", "none: train with model.num_classes=null")
    else:
        counts = classes.counts
        sizes = f"{counts[least]:,} ({least}) to {counts[most]:,} ({most}) images"
        empty = f", {len(classes.empty):,} without any" if classes.empty else ""
        found.say("classes", f"{len(counts):,}, of {sizes}{empty}")
        names = list(counts)
        found.say("", ", ".join(names[:MAX_CLASSES]) + (", ..." if len(names) > MAX_CLASSES else ""))
    return labels


def _describe(images: Examination, found: Findings) -> None:
    which = "all" if images.num_examined == images.num_images else f"{images.num_examined:,} random ones"
    found.say("examined", which)
    if images.bad:
        found.say("unreadable", f"{len(images.bad):,}, listed in {found.out / BAD_FILES}")
        for name, reason in islice(images.bad.items(), NAMED):
            found.say("", f"{name}: {reason}")
        if len(images.bad) > NAMED:
            found.say("", f"and {len(images.bad) - NAMED:,} more")
    else:
        found.say("unreadable", "none")
    if spans := images.spans():
        ranges = [
            f"{side} {low:,} to {high:,} (median {middle:,.0f})" for side, (low, middle, high) in spans.items()
        ]
        found.say("sizes", ", ".join(ranges))
        share = 100 * images.num_small / len(images.sizes)
        found.say("", f"{images.num_small:,} ({share:.1f} %) smaller than they are read, hence enlarged")
        for key, counts in (("formats", images.formats), ("modes", images.modes)):
            found.say(key, ", ".join(f"{name} {count:,}" for name, count in counts.most_common()))


def _time_loader(source: ImageSource, config: DictConfig, found: Findings) -> None:
    """Items per second once workers have caught up; nothing of it for seconds=0."""
    if not config.seconds:
        return
    with_labels = source.num_classes is not None
    loader = BatchLoader(
        source, config.batch_size, config.seed, with_labels, config.num_workers, warn=lambda line: None
    )
    batches = loader.starting_at(0)
    try:
        for _ in range(max(SLOTS * config.num_workers, 1)):
            next(batches)
        started, count, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < config.seconds:
            count += len(next(batches).images)
            elapsed = time.perf_counter() - started
    except DataError as error:
        found.problems.append(f"the loader stops: {error}")
        return
    rate = count / elapsed
    unit = "latents" if is_latent_set(source) else "images"
    with_workers = f"{config.num_workers} workers" if config.num_workers else "no workers"
    found.facts["loader"] = {
        "per_second": rate,
        "num_workers": config.num_workers,
        "batch_size": config.batch_size,
    }
    found.say("loader", f"{rate:,.0f} {unit} per second with {with_workers}, in batches of {config.batch_size}")


def _save_samples(source: ImageSource, labels: Tensor, config: DictConfig, found: Findings) -> None:
    """Rows for each of some classes, or a square without labels."""
    candidates = choose_by_class(labels, MAX_CLASSES, config.num_images, config.seed)
    count = config.num_images // len(candidates)
    rows = {label: read_some(source, indices, count)[1] for label, indices in candidates.items()}
    pictures = {label: _reduce(torch.stack(images)) for label, images in rows.items() if images}
    if -1 in pictures:
        everything = pictures[-1]
        found.save(everything.split(math.ceil(len(everything) ** 0.5)), SAMPLES)
    else:
        lines = [(label, line) for label, row in pictures.items() for line in row.split(MAX_COLUMNS)]
        names = source.class_names
        is_first = [index == 0 or lines[index - 1][0] != label for index, (label, _) in enumerate(lines)]
        titles = [names[label][:MAX_TITLE] * first for (label, _), first in zip(lines, is_first, strict=True)]
        found.save([line for _, line in lines], SAMPLES, titles)


def _save_reconstructions(
    source: ImageSource,
    order: Sequence[int],
    autoencoder: Autoencoder,
    config: DictConfig,
    device: torch.device,
    found: Findings,
) -> None:
    """Measure the loss, and draw what is lost: the worst ones, then others as they come."""
    indices, chosen = read_some(source, order, config.num_images)
    if not chosen:
        return
    progress = Progress(len(chosen), 0, "img")
    try:
        result = there_and_back(autoencoder, torch.stack(chosen), config.batch_size, device, progress.advance)
    finally:
        progress.close()
    worst_first = result.psnr.argsort(stable=True)
    name = source.name_of(indices[int(worst_first[0])])
    found.facts["autoencoder"] = {**result.record(), "worst_image": name}
    found.problems += result.problems()
    mean, worst = result.psnr.mean().item(), result.psnr.min().item()
    found.say("autoencoder", f"{autoencoder.fingerprint['kind']}, latents {_shape(autoencoder, source)}")
    found.say("", f"PSNR {mean:.1f} dB on average of {len(chosen):,} images, {worst:.1f} dB at worst ({name})")
    others = worst_first[PAIR_COLUMNS:].sort().values
    blocks = torch.cat([worst_first[:PAIR_COLUMNS], others]).split(PAIR_COLUMNS)[:MAX_PAIR_ROWS]
    rows, row_names = [], []
    for number, block in enumerate(blocks):
        rows += [result.images[block], result.decoded[block]]
        row_names += ["worst" if number == 0 else "others", "decoded"]
    found.save(rows, RECONSTRUCTIONS, row_names)


def _shape(autoencoder: Autoencoder, source: ImageSource) -> str:
    return "x".join(map(str, autoencoder.latent_shape(source.image_shape)))


def _reduce(images: Tensor) -> Tensor:
    """No larger than MAX_CELL."""
    factor = max(images.shape[-2:]) / MAX_CELL
    if factor <= 1:
        return images
    size = [round(side / factor) for side in images.shape[-2:]]
    return interpolate(images.float(), size, mode="area").round().byte()


def _inspect_latents(
    source: Any, autoencoder: Autoencoder | None, config: DictConfig, device: torch.device, found: Findings
) -> None:
    latents: LatentSource = source
    manifest = latents.manifest
    shape, image_shape = ("x".join(map(str, one)) for one in (latents.latent_shape, source.image_shape))
    found.say("data", f"latents, {len(source):,} of {shape}, {manifest['dtype']}, of images {image_shape}")
    encoder, origin = manifest["autoencoder"], manifest["source"]
    scaling = f"scale {manifest['scale']:g}, shift {manifest['shift']:g}"
    found.say("encoded by", f"{encoder['kind']} {str(encoder.get('sha256', ''))[:12]}, {scaling}")
    found.say("made from", f"{origin['source']}, {manifest['num_bad_files']:,} unreadable images left out")
    _count_classes(source, found)
    try:
        spread = latents.check_spread()
    except DataError as error:
        found.problems.append(str(error))
    else:
        found.facts["spread"] = spread
        found.say(
            "spread", f"standard deviation {spread:.2f} of some latents, {manifest['spread']['std']:.2f} of all"
        )
    _time_loader(source, config, found)
    if autoencoder is not None:
        _save_decoded(source, autoencoder, config, device, found)


def _save_decoded(
    source: Any, autoencoder: Autoencoder, config: DictConfig, device: torch.device, found: Findings
) -> None:
    """Latents of random images, and below each that of its mirror image if these are used."""
    order = torch.randperm(len(source), generator=make_generator(config.seed, "inspect"))
    indices = order[: min(config.num_images, PAIR_COLUMNS * MAX_PAIR_ROWS)]
    names = ["image", "mirrored"] if source.horizontal_flip else ["image"]
    rows = []
    for part in indices.split(PAIR_COLUMNS):
        mean = torch.zeros(len(part), *source.latent_shape)  # no noise
        for is_mirrored in (False, True)[: len(names)]:
            x_0 = source.latents(part, torch.full((len(part),), is_mirrored), mean)
            rows.append(_reduce(autoencoder.to_pixels(x_0.to(device)).cpu()))
    found.save(rows, SAMPLES, names * (len(rows) // len(names)))
