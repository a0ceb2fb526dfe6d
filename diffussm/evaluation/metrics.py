"""The metrics of generative image models, as functions of features, after ADM's evaluator."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Array = np.ndarray | Tensor


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)): FID and sFID, of means (dim,) and covariances (dim, dim).

    Tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2),
    which, unlike a matrix square root of S1 S2, is real and stable for singular covariances. All in float64.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    if not mean1.shape == mean2.shape == cov1.shape[:1] == cov2.shape[:1]:
        raise ValueError(f"features of different size: {len(mean1)} and {len(mean2)}")
    eigenvalues, vectors = torch.linalg.eigh(cov1)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave a distance of 0 a hair below it


def inception_score(logits: Float[Tensor, "N classes"], split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))), the mean over consecutive chunks of `split_size` samples.

    Class-sorted samples collapse it: hand them over in random order.
    """
    scores = []
    for chunk in logits.double().split(split_size):
        log_p = chunk.log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(chunk))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: Float[Tensor, "M dim"], samples: Float[Tensor, "N dim"], k: int = 3, chunk_size: int = 4096
) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of the reference within the samples'.

    A manifold is the union of balls around its points that reach to the k-th nearest other point
    (Kynkäänniemi et al. 2019). Distances run in chunks of `chunk_size` rows.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"precision and recall with k={k} need more than {k} {name}, got {len(features)}")
    precision = _share_inside(samples, reference, _radii(reference, k, chunk_size), chunk_size)
    recall = _share_inside(reference, samples, _radii(samples, k, chunk_size), chunk_size)
    return precision, recall


def _radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    """Distance of every point to its k-th nearest other."""
    # Each point is its own nearest neighbour, at distance 0.
    return torch.cat([_distances(c, points).kthvalue(k + 1, dim=1).values for c in points.split(chunk_size)])


def _share_inside(points: Tensor, centers: Tensor, radii: Tensor, chunk_size: int) -> float:
    inside = sum((_distances(c, centers) <= radii).any(dim=1).sum() for c in points.split(chunk_size))
    return float(inside) / len(points)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The exact form: |a|^2 + |b|^2 - 2 ab cancels for near neighbours, which are what radii are made of.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
