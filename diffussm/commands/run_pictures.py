"""Pictures of runs for `compare` and `report`: drawn as `sample` draws them, or found in the run directory."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffussm.commands.denoising import draw_denoising
from diffussm.commands.from_checkpoint import open_checkpoint
from diffussm.commands.in_processes import Job
from diffussm.commands.run_collection import Asked
from diffussm.commands.sample import configured_classes, draw
from diffussm.evaluation.generate import choose_labels
from diffussm.report.page import Gallery, Strip
from diffussm.report.pictures import Picture, embed
from diffussm.report.run_record import RunRecord
from diffussm.runtime.errors import ConfigError, UserError
from diffussm.training.checkpoint import Checkpoint

MOST_PIXELS = 128  # of a sample in a page
MOST_GRID_PIXELS = 640


@dataclass(frozen=True)
class Drawn:
    """Images of a run.

    Attributes:
        images: label and file of each.
        checkpoint: the name of that they are of.
        manner: sampler, weights, seed and guidance, in words.
        problem: why there are none.
    """

    images: Sequence[tuple[str, Path]] = ()
    checkpoint: str = ""
    manner: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Drawer:
    """Draws images of runs as `sample` does, once; what cannot be drawn is a remark, unless it was asked for."""

    asked: Asked

    def samples(self, run: RunRecord, count: int) -> Drawn:
        """The first `count` images."""
        if not count:
            return Drawn(problem="None were asked for.")
        with self._explaining() as remark:
            checkpoint, trained, config = self._open(run, count)
            out, _ = draw(checkpoint, trained, config, Job.alone(config.device))
            images = [(label, out / f"{i:06d}.png") for i, label in enumerate(_labels(trained, config))]
            return Drawn(images, checkpoint.path.name, _describe(config))
        return Drawn(problem=remark[0])

    def by_class(self, run: RunRecord, count: int) -> Gallery:
        """The first `count` images, those of a class in its row."""
        drawn = self.samples(run, count)
        has_classes = len({label for label, _ in drawn.images}) > 1
        about = drawn.problem or f"Drawn from {drawn.checkpoint}: {drawn.manner}."
        return Gallery("Samples by class" if has_classes else "Samples", about, _rows(drawn.images))

    def denoising(self, run: RunRecord, count: int) -> Gallery:
        """Of the first `count` images, rows of x_t and of the expected x_0."""
        title = "Step by step"
        if not count:
            return Gallery(title, "None were asked for.", [])
        with self._explaining() as remark:
            checkpoint, trained, config = self._open(run, count)
            out, timesteps = draw_denoising(checkpoint, trained, config)
            labels, strips = _labels(trained, config), []
            for index, label in enumerate(labels):
                for name, says in (("x_t", "noisy image"), ("x_0", "expected image")):
                    pictures = [
                        embed(
                            out / f"{index:06d}-{step}-{name}.png", f"{label}, {says} at t = {t:.0f}", MOST_PIXELS
                        )
                        for step, t in enumerate(timesteps)
                    ]
                    last = embed(out / f"{index:06d}.png", f"{label}, the image", MOST_PIXELS)
                    strips.append(Strip(f"{label}, {name}", [*pictures, last]))
            columns = [*(f"t = {t:.0f}" for t in timesteps), "image"]
            about = "From noise to image: x_t as the sampler has it, and the x_0 that the network expects of it."
            return Gallery(title, f"{about} {checkpoint.path.name}, {_describe(config)}.", strips, columns)
        return Gallery(title, remark[0], [])

    def _open(self, run: RunRecord, count: int) -> tuple[Checkpoint, DictConfig, DictConfig]:
        path = str(run.path).replace("\\", "\\\\").replace("'", "\\'")
        own = self.asked.config
        overrides = [f"checkpoint='{path}'", f"num_images={count}", f"device={own.device}"]
        if own.trust_checkpoint:
            overrides.append("trust_checkpoint=true")
        return open_checkpoint(
            argparse.Namespace(
                verb="sample", overrides=[*overrides, *self.asked.drawing], config_dir=self.asked.config_dir
            )
        )

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[list[str]]:
        """Holds why it ended before its end."""
        remark: list[str] = []
        try:
            yield remark
        except (UserError, torch.cuda.OutOfMemoryError) as error:
            if self.asked.drawing and isinstance(error, ConfigError):
                raise  # what was asked for by name is not left out in silence
            remark.append(f"Could not be drawn: {str(error).splitlines()[0]}")


def _labels(trained: DictConfig, config: DictConfig) -> list[str]:
    """What each image shows."""
    classes = configured_classes(config, trained.model.num_classes)
    if classes is None:
        return ["sample"] * config.num_images
    labels = choose_labels(config.labels, config.sampling.seed, range(config.num_images), classes)
    return [f"class {label}" for label in labels.tolist()]


def _describe(config: DictConfig) -> str:
    sampling, sampler = config.sampling, config.sampler
    name = sampler.get("scheduler") or sampler._target_.rpartition(".")[2]
    guidance = config.guidance.get("scale")
    parts = [
        f"{name}, {sampler.get('num_steps')} steps",
        f"weights {sampling.weights}",
        f"seed {sampling.seed}",
        *([] if guidance is None else [f"guidance {guidance:g}"]),
    ]
    return ", ".join(parts)


def _rows(drawn: Sequence[tuple[str, Path]]) -> list[Strip]:
    """A row for each label."""
    rows: dict[str, list[Picture]] = {}
    for index, (label, path) in enumerate(drawn):
        rows.setdefault(label, []).append(embed(path, f"{label}, image {index}", MOST_PIXELS))
    if len(rows) == 1:  # nothing tells them apart: in rows of eight
        pictures = next(iter(rows.values()))
        return [Strip(f"{start}", pictures[start : start + 8]) for start in range(0, len(pictures), 8)]
    return [Strip(label, pictures) for label, pictures in rows.items()]


def training_grids(run: RunRecord, most: int) -> Gallery | None:
    """At most so many of the grids that were drawn in training, the first and the newest among them."""
    paths = sorted((run.path / "samples").glob("images-*.png"))
    if not paths:
        return None
    chosen = torch.linspace(0, len(paths) - 1, min(most, len(paths))).round().long().tolist()
    pictures, columns = [], []
    for index in dict.fromkeys(chosen):
        with contextlib.suppress(OSError, ValueError):  # one that is just being written, or is none
            images = int(paths[index].stem.removeprefix("images-"))
            pictures.append(embed(paths[index], f"samples at {images:,} images", MOST_GRID_PIXELS))
            columns.append(f"{images:,} images")
    about = f"{len(pictures)} of {len(paths)} grids, a row for each class where there are classes."
    return Gallery("Samples during training", about, [Strip("", pictures)], columns) if pictures else None
