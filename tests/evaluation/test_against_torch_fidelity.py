"""The same numbers as torch-fidelity where conventions are the same, and the documented difference where not."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffussm.evaluation.metrics import frechet_distance, inception_score, kernel_distance
from diffussm.evaluation.neighbours import precision_recall
from diffussm.evaluation.statistics import FeatureStatistics


def clouds(dim=48, sizes=(400, 300)):
    """Features like a network's: correlated, not negative, of a reference and of samples a little off it."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    return tuple(
        (torch.randn(size, dim, generator=generator) @ mixing * (1 - 0.1 * n) + 0.3 * n + 0.5).relu()
        for n, size in enumerate(sizes)
    )


def streamed(features):
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(64):
        statistics.update(batch)
    return statistics.mean, statistics.covariance


def test_fid_is_theirs():
    reference, samples = clouds()
    doubles = [fid_features_to_statistics(features.double()) for features in (samples, reference)]
    expected = fid_statistics_to_metric(*doubles, False)["frechet_inception_distance"]
    assert frechet_distance(*streamed(samples), *streamed(reference)) == pytest.approx(expected, abs=1e-6)
    assert expected > 1


def test_inception_score_is_theirs_in_order_and_in_whole_chunks():
    logits = 3 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(1))
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split_size=250) == pytest.approx(theirs, abs=1e-6)
    # By default they take ten chunks of shuffled samples, ADM chunks of 5,000 in order: here a single one.
    assert abs(isc_features_to_metric(logits)["inception_score_mean"] - inception_score(logits)) > 1e-3


def test_precision_and_recall_are_theirs():
    reference, samples = clouds(dim=8)
    theirs = prc_features_to_metric(samples, reference, prc_neighborhood=3, verbose=False)
    assert precision_recall(reference, samples, k=3) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-6
    )
    assert 0.05 < theirs["precision"] < 0.95 and 0.05 < theirs["recall"] < 0.95


def test_kid_is_the_number_that_their_subsets_estimate():
    reference, samples = clouds(sizes=(300, 300))

    def theirs(size, subsets):
        options = {"kid_subset_size": size, "kid_subsets": subsets, "verbose": False}
        found = kid_features_to_metric(samples, reference, **options)
        return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"] / subsets**0.5

    ours, _ = kernel_distance(reference, samples)
    assert ours == pytest.approx(theirs(300, 1)[0], rel=1e-5)  # the one subset that is everything
    mean, error = theirs(100, 200)
    assert ours == pytest.approx(mean, abs=4 * error) and error < 0.05 * ours


def test_statistics_in_single_precision_are_another_matter():
    """Theirs are numpy's of float32 features, whose mean is in float32: ours must not be."""
    features = clouds()[0] + 100
    mean = features.double().mean(dim=0).numpy()
    assert np.abs(streamed(features)[0].numpy() - mean).max() < 1e-10
    assert np.abs(fid_features_to_statistics(features)["mu"] - mean).max() > 1e-7
