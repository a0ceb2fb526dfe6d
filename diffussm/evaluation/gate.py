"""Are the metrics good enough? A verdict for each limit, which is absolute or relative to a baseline's spread."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a metric is held to.

    Attributes:
        side: "max" if more is worse, "min" if less is.
        limit: what it may not pass; None: no absolute limit.
        tolerance: how much worse than a baseline's mean it may be, whatever the baseline's deviations allow.
    """

    side: str
    limit: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Spread:
    """A metric over several results."""

    mean: float
    std: float | None  # of a sample; None of a single result
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3g}"
        return f"{self.mean:.4g}{spread} of {self.count}"


@dataclass(frozen=True)
class Verdict:
    """One limit of one metric, held or not."""

    metric: str
    value: float | None  # None: it was not measured
    side: str
    limit: float
    because: str  # where the limit comes from

    @property
    def passed(self) -> bool:
        """Whether it was measured, is a number, and is not beyond the limit."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.side == "max" else self.value >= self.limit

    @property
    def bound(self) -> str:
        """The limit as text."""
        return f"at {'most' if self.side == 'max' else 'least'} {self.limit:.4g}"

    @property
    def found(self) -> str:
        """The value as text."""
        return "not measured" if self.value is None else f"{self.value:.4g}"

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.metric} {self.found}: {self.bound} ({self.because})"


def judge(
    metrics: Mapping[str, Any],
    rules: Mapping[str, Rule],
    baseline: Mapping[str, Spread] | None = None,
    deviations: float = 6.0,
) -> list[Verdict]:
    """A verdict for every absolute limit, then one for every metric of the baseline.

    A metric may be worse than the baseline's mean by `deviations` of its standard deviations, or by its tolerance
    if that is more. Deviations of few results are rough estimates: a sixth result like five others is 3 of them
    worse one time in 38, and 6 one time in 370, if all are normal (Student's t with 4 degrees of freedom at
    6 / sqrt(1 + 1/5)). A tolerance keeps results that happen to be alike from being a narrow gate.

    Args:
        metrics: values by title, such as FID-digits; what has no rule is left alone.
        rules: by the names of metrics (`name_of` their titles).
    """
    by_name = {name_of(title): title for title in metrics}
    verdicts = []
    for name, rule in rules.items():
        if rule.limit is not None:
            title = by_name.get(name, name)
            because = f"gate.{name}_{rule.side}"
            verdicts.append(Verdict(title, metrics.get(title), rule.side, rule.limit, because))
    for title, spread in (baseline or {}).items():
        rule = rules[name_of(title)]
        by_spread, by_rule = deviations * (spread.std or 0.0), rule.tolerance or 0.0
        allowed = max(by_spread, by_rule)
        because = f"tolerance {by_rule:g}" if by_rule > by_spread else f"{deviations:g} deviations"
        limit = spread.mean + (allowed if rule.side == "max" else -allowed)
        verdicts.append(Verdict(title, metrics.get(title), rule.side, limit, f"baseline {spread}, {because}"))
    return verdicts


def name_of(title: str) -> str:
    """What a metric is called in settings: fid of FID-digits, fid_inf of FID-digits_inf, inversion of its rmse."""
    end = "_inf" if title.endswith("_inf") else ""
    return title.removesuffix("_inf").removesuffix("_rmse").partition("-")[0].lower() + end
