"""The suite `data`: how fast batches come from the loader, without a model behind it.

Latents are read from moments on disk, flipped, and sampled from their posterior; photographs of ImageNet's size
are decoded, cropped as ADM does, and flipped, by our loader and by torchvision's and torch's own.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from diffussm.bench.timing import summarize
from diffussm.bench.workload import Measurement, Setup, Skip
from diffussm.data.encoding import Encoding
from diffussm.data.fake import Fake
from diffussm.data.images import ImageFolder
from diffussm.data.loader import BatchLoader
from diffussm.data.workers import SLOTS

LATENTS, FOLDER, TORCHVISION = "latents", "photographs", "photographs, torchvision"
NUM_WORKERS = 2
LATENT_SHAPE, NUM_LATENTS, LATENT_BATCH, LATENT_BATCHES = (4, 32, 32), 4096, 256, 64
RESOLUTION, NUM_PHOTOGRAPHS, PHOTOGRAPH_BATCH, PHOTOGRAPH_BATCHES = 256, 512, 32, 8
PHOTOGRAPH_SIZE, JPEG_QUALITY = (500, 375), 90  # as most of ImageNet's are
LATENT_AREA, PHOTOGRAPH_AREA = LATENT_SHAPE[1] * LATENT_SHAPE[2], RESOLUTION**2


@dataclass(frozen=True)
class Pipeline:
    """Batches without end from workers that it starts; `size` in each."""

    start: Callable[[], Iterator[Any]]
    size: int

    def seconds(self, num_batches: int) -> float:
        """Time for so many batches once those are gone that were prepared while nobody waited."""
        batches = self.start()
        for _ in range(2 * SLOTS * NUM_WORKERS):
            next(batches)
        start = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        return time.perf_counter() - start


def measure_loading(setup: Setup, note: Callable[[str], None]) -> Iterator[Measurement | Skip]:
    """Measure latents, then photographs; both are made in a temporary directory first."""
    with tempfile.TemporaryDirectory() as temporary:
        note(f"data: {NUM_LATENTS:,} latents of {LATENT_SHAPE}, {NUM_WORKERS} workers")
        yield from _measure({LATENTS: latents(Path(temporary))}, LATENT_AREA, LATENT_BATCHES, setup)
    with tempfile.TemporaryDirectory() as temporary:
        note(f"data: {NUM_PHOTOGRAPHS:,} photographs cropped to {RESOLUTION} pixels, {NUM_WORKERS} workers")
        try:
            pipelines = photographs(Path(temporary))
        except ImportError:
            reason = "the photographs come with scikit-learn: pip install 'diffussm[digits]'"
            for name in (FOLDER, TORCHVISION):
                yield Skip("data", "loading", name, PHOTOGRAPH_AREA, reason)
            return
        yield from _measure(pipelines, PHOTOGRAPH_AREA, PHOTOGRAPH_BATCHES, setup)


def _measure(
    pipelines: Mapping[str, Pipeline], area: int, num_batches: int, setup: Setup
) -> Iterator[Measurement]:
    """In turns, whose order alternates; each has its workers to itself."""
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(setup.repetitions):
        for name in sorted(pipelines, reverse=turn % 2 == 1):
            times[name].append(pipelines[name].seconds(num_batches))
        if any(sum(taken) + min(taken) > setup.seconds for taken in times.values()):
            break
    for name, taken in times.items():
        items = num_batches * pipelines[name].size
        yield Measurement("data", "loading", name, area, summarize(taken), 0, 0, 0, items)


def latents(directory: Path) -> Pipeline:
    """Our loader on a latent set."""
    encoding = Encoding(Fake(NUM_LATENTS, resolution=8), _Moments(), directory / "latents", batch_size=256)
    encoding.open()
    source = encoding.run()
    encoding.close()
    loader = BatchLoader(source, LATENT_BATCH, seed=0, with_labels=True, num_workers=NUM_WORKERS)
    return Pipeline(lambda: loader.starting_at(0), LATENT_BATCH)


class _Moments:
    """An encoder for the benchmark: any moments, as fast as can be."""

    scale, shift, is_stochastic = 0.18215, 0.0, True
    fingerprint = {"kind": "bench"}  # noqa: RUF012  (read only)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of SD's autoencoder at 256 pixels."""
        return LATENT_SHAPE

    def encode(self, images: Tensor) -> Tensor:
        """(B, 2c, h, w)."""
        channels, height, width = LATENT_SHAPE
        return torch.randn(len(images), 2 * channels, height, width)


def photographs(directory: Path) -> dict[str, Pipeline]:
    """Our loader on an image folder, and torchvision's data set with torch's loader on the same."""
    import torchvision.transforms as T  # here, because it takes a second
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    make_photographs(directory)
    source = ImageFolder(directory, RESOLUTION)
    ours = BatchLoader(source, PHOTOGRAPH_BATCH, seed=0, with_labels=True, num_workers=NUM_WORKERS)
    transform = T.Compose([_crop_as_adm, T.RandomHorizontalFlip(), T.PILToTensor()])
    folder = TorchvisionFolder(str(directory), transform)
    endless = RandomSampler(folder, num_samples=2**40)
    theirs: DataLoader = DataLoader(folder, PHOTOGRAPH_BATCH, sampler=endless, num_workers=NUM_WORKERS)
    return {
        FOLDER: Pipeline(lambda: ours.starting_at(0), PHOTOGRAPH_BATCH),
        TORCHVISION: Pipeline(lambda: iter(theirs), PHOTOGRAPH_BATCH),
    }


def make_photographs(directory: Path) -> None:
    """JPEGs of two classes: pieces of the two photographs that ship with scikit-learn."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole, (width, height) = Image.fromarray(pixels), PHOTOGRAPH_SIZE
        (directory / name).mkdir()
        for index in range(NUM_PHOTOGRAPHS // 2):
            left, top = int(rng.integers(whole.width - width)), int(rng.integers(whole.height - height))
            piece = whole.crop((left, top, left + width, top + height))
            piece.save(directory / name / f"{index}.jpg", quality=JPEG_QUALITY)


def _crop_as_adm(image: Image.Image) -> Image.Image:
    """ADM's crop as torchvision's users write it."""
    while min(image.size) >= 2 * RESOLUTION:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = RESOLUTION / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
    return image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
