"""From features to metrics: which there are, what they need, and how samples compare with a reference."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm.evaluation.features import FeatureExtractor, Features
from diffussm.evaluation.generate import Generated
from diffussm.evaluation.intervals import (
    FEWEST_SAMPLES,
    NUM_GROUPS,
    Interval,
    by_influence,
    by_jackknife,
    of_inception_score,
    of_share,
)
from diffussm.evaluation.metrics import (
    FrechetDistance,
    extrapolated_distance,
    inception_score,
    kernel_distance,
)
from diffussm.evaluation.neighbours import (
    coverage_without_groups,
    density_coverage,
    precision_recall,
    recall_without_groups,
    sample_densities,
)
from diffussm.evaluation.network import FrozenNetwork
from diffussm.evaluation.observed import Observed
from diffussm.evaluation.reference import Reference
from diffussm.evaluation.statistics import FeatureStatistics

FRECHET = {"fid": "pool", "sfid": "spatial"}
NEIGHBOURLY = ("precision", "recall", "kid", "density", "coverage")  # which need the reference's images
DENSITY_K = 5
NUM_PARTS = 4  # a power of two: the sets whose distances are extrapolated
REFERENCE_BATCH = 64
PROBE = 16  # images that show how far other arithmetic deviates


class Comparison:
    """Metrics of images by the features of one network against one reference, in two halves.

    `observe` goes through images, and may be shared among processes, whose results merge; `compare` does the rest.
    The arguments are those of Evaluation.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Reference,
        k: int,
        class_agreement: bool,
        intervals: bool,
        extrapolate: bool,
    ) -> None:
        reference.refuse_extractor(extractor)
        self.extractor, self.reference, self.k = extractor, reference, k
        self.class_agreement, self.intervals, self.extrapolate = class_agreement, intervals, extrapolate
        self._known: dict[str, Any] = {}  # what was worked out of the reference

    def refuse_few(self, num_samples: int) -> None:
        """ValueError if so few samples, or so few images of the reference, do not allow what was asked for."""
        stored = (self.reference.images, self.reference.held_out)
        fewest = min([num_samples, *(len(images) for images in stored if images is not None)])
        if not 1 <= self.k < fewest:
            raise ValueError(
                f"k={self.k}: must be at least 1 and below {fewest}, the smallest number of images compared"
            )
        for name, is_wanted, needs in (
            ("intervals", self.intervals, FEWEST_SAMPLES), ("extrapolate", self.extrapolate, 2 * NUM_PARTS)
        ):  # fmt: skip
            if is_wanted and fewest < needs:
                raise ValueError(
                    f"{name}=true: needs at least {needs} images, there are {fewest}: set it to false"
                )

    @property
    def available(self) -> tuple[str, ...]:
        """The metrics that the extractor and the reference allow, as `wanted` has them."""
        gives, reference = self.extractor.dims, self.reference
        return (
            "fid",
            *(["sfid"] if "spatial" in gives and (reference.spatial or not reference.pool) else []),
            *(["is"] if "logits" in gives else []),
            *(NEIGHBOURLY if reference.images is not None else []),
            *(["class_agreement"] if self.class_agreement else []),
        )

    @torch.no_grad()
    def observe(
        self, batches: Iterable[Generated], device: torch.device, wanted: Collection[str] | None = None
    ) -> Observed:
        """What the `wanted` metrics, or all, need of these images."""
        extractor, observed = self.extractor.to(device), self._nothing_yet(wanted)
        for batch in batches:
            observed.update(batch.indices, extractor(batch.images.to(device)), batch.labels)
            if isinstance(extractor, FrozenNetwork) and "deviation" not in self._known:
                self._known["deviation"] = extractor.deviation(batch.images[:PROBE].to(device))
        return observed

    @torch.no_grad()
    def extract(
        self, batches: Iterable[Generated], device: torch.device, wanted: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """What `observe` would look at of these images, as tensors by name that can wait on a disk."""
        extractor, kinds = self.extractor.to(device), self._needed(wanted)
        found: dict[str, list[Tensor]] = {}
        for batch in batches:
            features = extractor(batch.images.to(device))
            for kind in kinds:
                found.setdefault(kind, []).append(getattr(features, kind).cpu())
            if batch.labels is not None:
                found.setdefault("labels", []).append(batch.labels)
            if isinstance(extractor, FrozenNetwork) and extractor.settings and "deviation" not in found:
                found["deviation"] = [torch.tensor([extractor.deviation(batch.images[:PROBE].to(device))])]
        return {name: torch.cat(parts).contiguous() for name, parts in found.items()}

    def observe_extracted(
        self,
        ranges: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]],
        device: torch.device,
        wanted: Collection[str] | None = None,
    ) -> Observed:
        """`observe`, from the indices and the extracted features of each range, in the order that they come in."""
        observed = self._nothing_yet(wanted)
        for indices, found in ranges:
            pool, spatial, logits = (
                found[kind].to(device) if kind in found else None for kind in ("pool", "spatial", "logits")
            )
            assert pool is not None
            observed.update(indices, Features(pool, spatial, logits), found.get("labels"))
            if "deviation" in found:
                self._known.setdefault("deviation", float(found["deviation"]))
        return observed

    def _nothing_yet(self, wanted: Collection[str] | None) -> Observed:
        chosen = self._chosen(wanted)
        sums = {kind for name, kind in FRECHET.items() if name in chosen}
        kept = set(sums) if self.intervals else set()
        kept |= {"pool"} if chosen & set(NEIGHBOURLY) else set()
        kept |= {"logits"} if "is" in chosen else set()
        return Observed(sums, kept, NUM_PARTS if self.extrapolate else 1)

    def _needed(self, wanted: Collection[str] | None) -> set[str]:
        """The features that the metrics are made of; pool always."""
        observed, chosen = self._nothing_yet(wanted), self._chosen(wanted)
        agreeing = {"logits"} if "class_agreement" in chosen and "logits" in self.extractor.dims else set()
        return {"pool", *observed.sums, *observed.kept, *agreeing}

    @torch.no_grad()
    def compare(
        self, observed: Observed, device: torch.device, wanted: Collection[str] | None = None
    ) -> dict[str, Any]:
        """The `wanted` metrics, or all, of what was observed for them.

        With their 95% intervals under `intervals`, if these were asked for.
        """
        count, chosen = observed.count, self._chosen(wanted)
        metrics: dict[str, Any] = {}
        bounds: dict[str, Interval] = {}
        for name, title in (("fid", "FID"), ("sfid", "sFID")):
            if name in chosen:
                self._compare_moments(self._qualified(title), FRECHET[name], observed, device, metrics, bounds)
        if "is" in chosen:
            logits = observed.rows("logits")
            metrics["IS"] = inception_score(logits)
            bounds["IS"] = of_inception_score(metrics["IS"], logits) if self.intervals else (0.0, 0.0)
        if chosen & set(NEIGHBOURLY):
            self._compare_neighbours(chosen, observed, device, metrics, bounds)
        if "class_agreement" in chosen:
            share = metrics["class_agreement"] = observed.agreement
            if share is not None:
                bounds["class_agreement"] = of_share(share, count)
        if self._known.get("deviation") is not None:
            metrics["feature_deviation"] = self._known["deviation"]
        if self.intervals:
            metrics["intervals"] = {name: list(bounds[name]) for name in metrics if name in bounds}
        return metrics

    def _compare_moments(
        self,
        title: str,
        kind: str,
        observed: Observed,
        device: torch.device,
        metrics: dict[str, Any],
        bounds: dict[str, Interval],
    ) -> None:
        distance, statistics = self._frechet(kind, device), observed.statistics(kind)
        mu, sigma = statistics.mean, statistics.covariance
        value = metrics[title] = distance(mu, sigma)
        if self.intervals:
            bounds[title] = by_influence(value, distance.influence(mu, sigma, observed.rows(kind)), least=0.0)
        if self.extrapolate and kind == "pool":
            metrics[f"{title}_inf"] = extrapolated_distance(distance, observed.parts(kind))

    def _compare_neighbours(
        self,
        chosen: Collection[str],
        observed: Observed,
        device: torch.device,
        metrics: dict[str, Any],
        bounds: dict[str, Interval],
    ) -> None:
        reference, samples = self._reference_rows(device).to(device), observed.rows("pool").to(device)
        if "precision" in chosen or "recall" in chosen:
            precision, recall = precision_recall(reference, samples, self.k)
            if "precision" in chosen:
                metrics["precision"], bounds["precision"] = precision, of_share(precision, len(samples))
            if "recall" in chosen:
                metrics["recall"] = recall
                if self.intervals:
                    bounds["recall"] = by_jackknife(
                        recall, recall_without_groups(reference, samples, NUM_GROUPS, self.k)
                    )
        if "kid" in chosen:
            title = self._qualified("KID")
            metrics[title], influence = kernel_distance(reference, samples)
            bounds[title] = by_influence(metrics[title], influence)
        fits = min(len(reference), len(samples)) > DENSITY_K
        if "density" in chosen and fits:
            densities = sample_densities(reference, samples, DENSITY_K)
            metrics["density"] = float(densities.mean())
            bounds["density"] = by_influence(metrics["density"], densities, least=0.0)
        if "coverage" in chosen and fits:
            metrics["coverage"] = density_coverage(reference, samples, DENSITY_K)[1]
            if self.intervals:
                bounds["coverage"] = by_jackknife(
                    metrics["coverage"], coverage_without_groups(reference, samples, NUM_GROUPS, DENSITY_K)
                )

    def _frechet(self, kind: str, device: torch.device) -> FrechetDistance:
        """To the reference; from its images if it comes without statistics."""
        if kind not in self._known:
            moments = self.reference.pool if kind == "pool" else self.reference.spatial
            if moments is None:
                rows = self._reference_rows(device, kind)
                statistics = FeatureStatistics(rows.shape[1])
                statistics.update(rows)
                moments = statistics.mean.numpy(), statistics.covariance.numpy()
            self._known[kind] = FrechetDistance(*moments, device)
        return self._known[kind]

    def _reference_rows(self, device: torch.device, kind: str = "pool") -> Tensor:
        """Features of the reference's images, worked out once."""
        key = f"rows of {kind}"
        if key not in self._known:
            assert self.reference.images is not None
            extractor = self.extractor.to(device)
            chunks = self.reference.images.split(REFERENCE_BATCH)
            self._known[key] = torch.cat([getattr(extractor(c.to(device)), kind).cpu() for c in chunks])
        return self._known[key]

    def _chosen(self, wanted: Collection[str] | None) -> set[str]:
        return {name for name in self.available if wanted is None or name in wanted}

    def _qualified(self, title: str) -> str:
        return f"{title}-{self.extractor.name}" if self.extractor.name else title
