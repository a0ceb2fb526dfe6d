"""What the metrics need to know of a stream of images: gathered by batches, merged across processes, by index."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from diffussm.evaluation.features import Features
from diffussm.evaluation.statistics import FeatureStatistics


class Observed:
    """Sums of features, and the features themselves where they are kept, of the images of some indices.

    Sums are in float64 on the device of the features, features in the main memory as they are. The result is the
    same for any batches, and for any division among processes: each sends its `state`, and they are merged. 50,000
    images take 410 MB of Inception's pool features, 405 MB of spatial ones, 202 MB of logits.

    Args:
        sums: of which features to take statistics: pool, spatial.
        kept: which features to keep: pool, spatial, logits.
        num_parts: into how many parts the sums are divided, by index modulo num_parts.
    """

    def __init__(self, sums: Collection[str], kept: Collection[str], num_parts: int = 1) -> None:
        self.sums, self.kept, self.num_parts = tuple(sorted(sums)), tuple(sorted(kept)), num_parts
        self._statistics: dict[str, list[FeatureStatistics]] = {}
        self._rows: dict[str, list[Tensor]] = {name: [] for name in ("index", "agrees", *self.kept)}

    def update(self, indices: Sequence[int], features: Features, labels: Tensor | None = None) -> None:
        """Count a batch in: features of the images of these indices, whose classes were to be `labels`."""
        index = torch.as_tensor(list(indices))
        for name in self.sums:
            values = getattr(features, name)
            parts = self._statistics.setdefault(
                name, [FeatureStatistics(values.shape[1], values.device) for _ in range(self.num_parts)]
            )
            for number, part in enumerate(parts):
                if len(chosen := values[(index % self.num_parts == number).to(values.device)]):
                    part.update(chosen)
        self._rows["index"].append(index)
        for name in self.kept:
            self._rows[name].append(getattr(features, name).cpu())
        if labels is not None and features.logits is not None:
            self._rows["agrees"].append(features.logits.argmax(dim=1).cpu() == labels.cpu())

    def merge(self, other: "Observed") -> None:
        """Count in what another stream of the same kind has seen, of other images."""
        kinds = {(one.sums, one.kept, one.num_parts) for one in (self, other)}
        assert len(kinds) == 1, "streams of different kinds"
        for name, parts in other._statistics.items():
            if name not in self._statistics:
                self._statistics[name] = [FeatureStatistics.from_state(part.state()) for part in parts]
                continue
            for mine, theirs in zip(self._statistics[name], parts, strict=True):
                mine.merge(theirs)
        for name, chunks in other._rows.items():
            self._rows[name].extend(chunks)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name that another process, or a later one, can rebuild this from."""
        state = {f"rows.{name}": torch.cat(chunks) for name, chunks in self._rows.items() if chunks}
        for name, parts in self._statistics.items():
            for number, part in enumerate(parts):
                state |= {f"sums.{name}.{number}.{key}": value for key, value in part.state().items()}
        return state

    @classmethod
    def from_state(
        cls, sums: Collection[str], kept: Collection[str], state: Mapping[str, Tensor], num_parts: int = 1
    ) -> "Observed":
        """The inverse of `state`, given what the stream was told to gather."""
        observed = cls(sums, kept, num_parts)
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "rows":
                observed._rows[rest].append(value)
        for name in observed.sums:
            prefixes = [f"sums.{name}.{number}." for number in range(num_parts)]
            if f"{prefixes[0]}count" in state:
                observed._statistics[name] = [
                    FeatureStatistics.from_state({key: state[prefix + key] for key in ("count", "sum", "outer")})
                    for prefix in prefixes
                ]
        return observed

    @property
    def count(self) -> int:
        """How many images were seen; ValueError if one was seen twice."""
        index, times = self._indices().unique(return_counts=True)
        if len(twice := index[times > 1]):
            raise ValueError(f"image {int(twice[0])} was observed more than once: count every image in once")
        return len(index)

    def statistics(self, name: str) -> FeatureStatistics:
        """Of all images."""
        return FeatureStatistics.total(self._statistics[name])

    def parts(self, name: str) -> list[FeatureStatistics]:
        """Of each part of the images."""
        return list(self._statistics[name])

    def rows(self, name: str) -> Tensor:
        """The kept features of all images, in the order of their indices."""
        return torch.cat(self._rows[name])[self._indices().argsort()]

    @property
    def agreement(self) -> float | None:
        """The share of images that the network takes for what they were to be; None without labels."""
        agrees = self._rows["agrees"]
        return float(torch.cat(agrees).double().mean()) if agrees else None

    def _indices(self) -> Tensor:
        return torch.cat(self._rows["index"]) if self._rows["index"] else torch.empty(0, dtype=torch.long)
