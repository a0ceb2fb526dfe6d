"""An evaluation: generate, extract, accumulate, compare with a reference, record everything that matters."""

import math
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffussm.evaluation.features import FeatureExtractor
from diffussm.evaluation.generate import Generated, Generator
from diffussm.evaluation.metrics import frechet_distance, inception_score, precision_recall
from diffussm.evaluation.reference import Reference
from diffussm.evaluation.statistics import FeatureStatistics

PIXELS = "uint8, clamp(127.5 x + 128, 0, 255) truncated"


class Evaluation:
    """FID, sFID, IS, precision, recall (and class agreement) of generated images against a reference.

    Args:
        extractor: the network behind the metrics.
        reference: npz file of the reference.
        num_samples: how many images are generated.
        every_images: evaluate during training at this interval; None: by `diffussm evaluate` only.
        k: neighbours of precision and recall.
        class_agreement: also report the share of samples that the extractor's classifier recognises as the
            class that was asked for; for extractors trained on the same classes.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: str | Path,
        num_samples: int = 50_000,
        every_images: int | None = None,
        k: int = 3,
        class_agreement: bool = False,
    ) -> None:
        self.extractor, self.reference = extractor, Reference(Path(reference))
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: must be at least 2")
        held_out = self.reference.held_out
        fewest = min(num_samples, len(self.reference.images), *([] if held_out is None else [len(held_out)]))
        if not 1 <= k < fewest:
            raise ValueError(
                f"k={k}: must be at least 1 and below {fewest}, the smallest number of images compared"
            )
        self.num_samples, self.every_images = num_samples, every_images
        self.k, self.class_agreement = k, class_agreement

    def run(
        self,
        generator: Generator,
        advance: Any = lambda images: None,
        wanted: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Metrics of `num_samples` images: the `wanted` or all; `advance(n)` is told of every n that are done."""
        started = time.perf_counter()
        metrics = self._measure(self._generated(generator, advance), generator.device, wanted)
        seconds = time.perf_counter() - started
        return {**metrics, "num_samples": self.num_samples, "images_per_second": self.num_samples / seconds}

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
        return {
            "extractor": {"name": self.extractor.name or "inception", "sha256": self.extractor.sha256},
            "reference": {
                "file": self.reference.path.name,
                "sha256": self.reference.sha256,
                "preprocessing": self.reference.preprocessing,
            },
            "pixels": PIXELS,
            "k": self.k,
            "versions": {
                "diffussm": version("diffussm"),
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def _generated(self, generator: Generator, advance: Any) -> Iterable[Generated]:
        for batch in generator.generate(range(self.num_samples)):
            yield batch
            advance(len(batch.indices))

    @torch.no_grad()
    def _measure(
        self, batches: Iterable[Generated], device: torch.device, wanted: Collection[str] | None = None
    ) -> dict[str, Any]:
        extractor = self.extractor.to(device)
        pool_statistics = FeatureStatistics(len(self.reference.pool[0]))
        spatial_statistics = FeatureStatistics(len(self.reference.spatial[0]))
        pools, logits = [], []
        agreed = labelled = 0
        for batch in batches:
            features = extractor(batch.images.to(device))
            pool_statistics.update(features.pool.cpu())
            spatial_statistics.update(features.spatial.cpu())
            pools.append(features.pool.cpu())
            logits.append(features.logits.cpu())
            if batch.labels is not None:
                agreed += int((features.logits.argmax(dim=1).cpu() == batch.labels).sum())
                labelled += len(batch.labels)
        suffix = f"-{extractor.name}" if extractor.name else ""

        def is_wanted(name: str) -> bool:
            return wanted is None or name.lower() in wanted

        metrics: dict[str, Any] = {}
        for name, statistics, reference in (
            ("FID", pool_statistics, self.reference.pool),
            ("sFID", spatial_statistics, self.reference.spatial),
        ):
            if is_wanted(name):
                metrics[name + suffix] = frechet_distance(statistics.mean, statistics.covariance, *reference)
        if is_wanted("IS"):
            metrics["IS"] = inception_score(torch.cat(logits))
        if is_wanted("precision") or is_wanted("recall"):
            chunks = [extractor(chunk.to(device)).pool.cpu() for chunk in self.reference.images.split(512)]
            both = precision_recall(torch.cat(chunks), torch.cat(pools), self.k)
            found = zip(("precision", "recall"), both, strict=True)
            metrics |= {name: value for name, value in found if is_wanted(name)}
        if self.class_agreement and is_wanted("class_agreement"):
            metrics["class_agreement"] = agreed / labelled if labelled else None
        return metrics


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by row as aligned text; a dash where a row has no such number."""
    skipped = ("num_samples",)
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key not in skipped))
    cells = [["", "images", *columns]]
    for name, row in rows.items():
        numbers = [_cell(row.get(column)) for column in columns]
        cells.append([name, f"{row['num_samples']:,}", *numbers])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
