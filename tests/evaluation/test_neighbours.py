"""Density, coverage and values without a group against their definitions; ties and duplicates do not matter."""

import itertools

import numpy as np
import pytest
import torch

from diffussm.evaluation.neighbours import (
    coverage_without_groups,
    density_coverage,
    precision_recall,
    recall_without_groups,
    sample_densities,
)


def clouds(num_reference=60, num_samples=45, dim=4):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(num_reference, dim, generator=generator)
    return reference, 0.7 * torch.randn(num_samples, dim, generator=generator) + 0.5


def distances(a, b):
    return np.sqrt(((a.double().numpy()[:, None] - b.double().numpy()[None]) ** 2).sum(axis=2))


def kth(points, k):
    return np.sort(distances(points, points), axis=1)[:, k]


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_density_and_coverage_are_their_definition(chunk_size):
    reference, samples = clouds()
    inside = distances(reference, samples) <= kth(reference, 5)[:, None]
    expected = inside.sum() / (5 * len(samples)), inside.any(axis=1).mean()
    assert density_coverage(reference, samples, 5, chunk_size) == pytest.approx(expected, abs=1e-12)
    assert np.allclose(sample_densities(reference, samples, 5, chunk_size), inside.sum(axis=0) / 5)
    assert 0 < expected[1] < 1


@pytest.mark.parametrize(("groups", "chunk_size"), [(4, 7), (20, 1024)])
def test_values_without_a_group_are_those_of_the_other_samples(groups, chunk_size):
    reference, samples = clouds()
    rest = [samples[torch.arange(len(samples)) % groups != group] for group in range(groups)]
    recalls = [precision_recall(reference, part)[1] for part in rest]
    assert np.allclose(recall_without_groups(reference, samples, groups, 3, chunk_size), recalls)
    coverages = [density_coverage(reference, part)[1] for part in rest]
    assert np.allclose(coverage_without_groups(reference, samples, groups, 5, chunk_size), coverages)
    assert len(set(recalls)) > 1 and len(set(coverages)) > 1


def test_a_set_covers_itself_whatever_the_chunks():
    points = clouds(300, dim=64)[0] * 1000 + 5000
    for chunk_size in (13, 300):
        assert precision_recall(points, points.clone(), 3, chunk_size) == (1.0, 1.0)
        assert density_coverage(points, points.clone(), 5, chunk_size)[1] == 1.0


def test_copies_of_one_image_have_neighbourhoods_of_no_extent():
    for dim, chunk_size in itertools.product((64, 500, 2048), (1, 7, 1024)):
        reference = 3 * clouds(100, dim=dim)[0] + 10
        copies = reference[:1].repeat(51, 1)
        precision, recall = precision_recall(reference, copies, 3, chunk_size)
        assert precision == 1.0 and recall == 0.01  # the image itself, exactly


def test_a_distance_is_exact_far_from_the_origin():
    near = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]]).double() + 1e6
    shifted = torch.tensor([[-0.99], [13.9]]).double() + 1e6
    # Radii to the second nearest: 3, 2, 3, 4, 7; -0.99 is inside those of 0 (and 3), 13.9 inside that of 10.
    assert density_coverage(near, shifted.repeat(3, 1), k=2)[1] == 0.6


@pytest.mark.parametrize("few", ["reference", "samples"])
def test_too_few_are_refused(few):
    sizes = {"reference": 50, "samples": 50, few: 5}
    with pytest.raises(ValueError, match=f"k=5 need more than 5 {few}, got 5"):
        density_coverage(torch.zeros(sizes["reference"], 2), torch.zeros(sizes["samples"], 2))
