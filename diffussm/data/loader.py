"""Global batches in an order that is a function of (seed, epoch, position), from any step on."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffussm.data.images import ImageSource
from diffussm.runtime.errors import ConfigError, DataError
from diffussm.runtime.seeding import make_generator


@dataclass(frozen=True)
class Batch:
    """A global batch of images; labels are None for an unconditional model."""

    images: UInt8[Tensor, "B C H W"]
    labels: Int[Tensor, "B"] | None


class BatchLoader:
    """Shuffled batches without end: position p is item p mod n of the permutation of epoch p div n.

    Batches run across the ends of epochs, so that every image is seen once per epoch at any batch size.
    Mirror images are drawn for step s from (seed, s).

    Args:
        with_labels: whether batches carry labels; the source must have them then.
        num_workers: processes that read and decode; 0 reads in this one.
        pin_memory: page-lock batches, for faster transfer to a GPU.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        with_labels: bool,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if with_labels and source.num_classes is None:
            raise ConfigError("the data has no class labels: set model.num_classes=null")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.with_labels, self.num_workers, self.pin_memory = with_labels, num_workers, pin_memory

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The source's."""
        return self.source.fingerprint

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The batches of steps `step`, `step` + 1, ... DataError names the file that cannot be read."""
        loader = DataLoader(
            _Fetch(self.source),
            batch_sampler=_IndexBatches(len(self.source), self.batch_size, self.seed, step),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # not the global one, which is the caller's
        )
        for current, fetched in enumerate(loader, start=step):
            if isinstance(fetched, str):
                raise DataError(fetched)
            images, labels = fetched
            if self.source.horizontal_flip:
                draws = torch.rand(len(images), generator=make_generator(self.seed, "flip", current))
                images = torch.where((draws < 0.5)[:, None, None, None], images.flip(-1), images)
            yield Batch(images, labels if self.with_labels else None)


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, timeout and SLURM signal every process of a run: workers must outlast that, or the last save fails.

    A second SIGTERM, which is how the main process ends a worker that hangs, takes effect.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class _IndexBatches:
    """The endless sequence of index lists that a DataLoader takes as its batch sampler."""

    def __init__(self, length: int, batch_size: int, seed: int, step: int) -> None:
        self.length, self.batch_size, self.seed, self.step = length, batch_size, seed, step

    def __iter__(self) -> Iterator[list[int]]:
        @lru_cache(maxsize=2)
        def permutation(epoch: int) -> Tensor:
            return torch.randperm(self.length, generator=make_generator(self.seed, "epoch", epoch))

        position = self.step * self.batch_size
        while True:
            positions = range(position, position + self.batch_size)
            yield [int(permutation(p // self.length)[p % self.length]) for p in positions]
            position += self.batch_size


class _Fetch(Dataset):
    """Whole batches from a source; an unreadable image comes back as its message, not as a traceback."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | str:
        try:
            images, labels = zip(*(self.source[index] for index in indices), strict=True)
        except DataError as error:
            return str(error)
        return torch.stack(images), torch.tensor(labels)
