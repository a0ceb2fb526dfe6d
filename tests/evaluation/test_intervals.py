"""Intervals are as wide as metrics really vary from one set of samples to the next."""

import numpy as np
import pytest
import torch

from diffussm.evaluation import intervals
from diffussm.evaluation.intervals import NUM_GROUPS, by_influence, by_jackknife, of_inception_score, of_share
from diffussm.evaluation.metrics import FrechetDistance, extrapolated_distance, inception_score, kernel_distance
from diffussm.evaluation.neighbours import (
    coverage_without_groups,
    density_coverage,
    precision_recall,
    recall_without_groups,
    sample_densities,
)
from diffussm.evaluation.statistics import FeatureStatistics

DIM, NUM_SAMPLES, REPEATS = 6, 400, 60


def draw(seed, count=NUM_SAMPLES):
    """Samples of a model that is a little off, heavier of tail than a Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return 0.8 * x * (1 + 0.3 * x[:, :1].abs()) + 0.3


def statistics_of(x):
    statistics = FeatureStatistics(x.shape[1])
    statistics.update(x)
    return statistics


REFERENCE = torch.randn(300, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
DISTANCE = FrechetDistance(np.zeros(DIM), np.eye(DIM))


def fid(x):
    moments = statistics_of(x)
    value = DISTANCE(moments.mean, moments.covariance)
    return value, by_influence(value, DISTANCE.influence(moments.mean, moments.covariance, x), least=0.0)


def score(x):
    value = inception_score(2 * x, split_size=200)
    return value, of_inception_score(value, 2 * x, split_size=200)


def kid(x):
    value, influence = kernel_distance(REFERENCE, x)
    return value, by_influence(value, influence)


def precision(x):
    value = precision_recall(REFERENCE, x)[0]
    return value, of_share(value, len(x))


def recall(x):
    value = precision_recall(REFERENCE, x)[1]
    return value, by_jackknife(value, recall_without_groups(REFERENCE, x, NUM_GROUPS))


def density(x):
    densities = sample_densities(REFERENCE, x)
    return float(densities.mean()), by_influence(float(densities.mean()), densities)


def coverage(x):
    value = density_coverage(REFERENCE, x)[1]
    return value, by_jackknife(value, coverage_without_groups(REFERENCE, x, NUM_GROUPS))


@pytest.mark.parametrize("metric", [fid, score, kid, precision, recall, density, coverage])
def test_the_interval_is_as_wide_as_the_metric_varies(metric):
    measured = [metric(draw(seed)) for seed in range(REPEATS)]
    values = np.array([value for value, _ in measured])
    assert all(low <= value <= high for value, (low, high) in measured)
    quantile = intervals.STUDENT if metric in (recall, coverage) else intervals.NORMAL
    errors = np.array([(high - low) / 2 / quantile for _, (low, high) in measured])
    ratio = np.sqrt((errors**2).mean()) / values.std(ddof=1)  # of 60 draws: known to about 10%
    assert 0.75 < ratio < (1.8 if metric is recall else 1.35)
    middle = values.mean()  # of what these samples estimate, their bias included
    inside = [low <= middle <= high for _, (low, high) in measured]
    assert np.mean(inside) >= 0.85


def test_influence_is_what_leaving_a_sample_out_does():
    x = draw(0, 4000)
    moments = statistics_of(x)
    influence = DISTANCE.influence(moments.mean, moments.covariance, x, chunk_size=333)
    whole = DISTANCE(moments.mean, moments.covariance)
    for index in (0, 17, int(influence.argmax())):
        rest = statistics_of(torch.cat([x[:index], x[index + 1 :]]))
        moved = whole - DISTANCE(rest.mean, rest.covariance)
        assert moved == pytest.approx(float(influence[index]) / (len(x) - 1), rel=0.1, abs=1e-5)
    assert float(influence.sum()) == pytest.approx(0, abs=1e-9)


def test_influence_survives_fewer_samples_than_dimensions():
    x = draw(0, 4)
    moments = statistics_of(x)
    assert DISTANCE.influence(moments.mean, moments.covariance, x).isfinite().all()


def test_the_extrapolated_distance_has_lost_its_bias():
    """The closed form: samples of a Gaussian with covariance 0.8^2 and mean 0.3 in 32 dimensions."""
    dim, count = 32, 1600
    true = dim * (0.3**2 + (1 - 0.8) ** 2)
    distance = FrechetDistance(np.zeros(dim), np.eye(dim))
    generator = torch.Generator().manual_seed(0)
    plain, extrapolated = [], []
    for _ in range(20):
        x = 0.8 * torch.randn(count, dim, generator=generator, dtype=torch.float64) + 0.3
        whole = statistics_of(x)
        plain.append(distance(whole.mean, whole.covariance))
        extrapolated.append(extrapolated_distance(distance, [statistics_of(x[n::4]) for n in range(4)]))
    bias, rest = np.mean(plain) - true, np.mean(extrapolated) - true
    assert bias > 0.15 and abs(rest) < bias / 4
    with pytest.raises(ValueError, match="parts=3: needs a power of two"):
        extrapolated_distance(distance, [whole] * 3)


def test_a_share_of_none_or_all_has_an_interval_too():
    assert of_share(0.0, 100) == pytest.approx((0, 0.037), abs=1e-3)
    assert of_share(1.0, 100) == pytest.approx((0.963, 1), abs=1e-3)
    assert of_share(0.5, 10_000) == pytest.approx((0.4902, 0.5098), abs=1e-4)
