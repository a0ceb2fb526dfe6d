"""Metrics against independent float64 definitions, and statistics that are exact streams."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffussm.evaluation import frechet_distance
from diffussm.evaluation.metrics import FrechetDistance, inception_score
from diffussm.evaluation.neighbours import precision_recall
from diffussm.evaluation.statistics import FeatureStatistics


def gaussian(dim, seed, rank=None):
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(dim, rank or 2 * dim))
    return generator.normal(size=dim), factor @ factor.T / factor.shape[1]


@pytest.mark.parametrize("dim", [1, 3, 64])
def test_frechet_distance_equals_the_matrix_square_root(dim):
    (mu1, sigma1), (mu2, sigma2) = gaussian(dim, 0), gaussian(dim, 1)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 2.0])
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(3), np.diag(a), mean, np.diag(b)) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_survives_singular_covariances():
    (mu1, sigma1), (mu2, sigma2) = gaussian(20, 0, rank=3), gaussian(20, 1, rank=2)
    assert np.isfinite(frechet_distance(mu1, sigma1, mu2, sigma2))
    assert frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-6)


def test_rounding_in_directions_without_samples_makes_no_distance():
    """Features that are never active, and fewer samples than dimensions: any order of adding gives the same."""
    generator = torch.Generator().manual_seed(0)
    reference, samples = (20 * torch.randn(60, 112, generator=generator).relu() + 30 for _ in range(2))
    reference[:, 100:] = samples[:, 90:] = 0
    found = []
    for batch_size in (1, 7, 60):
        moments = []
        for features in (samples, reference):
            statistics = FeatureStatistics(112)
            for batch in features.split(batch_size):
                statistics.update(batch)
            moments += [statistics.mean, statistics.covariance]
        found.append(frechet_distance(*moments))
    assert max(found) - min(found) < 1e-6 and found[0] > 1000


def test_variances_a_millionth_of_the_greatest_are_no_rounding():
    """Of two Gaussians with common axes the distance has a closed form, and of one with itself it is 0."""
    dim = 200
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    a, b = np.geomspace(1e-7, 10, dim), np.geomspace(1e-7, 10, dim) * np.linspace(0.5, 2, dim)
    sigma_a, sigma_b = ((axes * x) @ axes.T for x in (a, b))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    mean = np.zeros(dim)
    assert frechet_distance(mean, sigma_a, mean, sigma_b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(mean, sigma_a, mean, sigma_a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_images_that_do_not_differ():
    mu, sigma = gaussian(20, 0)
    none, expected = np.zeros((20, 20)), np.trace(sigma)
    assert frechet_distance(mu, none, mu, sigma) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(mu, sigma, mu, -1e-20 * np.eye(20)) == pytest.approx(expected, rel=1e-12)
    assert FrechetDistance(mu, none).influence(mu, sigma, torch.randn(4, 20)).isfinite().all()


def test_frechet_distance_refuses_other_features():
    with pytest.raises(ValueError, match="different size: 3 and 4"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_frechet_distance_takes_tensors_and_arrays_alike():
    (mu1, sigma1), (mu2, sigma2) = gaussian(5, 0), gaussian(5, 1)
    tensors = [torch.from_numpy(x) for x in (mu1, sigma1)]
    assert frechet_distance(*tensors, mu2, sigma2) == frechet_distance(mu1, sigma1, mu2, sigma2)


def test_statistics_are_numpys_for_any_batching():
    x = torch.randn(1003, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for batch_size in (1, 64, 1003):
        statistics = FeatureStatistics(7)
        for batch in x.split(batch_size):
            statistics.update(batch)
        assert statistics.count == 1003
        assert np.allclose(statistics.mean, x.double().mean(0), rtol=1e-12)
        assert np.allclose(statistics.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-8)


def test_statistics_merge_by_addition():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    whole, part, rest = FeatureStatistics(4), FeatureStatistics(4), FeatureStatistics(4)
    whole.update(x)
    part.update(x[:11])
    rest.update(x[11:])
    part.merge(rest)
    assert part.count == 30
    assert torch.allclose(part.covariance, whole.covariance, rtol=1e-12)


def test_statistics_of_one_sample_have_no_covariance():
    statistics = FeatureStatistics(2)
    statistics.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 samples"):
        statistics.covariance  # noqa: B018


def test_inception_score_is_its_definition():
    logits = torch.randn(700, 10, generator=torch.Generator().manual_seed(0)) * 2
    p = torch.softmax(logits.double(), 1).numpy()
    chunks = [p[:300], p[300:600], p[600:]]
    expected = np.mean([np.exp((c * (np.log(c) - np.log(c.mean(0)))).sum(1).mean()) for c in chunks])
    assert inception_score(logits, split_size=300) == pytest.approx(expected, rel=1e-9)


def test_inception_score_extremes():
    sure = 1000 * torch.eye(10).repeat(20, 1)
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    assert inception_score(sure[:1]) == pytest.approx(1)


def brute_force(reference, samples, k):
    def distance(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    def radii(points):
        return [
            sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def share(points, centers):
        r = radii(centers)
        return np.mean([any(distance(p, c) <= r[i] for i, c in enumerate(centers)) for p in points])

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("chunk_size", [7, 4096])
def test_precision_and_recall_are_their_definition(chunk_size):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(60, 4, generator=generator)
    samples = 0.7 * torch.randn(45, 4, generator=generator) + 0.5
    expected = brute_force(reference.double().numpy(), samples.double().numpy(), 3)
    assert precision_recall(reference, samples, 3, chunk_size) == pytest.approx(expected, abs=1e-9)


def test_precision_and_recall_tell_collapse_from_noise():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 8, generator=generator)
    collapsed = reference[:1] + 0.01 * torch.randn(300, 8, generator=generator)
    noise = 10 * torch.randn(300, 8, generator=generator)
    assert precision_recall(reference, collapsed) == (pytest.approx(1.0), pytest.approx(0.0, abs=0.02))
    precision, recall = precision_recall(reference, noise)
    assert precision < 0.05 and recall > 0.9
    with pytest.raises(ValueError, match="more than 3 samples, got 3"):
        precision_recall(reference, noise[:3])
