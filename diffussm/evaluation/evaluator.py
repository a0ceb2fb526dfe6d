"""An evaluation: extract features of images, compare them with a reference, record everything that matters."""

import math
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffussm.evaluation.comparison import Comparison
from diffussm.evaluation.features import FeatureExtractor
from diffussm.evaluation.generate import Generated
from diffussm.evaluation.reference import Reference
from diffussm.evaluation.streams import ImageStream
from diffussm.runtime.distributed import Undertaking
from diffussm.runtime.errors import StorageError
from diffussm.runtime.run_dir import write_atomically
from diffussm.runtime.work_list import WorkList

PIXELS = "uint8, clamp(127.5 x + 128, 0, 255) truncated"


class Evaluation:
    """The metrics of generated images, by the features of one network, against one reference.

    FID, sFID and IS after ADM, precision and recall, KID, density and coverage: those that the extractor and the
    reference allow.

    Args:
        extractor: the network behind the metrics.
        reference: npz file of the reference.
        num_samples: how many images are compared.
        every_images: evaluate during training at this interval; None: by `diffussm evaluate` only.
        k: neighbours of precision and recall.
        class_agreement: also report the share of samples that the extractor's classifier recognises as the
            class that was asked for; for extractors trained on the same classes.
        intervals: also give each metric's 95% confidence interval (intervals.py). FID's and sFID's take another
            eigendecomposition each, recall's another pass over its distances.
        extrapolate: also give FID_inf, which does not depend on num_samples; takes six more FIDs.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: str | Path,
        num_samples: int = 50_000,
        every_images: int | None = None,
        k: int = 3,
        class_agreement: bool = False,
        intervals: bool = False,
        extrapolate: bool = False,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: must be at least 2")
        self.extractor, self.reference = extractor, Reference(Path(reference))
        self.comparison = Comparison(extractor, self.reference, k, class_agreement, intervals, extrapolate)
        self.comparison.refuse_few(num_samples)
        self.num_samples, self.every_images, self.class_agreement = num_samples, every_images, class_agreement

    def run(
        self,
        stream: ImageStream,
        work: WorkList,
        undertaking: Undertaking,
        device: torch.device,
        advance: Callable[[int], object] = lambda done: None,
        wanted: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Metrics of a stream, the `wanted` or all, in the first process; nothing in the others.

        All processes extract features, each of the ranges that it gets, and the first compares. Ranges are counted
        in by their order: their results depend neither on batches nor on who has finished what, and when.

        Args:
            work: where the features of each range wait, of all images of the stream; open.
            advance: called in the first process with the number of images done since the work was taken up.
        """
        assert work.count == len(stream)
        started = time.perf_counter()

        def finish(number: int, tell: Callable[[int], object]) -> None:
            batches = _telling(stream.batches(work.indices(number)), tell)
            features = self.comparison.extract(batches, device, wanted)
            write_atomically(work.file(number), safetensors.torch.save(features))

        count = work.work_off(finish, undertaking, advance)
        if not undertaking.processes.is_first:
            return {}
        observed = self.comparison.observe_extracted(_read(work), device, wanted)
        assert observed.count == len(stream)
        metrics = self.comparison.compare(observed, device, wanted)
        speed = {"images_per_second": count / (time.perf_counter() - started)} if count else {}
        return {**metrics, "num_samples": len(stream), **speed}

    def real_against_real(
        self, device: torch.device, wanted: Collection[str] | None = None
    ) -> dict[str, Any] | None:
        """The same metrics of the reference's held-out images, None if it has none."""
        images = self.reference.held_out
        if images is None:
            return None
        batch = Generated(range(len(images)), images, self.reference.held_out_labels)
        return {**self._measure([batch], device, wanted), "num_samples": len(images)}

    def record(self) -> dict[str, Any]:
        """What, besides the samples, decides the numbers."""
        extractor = self.extractor
        return {
            "extractor": {
                "name": extractor.name or "inception", "sha256": extractor.sha256, **extractor.settings
            },
            "reference": {
                "file": self.reference.path.name,
                "sha256": self.reference.sha256,
                "preprocessing": self.reference.preprocessing,
            },
            "pixels": PIXELS,
            "k": self.comparison.k,
            "versions": {
                "diffussm": version("diffussm"),
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }  # fmt: skip

    def _measure(
        self, batches: Iterable[Generated], device: torch.device, wanted: Collection[str] | None = None
    ) -> dict[str, Any]:
        observed = self.comparison.observe(batches, device, wanted)
        return self.comparison.compare(observed, device, wanted)


def _telling(batches: Iterable[Generated], tell: Callable[[int], object]) -> Iterator[Generated]:
    for batch in batches:
        yield batch
        tell(len(batch.indices))


def _read(work: WorkList) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """The extracted features of all ranges, in their order."""
    for number in range(len(work)):
        try:
            features = safetensors.torch.load_file(work.file(number))
            assert len(features["pool"]) == len(work.indices(number))
        except (safetensors.SafetensorError, KeyError, AssertionError) as error:
            raise StorageError(f"{work.file(number)}: damaged ({error}): delete it and run it again") from error
        yield work.indices(number), features


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by row as aligned text; a dash where a row has no such number."""
    skipped = ("num_samples", "intervals")
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key not in skipped))
    cells = [["", "images", *columns]]
    for name, row in rows.items():
        intervals = row.get("intervals", {})
        numbers = [_cell(row.get(column), intervals.get(column)) for column in columns]
        cells.append([name, f"{row['num_samples']:,}", *numbers])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    digits = 3 if abs(value) < 10 else 1
    if 0 < abs(value) < 0.01:
        digits = 5  # KID
    spread = f" ±{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return f"{value:.{digits}f}{spread}"
