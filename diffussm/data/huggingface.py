"""Data sets that Hugging Face's `datasets` has saved to disk."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffussm.data.images import Photographs
from diffussm.runtime.errors import BadImage, ConfigError, DataError


class HuggingFace(Photographs):
    """The images of a `Dataset`, or of one split of a `DatasetDict`, that `save_to_disk` has written.

    Args:
        split: which of a DatasetDict's; None for a single Dataset.
        label_column: a column of ClassLabel; None for no labels.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        resolution: int = 256,
        horizontal_flip: bool = True,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(resolution, horizontal_flip, max_bad_fraction)
        self.path, self.split = Path(path).expanduser(), split
        self.image_column, self.label_column = image_column, label_column
        features, datasets = self._dataset.features, _import_datasets()
        self._need_column("image_column", image_column, datasets.Image, f"has {', '.join(features)}")
        self._class_names: list[str] = []
        if label_column is not None:
            remedy = f"class_encode_column({label_column!r}) of datasets makes one, null means no labels"
            self._need_column("label_column", label_column, datasets.ClassLabel, remedy)
            self._class_names = features[label_column].names
        if not len(self):
            raise DataError(f"data.path={path}: holds no images")
        self._labels = self._read_labels()

    @property
    def class_names(self) -> list[str]:
        """Those of the label column."""
        return self._class_names

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The labels, and how long every encoded image is."""
        import pyarrow.compute

        column = self._column(self.image_column)
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes"))
        content = lengths.fill_null(-1).to_numpy().astype("<i8").tobytes() + self._labels.astype("<i8").tobytes()
        sha256 = hashlib.sha256(content).hexdigest()
        return {"source": "huggingface", "split": self.split, "lengths_sha256": sha256}

    def name_of(self, index: int) -> str:
        """The number of its row."""
        return f"row {range(len(self))[index]}"

    def content(self, index: int) -> bytes | Path:
        """What the row holds, or the file that it names."""
        image = self._encoded[range(len(self))[index]][self.image_column]
        content, path = (image["bytes"], image["path"]) if image else (None, None)
        if content is not None:
            return content
        if path is None:
            raise BadImage(self.name_of(index), "no image in this row")
        return Path(path)

    def label(self, index: int) -> int:
        """The row's."""
        return int(self._labels[index])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_dataset", "_encoded")}

    @cached_property
    def _dataset(self) -> Any:
        datasets = _import_datasets()
        if not self.path.is_dir():
            raise DataError(f"data.path={self.path}: no such directory: give one that save_to_disk has written")
        try:
            found = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data.path={self.path}: not what save_to_disk writes ({reason})") from error
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ConfigError(f"data.split={self.split}: {self.path} has {', '.join(found)}: choose one")
            return found[self.split]
        if self.split is not None:
            raise ConfigError(f"data.split={self.split}: {self.path} has no splits: set it to null")
        return found

    @cached_property
    def _encoded(self) -> Any:
        """The same rows, images as they are stored."""
        only = self._dataset.select_columns([self.image_column])
        return only.cast_column(self.image_column, _import_datasets().Image(decode=False))

    def _column(self, name: str) -> Any:
        """A whole column as it lies in memory-mapped files."""
        return self._dataset.select_columns([name]).with_format("arrow")[:].column(name)

    def _need_column(self, key: str, name: str, kind: type, remedy: str) -> None:
        feature = self._dataset.features.get(name)
        if not isinstance(feature, kind):
            found = "no such column" if feature is None else f"holds {type(feature).__name__}, not {kind.__name__}"
            raise ConfigError(f"data.{key}={name}: {found}: {remedy}")

    def _read_labels(self) -> np.ndarray:
        if self.label_column is None:
            return np.full(len(self), -1)
        labels = self._column(self.label_column).fill_null(-1).to_numpy()
        if missing := int((labels < 0).sum()):
            raise DataError(
                f"data.label_column={self.label_column}: {missing:,} of {len(labels):,} images have no label: "
                "choose another split, or set it to null"
            )
        return labels


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ConfigError("data=huggingface needs datasets: pip install 'diffussm[huggingface]'") from None
    return datasets
