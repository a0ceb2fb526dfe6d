"""ImageNet-1k (ILSVRC 2012) in class folders, found to be complete."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from diffussm.data.images import ImageFolder
from diffussm.runtime.errors import DataError

CLASSES = tuple(Path(__file__).with_name("imagenet_classes.txt").read_text().split())  # sorted, as labels count
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
NAMES_SHOWN = 5


class ImageNet(ImageFolder):
    """A split of ImageNet-1k: a folder for each WordNet id, directly below `path` or below path/`split`.

    Args:
        split: train or val; val too has to be sorted into class folders.
        check: refuse data whose classes are not the 1,000, or that has another number of images.
    """

    def __init__(
        self,
        path: str | Path,
        split: Literal["train", "val"] = "train",
        resolution: int = 256,
        horizontal_flip: bool = True,
        max_bad_fraction: float = 0.01,
        check: bool = True,
    ) -> None:
        if split not in NUM_IMAGES:
            raise ValueError(f"split={split!r}: choose train or val")
        below = Path(path).expanduser() / split
        super().__init__(below if below.is_dir() else path, resolution, horizontal_flip, max_bad_fraction)
        self.split = split
        if check:
            _check(self.root, split, self.class_names, len(self))

    @property
    def identity(self) -> Mapping[str, Any]:
        """The files by name."""
        return {**super().identity, "source": "imagenet", "split": self.split}


def _check(root: Path, split: str, names: Collection[str], num_images: int) -> None:
    missing = [name for name in CLASSES if name not in set(names)]
    foreign = [name for name in names if name not in CLASSES]
    expected = NUM_IMAGES[split]
    if not missing and not foreign and num_images == expected:
        return
    here = f"here {len(names):,} and {num_images:,}"
    if missing:
        here += f": missing {_shorten(missing)}"
    if foreign:
        here += f": not of it {_shorten(foreign)}"
    raise DataError(
        f"data.path={root}: ImageNet-1k {split} has {len(CLASSES):,} classes and {expected:,} images, {here}; "
        "set data.check=false to use it as it is"
    )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return " ".join(names[:NAMES_SHOWN]) + more
