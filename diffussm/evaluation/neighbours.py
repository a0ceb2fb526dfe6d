"""Precision and recall, density and coverage: who lies within whose neighbourhood, in chunks of bounded memory.

The neighbourhood of a point is the ball around it that reaches to its k-th nearest other. Distances are taken in
float64 by matrix products: differences of features that single precision cannot tell apart count as none, and a
point on the surface is inside, so that no answer hangs on rounding.

A chunk of c rows holds about 3 c N numbers for N points: 1.2 GB for the default and 50,000 samples.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SAME = 1e-12  # of |a|^2 + |b|^2: features of single precision that are nearer are the same
SURFACE = 1 + 1e-9


def precision_recall(
    reference: Float[Tensor, "M dim"], samples: Float[Tensor, "N dim"], k: int = 3, chunk_size: int = 1024
) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of the reference within the samples'.

    A manifold is the union of the neighbourhoods of its points (Kynkäänniemi et al. 2019).
    """
    _refuse_few(reference, samples, k)
    precision = _share_inside(samples, reference, _radii(reference, k, chunk_size), chunk_size)
    recall = _share_inside(reference, samples, _radii(samples, k, chunk_size), chunk_size)
    return precision, recall


def density_coverage(
    reference: Float[Tensor, "M dim"], samples: Float[Tensor, "N dim"], k: int = 5, chunk_size: int = 1024
) -> tuple[float, float]:
    """The number of the reference's neighbourhoods that a sample lies in, over k, and the share that has a sample.

    Naeem et al. (2020), with their k. Only the reference has neighbourhoods, so that single odd samples count
    for little; density may exceed 1.
    """
    counts, is_covered = sample_densities(reference, samples, k, chunk_size), 0.0
    for inside in _inside(reference, samples, None, _radii(reference, k, chunk_size), chunk_size):
        is_covered += float(inside.any(dim=1).sum())
    return float(counts.mean()), is_covered / len(reference)


def sample_densities(
    reference: Float[Tensor, "M dim"], samples: Float[Tensor, "N dim"], k: int = 5, chunk_size: int = 1024
) -> Float[Tensor, "N"]:
    """The number of the reference's neighbourhoods that each sample lies in, as a share of k."""
    _refuse_few(reference, samples, k)
    radii = _radii(reference, k, chunk_size)
    inside = _inside(samples, reference, radii, None, chunk_size)
    return torch.cat([chunk.sum(dim=1) for chunk in inside]).double() / k


def coverage_without_groups(
    reference: Float[Tensor, "M dim"],
    samples: Float[Tensor, "N dim"],
    num_groups: int,
    k: int = 5,
    chunk_size: int = 1024,
) -> Float[Tensor, "groups"]:
    """Coverage by the samples without those whose index is g modulo `num_groups`, for every g."""
    radii = _radii(reference, k, chunk_size)
    covered = torch.zeros(num_groups, dtype=torch.float64, device=reference.device)
    for inside in _inside(reference, samples, None, radii, chunk_size):
        has = torch.stack([inside[:, group::num_groups].any(dim=1) for group in range(num_groups)], dim=1)
        covered += (has.sum(dim=1, keepdim=True) - has.long() > 0).sum(dim=0)  # by another group
    return covered / len(reference)


def recall_without_groups(
    reference: Float[Tensor, "M dim"],
    samples: Float[Tensor, "N dim"],
    num_groups: int,
    k: int = 3,
    chunk_size: int = 1024,
) -> Float[Tensor, "groups"]:
    """Recall by the samples without those whose index is g modulo `num_groups`, for every g.

    One pass over the distances serves all: the k nearest of a point without a group are among the k nearest of
    each of the others.
    """
    radii = _radii_without_groups(samples, num_groups, k, chunk_size)  # (N, groups), squared
    found = torch.zeros(num_groups, dtype=torch.float64, device=reference.device)
    group_of = torch.arange(len(samples), device=samples.device) % num_groups
    for chunk, distances in _distances(reference, samples, chunk_size):
        is_found = torch.empty(len(chunk), num_groups, dtype=torch.bool, device=chunk.device)
        for group in range(num_groups):
            reach = radii[:, group].masked_fill(group_of == group, -1)  # a ball that holds nothing
            is_found[:, group] = (distances <= reach * SURFACE).any(dim=1)
        found += is_found.sum(dim=0)
    return found / len(reference)


def _radii_without_groups(points: Tensor, num_groups: int, k: int, chunk_size: int) -> Tensor:
    """The squared distance of every point to its k-th nearest other that is not in group g, (N, groups)."""
    radii, start = [], 0
    for chunk, distances in _distances(points, points, chunk_size):
        rows = torch.arange(len(chunk), device=chunk.device)
        distances[rows, start + rows] = torch.inf
        start += len(chunk)
        columns = [distances[:, group::num_groups] for group in range(num_groups)]
        nearest = [c.topk(min(k, c.shape[1]), dim=1, largest=False).values for c in columns]
        others = [torch.cat(nearest[:group] + nearest[group + 1 :], dim=1) for group in range(num_groups)]
        radii.append(torch.stack([near.kthvalue(k, dim=1).values for near in others], dim=1))
    return torch.cat(radii)


def _radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    """The squared distance of every point to its k-th nearest other."""
    # Each point is its own nearest neighbour, at distance 0.
    every = [distances.kthvalue(k + 1, dim=1).values for _, distances in _distances(points, points, chunk_size)]
    return torch.cat(every)


def _share_inside(points: Tensor, centers: Tensor, radii: Tensor, chunk_size: int) -> float:
    inside = sum(chunk.any(dim=1).sum() for chunk in _inside(points, centers, radii, None, chunk_size))
    return float(inside) / len(points)


def _inside(
    rows: Tensor, columns: Tensor, column_radii: Tensor | None, row_radii: Tensor | None, chunk_size: int
) -> Iterator[Bool[Tensor, "chunk columns"]]:
    """Who of rows and columns lies within whose neighbourhood: those of the columns, or else of the rows."""
    start = 0
    for chunk, distances in _distances(rows, columns, chunk_size):
        if column_radii is not None:
            yield distances <= column_radii * SURFACE
        else:
            assert row_radii is not None
            yield distances <= row_radii[start : start + len(chunk), None] * SURFACE
        start += len(chunk)


def _distances(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the rows of `a`, with their squared distances to all of `b`."""
    # About a common centre there is less to cancel in |a|^2 + |b|^2 - 2 ab.
    center = b.double().mean(dim=0)
    b = b.double() - center
    squares = b.square().sum(dim=1)
    for part in a.split(chunk_size):
        rows = part.double() - center
        sums = rows.square().sum(dim=1, keepdim=True) + squares
        distances = torch.addmm(sums, rows, b.T, alpha=-2)
        yield part, distances.masked_fill_(distances <= SAME * sums, 0)


def _refuse_few(reference: Tensor, samples: Tensor, k: int) -> None:
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"neighbourhoods of k={k} need more than {k} {name}, got {len(features)}")
