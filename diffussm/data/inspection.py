"""What a data set is like and what is wrong with it, from looking at its images."""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from diffussm.data.decode import read_header
from diffussm.data.images import ImageSource
from diffussm.data.loader import is_latent_set
from diffussm.data.reading import in_batches, read_images
from diffussm.runtime.errors import BadImage, note
from diffussm.runtime.seeding import make_generator

NOTABLE = 0.01  # share of the images below which small or grey ones are no problem
UNEQUAL = 10  # times as many images of one class as of another
NAMED = 3  # examples in a problem


@dataclass(frozen=True)
class Classes:
    """How many images of each class a data set has, by name; none without labels."""

    counts: Mapping[str, int]

    @classmethod
    def of(cls, source: ImageSource, labels: Int[Tensor, "N"]) -> "Classes":
        """Counted over all images."""
        names, known = source.class_names, source.num_classes or 0
        counts = torch.bincount(labels[labels >= 0], minlength=known).tolist() if known else []
        return cls({names[i] if i < len(names) else str(i): count for i, count in enumerate(counts)})

    @property
    def empty(self) -> list[str]:
        """Classes without images."""
        return [name for name, count in self.counts.items() if not count]

    @property
    def smallest(self) -> str | None:
        """Of those that have any images."""
        return min(
            (name for name, count in self.counts.items() if count), key=self.counts.__getitem__, default=None
        )

    @property
    def largest(self) -> str | None:
        """The class with most images."""
        return max(self.counts, key=self.counts.__getitem__, default=None)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"num_classes": len(self.counts) or None, "images": dict(self.counts)}

    def problems(self) -> list[str]:
        """What is wrong, and what to do."""
        found = []
        if self.empty:
            found.append(
                f"{len(self.empty):,} of {len(self.counts):,} classes have no images ({_name(self.empty)}): add "
                "some, or the model will draw anything for them"
            )
        most, least = self.largest, self.smallest
        if most is not None and least is not None and self.counts[most] >= UNEQUAL * self.counts[least]:
            found.append(
                f"classes are unequal: {self.counts[most]:,} images of {most}, {self.counts[least]:,} of {least}: "
                "the model will hardly learn the small ones: add images to them, or merge or remove them"
            )
        return found


@dataclass
class Examination:
    """What was found in the images that were looked at; sizes, formats and modes are of files, if there are any.

    Attributes:
        num_images: of the whole data set.
        image_shape: (C, H, W) of what the source makes of them.
        num_examined: how many were looked at, the bad ones included.
        bad: why some cannot be read, by name.
        sizes: (width, height) of each file, upright.
        grey, blank: names of images without colour in a source of colour, and of one value all over.
        copies: name and name of an earlier image with the same pixels.
        num_relabelled: copies whose class is another than that of the earlier image.
    """

    num_images: int
    image_shape: tuple[int, int, int]
    max_bad_fraction: float
    num_examined: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    grey: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    num_relabelled: int = 0

    @property
    def num_readable(self) -> int:
        """Of those examined."""
        return self.num_examined - len(self.bad)

    @property
    def num_small(self) -> int:
        """Files that are smaller than what the source makes of them, so that they are enlarged."""
        return sum(min(size) < max(self.image_shape[1:]) for size in self.sizes)

    def spans(self) -> dict[str, tuple[int, float, int]]:
        """Smallest, median and largest width and height of the files."""
        if not self.sizes:
            return {}
        sides = np.array(self.sizes).T
        return {
            name: (int(side.min()), float(np.median(side)), int(side.max()))
            for name, side in zip(("width", "height"), sides, strict=True)
        }

    def record(self) -> dict[str, Any]:
        """As JSON; of names, the first few."""
        return {
            "examined": self.num_examined,
            "unreadable": len(self.bad),
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "sizes": {
                name: dict(zip(("min", "median", "max"), span, strict=True)) for name, span in self.spans().items()
            },
            "smaller_than_resolution": self.num_small,
            "grey": {"count": len(self.grey), "first": self.grey[:NAMED]},
            "blank": {"count": len(self.blank), "first": self.blank[:NAMED]},
            "copies": {
                "count": len(self.copies),
                "of_another_class": self.num_relabelled,
                "first": self.copies[:NAMED],
            },
        }

    def problems(self) -> list[str]:
        """What is wrong, and what to do."""
        return [*self._unreadable(), *self._small(), *self._grey(), *self._blank(), *self._copies()]

    def _unreadable(self) -> list[str]:
        if not self.bad:
            return []
        share, allowed = len(self.bad) / self.num_examined, self.max_bad_fraction
        what = f"{_share(len(self.bad), self.num_examined)} cannot be read"
        if share > allowed:
            return [
                f"{what}, more than data.max_bad_fraction={allowed:g} allows: repair or remove those in "
                "bad_files.jsonl, or raise it"
            ]
        return [f"{what} and will be skipped: repair or remove those in bad_files.jsonl"]

    def _small(self) -> list[str]:
        if not self.sizes or self.num_small < NOTABLE * len(self.sizes):
            return []
        _, height, width = self.image_shape
        shorter = sorted(min(size) for size in self.sizes)
        fits = shorter[math.floor(NOTABLE * len(shorter))]
        return [
            f"{_share(self.num_small, len(self.sizes))} are smaller than {height}x{width} and enlarged, which "
            f"blurs them: lower data.resolution (at {fits} hardly any are), or remove them"
        ]

    def _grey(self) -> list[str]:
        count, all_images = len(self.grey), self.num_readable
        if not NOTABLE * all_images <= count <= (1 - NOTABLE) * all_images or not count:
            return []
        return [
            f"{_share(count, all_images)} are grey in a set of colour ({_name(self.grey)}): remove them, unless "
            "the model shall draw such"
        ]

    def _blank(self) -> list[str]:
        if not self.blank:
            return []
        return [
            f"{_share(len(self.blank), self.num_readable)} show one colour all over ({_name(self.blank)}): remove "
            "them, they are often placeholders"
        ]

    def _copies(self) -> list[str]:
        if not self.copies:
            return []
        pairs = [f"{name} = {first}" for name, first in self.copies]
        other = f", {self.num_relabelled:,} of them under another class" if self.num_relabelled else ""
        return [
            f"{_share(len(self.copies), self.num_readable)} copy others, pixel by pixel{other} ({_name(pairs)}): "
            "remove them, models draw by heart what they see often"
        ]


def examine(
    source: ImageSource,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int,
    advance: Callable[[int], object] = lambda images: None,
    warn: Callable[[str], None] = note,
) -> Examination:
    """Look at the images of these indices; `advance(n)` is told of every n that are done."""
    found = Examination(len(source), source.image_shape, source.max_bad_fraction)
    seen: dict[bytes, int] = {}

    def tell(bad: list[BadImage]) -> None:
        found.bad.update({one.name: one.reason for one in bad})
        found.num_examined += len(bad)
        if bad:
            advance(len(bad))

    for batch in read_images(source, in_batches(indices, batch_size), num_workers, tell, warn):
        for index, image in zip(batch.indices, batch.images, strict=True):
            _look(found, source, index, image, seen)
        found.num_examined += len(batch.indices)
        if batch.indices:
            advance(len(batch.indices))
    return found


def _look(found: Examination, source: Any, index: int, image: Tensor, seen: dict[bytes, int]) -> None:
    name = source.name_of(index)
    if hasattr(source, "content"):
        header = read_header(source.content(index))
        found.sizes.append((header.width, header.height))
        found.formats[header.format] += 1
        found.modes[header.mode] += 1
    if bool((image == image[:, :1, :1]).all()):
        found.blank.append(name)
    elif len(image) == 3 and bool((image == image[:1]).all()):
        found.grey.append(name)
    first = seen.setdefault(hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest(), index)
    if first != index:
        found.copies.append((name, source.name_of(first)))
        found.num_relabelled += source.label(first) != source.label(index)


def labels_of(source: ImageSource) -> Int[Tensor, "N"]:
    """The labels of all images, -1 without; no image is read."""
    num_images = len(source)
    if source.num_classes is None:
        return torch.full((num_images,), -1)
    if is_latent_set(source):
        return source.labels(torch.arange(num_images))
    return torch.tensor([source.label(index) for index in range(num_images)])


def choose_by_class(labels: Int[Tensor, "N"], num_rows: int, num_images: int, seed: int) -> dict[int, list[int]]:
    """Images to look at by label: those of at most `num_rows` classes, each in a random order of its own.

    Without labels, all images under -1. There may be more than the `num_images` that are wanted, as a reserve.
    """
    order = torch.randperm(len(labels), generator=make_generator(seed, "inspect pictures"))
    present = labels.unique()
    drawn = torch.randperm(len(present), generator=make_generator(seed, "inspect classes"))
    chosen = present[drawn[: min(num_rows, num_images)]].sort().values.tolist()
    return {label: order[labels[order] == label].tolist() for label in chosen}


def read_some(source: ImageSource, indices: Iterable[int], count: int) -> tuple[list[int], list[Tensor]]:
    """The first `count` of these that can be read: (indices, images)."""
    kept: list[int] = []
    images: list[Tensor] = []
    for index in indices:
        if len(kept) == count:
            break
        with contextlib.suppress(BadImage):
            images.append(source[index][0])
            kept.append(index)
    return kept, images


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} images ({100 * count / total:.1f} %)"


def _name(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
