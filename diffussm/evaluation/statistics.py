"""Feature statistics as exact streams: float64 sums that merge by addition."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of feature vectors, from running sums of them and of their outer products.

    Independent, up to float64 rounding, of batch size and of the order of `update` and `merge`.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Float[Tensor, "B dim"]) -> None:
        """Count a batch in."""
        x = features.double()
        self.count += len(x)
        self.sum += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def merge(self, other: "FeatureStatistics") -> None:
        """Count in what another stream has seen."""
        self.count += other.count
        self.sum += other.sum.to(self.sum.device)
        self.outer += other.outer.to(self.outer.device)

    @classmethod
    def total(cls, parts: Iterable["FeatureStatistics"]) -> "FeatureStatistics":
        """What all of these streams, of one dimension, have seen together."""
        first, *rest = parts
        whole = cls.from_state(first.state())
        for part in rest:
            whole.merge(part)
        return whole

    def state(self) -> dict[str, Tensor]:
        """Tensors that another process can rebuild these statistics from."""
        return {"count": torch.tensor(self.count), "sum": self.sum.clone(), "outer": self.outer.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "FeatureStatistics":
        """The inverse of `state`."""
        statistics = cls(len(state["sum"]), state["sum"].device)
        statistics.count = int(state["count"])
        statistics.sum += state["sum"]
        statistics.outer += state["outer"]
        return statistics

    @property
    def mean(self) -> Float[Tensor, "dim"]:
        """The sample mean."""
        return self.sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """The unbiased sample covariance (over count - 1, as numpy.cov)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, these statistics have {self.count}")
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
