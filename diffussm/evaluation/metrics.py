"""The metrics of generative image models, as functions of features, after ADM's evaluator.

FID and sFID are a FrechetDistance to the reference; precision, recall, density and coverage are in neighbours.py.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffussm.evaluation.statistics import FeatureStatistics

Array = np.ndarray | Tensor
NOISE = 10
ALIKE = 1e-8  # of the greatest eigenvalue: roots of those above it are right to 1e-12 of its root
SPLIT_SIZE = 5000  # of the chunks of the Inception Score


class FrechetDistance:
    """The Frechet distance of Gaussians to one of mean mu (dim,) and covariance sigma (dim, dim), in float64.

    A root of its covariance is taken once. Work is done where `device` says.
    """

    def __init__(self, mu: Array, sigma: Array, device: torch.device | str = "cpu") -> None:
        self.mu, self.sigma = (torch.as_tensor(x).to(device, torch.float64) for x in (mu, sigma))
        self._root = _root(self.sigma)

    def __call__(self, mu: Array, sigma: Array) -> float:
        """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

        Tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2, where S = R R^T. Unlike a matrix square root
        of S1 S2 it is real and stable for singular covariances. Their squares are the eigenvalues of R2^T S1 R2,
        which cost half as much, but where some are small have lost half of the digits.
        """
        mean, covariance = self._take(mu, sigma)
        eigenvalues = torch.linalg.eigvalsh(self._root.T @ covariance @ self._root)
        if len(eigenvalues) and eigenvalues[0] > ALIKE * eigenvalues[-1]:
            cross = eigenvalues.sqrt().sum()
        else:
            cross = torch.linalg.svdvals(_root(covariance).T @ self._root).sum()
        distance = (mean - self.mu).square().sum() + covariance.trace() + self.sigma.trace() - 2 * cross
        return max(float(distance), 0.0)  # rounding can leave a distance of 0 a hair below it

    def influence(
        self, mu: Array, sigma: Array, rows: Float[Tensor, "N dim"], chunk_size: int = 4096
    ) -> Float[Tensor, "N"]:
        """How much each sample pulls the distance of its set, whose moments are mu and sigma, up or down.

        The derivative in the weight of a sample, 2 (mu1 - mu2) x + x^T (I - T) x less its mean, x centred, where
        T = R2 (R2^T S1 R2)^(-1/2) R2^T, S2 = R2 R2^T, is the optimal transport between the Gaussians.
        """
        mean, covariance = self._take(mu, sigma)
        eigenvalues, vectors = torch.linalg.eigh(self._root.T @ covariance @ self._root)
        is_seen = _above_rounding(eigenvalues)
        half = (vectors[:, is_seen] * eigenvalues[is_seen] ** -0.25).T @ self._root.T  # T = half^T half
        pulls = []
        for chunk in rows.split(chunk_size):
            x = chunk.to(mean) - mean
            bend = x.square().sum(dim=1) - (x @ half.T).square().sum(dim=1)
            pulls.append(2 * x @ (mean - self.mu) + bend)
        influence = torch.cat(pulls)
        return influence - influence.mean()

    def _take(self, mu: Array, sigma: Array) -> tuple[Tensor, Tensor]:
        mean, covariance = torch.as_tensor(mu).to(self.mu), torch.as_tensor(sigma).to(self.mu)
        if not mean.shape == self.mu.shape == covariance.shape[:1] == self.sigma.shape[:1]:
            raise ValueError(f"features of different size: {len(mean)} and {len(self.mu)}")
        return mean, covariance


def _root(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim rank"]:
    """R of S = R R^T, without the directions in which nothing varies."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    is_seen = _above_rounding(eigenvalues)
    return vectors[:, is_seen] * eigenvalues[is_seen].sqrt()


def _above_rounding(eigenvalues: Tensor) -> Tensor:
    """Which of them, ascending and of a semidefinite matrix, are not 0.

    Where samples do not differ there is rounding, whose root would be ten thousand times as large.
    """
    return eigenvalues > NOISE * len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1:].clamp_min(0)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """FID and sFID: the FrechetDistance between two Gaussians."""
    return FrechetDistance(mu2, sigma2)(mu1, sigma1)


def extrapolated_distance(distance: FrechetDistance, parts: Sequence[FeatureStatistics]) -> float:
    """The distance of infinitely many samples: FID_inf of Chong and Forsyth (2020).

    The bias of a distance of N samples is linear in 1/N. The sets are the whole, its halves, and so on down to
    `parts`, a power of two, at least 2, of random parts of equal size; those of a size share a bias and are
    averaged. A part should have more samples than features have dimensions, below which the bias bends.
    """
    if len(parts) < 2 or len(parts) & (len(parts) - 1):
        raise ValueError(f"parts={len(parts)}: needs a power of two, at least 2")
    inverse_sizes, distances = [], []
    while parts:
        inverse_sizes.append(float(np.mean([1 / part.count for part in parts])))
        distances.append(float(np.mean([distance(part.mean, part.covariance) for part in parts])))
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [FeatureStatistics.total(pair) for pair in pairs]
    return float(np.polyfit(inverse_sizes, distances, 1)[1])


def inception_score(logits: Float[Tensor, "N classes"], split_size: int = SPLIT_SIZE) -> float:
    """exp(E KL(p(y|x) || p(y))), the mean over consecutive chunks of `split_size` samples.

    Class-sorted samples collapse it: hand them over in random order.
    """
    scores = [divergences(chunk).mean().exp() for chunk in logits.split(split_size)]
    return float(torch.stack(scores).mean())


def divergences(logits: Float[Tensor, "N classes"]) -> Float[Tensor, "N"]:
    """KL(p(y|x) || p(y)) of every sample, p(y) that of these samples."""
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1)


def kernel_distance(
    reference: Float[Tensor, "M dim"], samples: Float[Tensor, "N dim"], chunk_size: int = 1024
) -> tuple[float, Float[Tensor, "N"]]:
    """KID: the squared maximum mean discrepancy under the kernel (x y / dim + 1)^3, and each sample's influence.

    Unbiased (Binkowski et al. 2018), and complete: over all pairs, where the means over random subsets that are
    usual estimate the same number with more noise. It can be negative.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) < 2:
            raise ValueError(f"KID needs at least 2 {name}, got {len(features)}")
    within_reference = _kernel_means(reference, reference, chunk_size, is_same=True).mean()
    within = _kernel_means(samples, samples, chunk_size, is_same=True)
    across = _kernel_means(samples, reference, chunk_size, is_same=False)
    influence = 2 * (within - across)
    distance = within.mean() + within_reference - 2 * across.mean()
    return float(distance), influence - influence.mean()


def _kernel_means(a: Tensor, b: Tensor, chunk_size: int, is_same: bool) -> Tensor:
    """The mean kernel of every row of `a` with those of `b`, without itself where both are the same."""
    b = b.double()
    means = []
    for chunk in a.split(chunk_size):
        rows = chunk.double()
        total = (rows @ b.T / b.shape[1]).add_(1).pow_(3).sum(dim=1)
        if is_same:
            total -= (rows.square().sum(dim=1) / b.shape[1] + 1) ** 3
        means.append(total / (len(b) - is_same))
    return torch.cat(means)
