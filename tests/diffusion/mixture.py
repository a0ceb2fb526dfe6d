"""Three Gaussians in two dimensions, as latents (2, 1, 1): all that a perfect network would know, in closed form.

With x_t = a x_0 + s eps, and component k of x_0 a Gaussian of weight w_k, mean m_k and diagonal variance d_k,

    p(k | x_t) ~ w_k N(x_t; a m_k, a^2 d_k + s^2),      E[eps | x_t, k] = s (x_t - a m_k) / (a^2 d_k + s^2),

and so on for x_0 and its variance. Nothing here uses the code under test.
"""

import math

import numpy as np
import torch
from scipy import stats
from scipy.integrate import solve_ivp

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.5, -0.4], [-0.7, 0.1], [0.3, 0.8]], dtype=torch.float64)
STDS = torch.tensor([[0.15, 0.3], [0.2, 0.2], [0.3, 0.1]], dtype=torch.float64)
DIRECTIONS = [np.array([math.cos(angle), math.sin(angle)]) for angle in (0.0, 0.8, math.pi / 2, 2.4)]


class Known:
    """What x_t = a x_0 + s eps tells about x_0 and eps; a and s are numbers, x_t is (B, 2, 1, 1)."""

    def __init__(self, x_t, a, s):
        x = x_t.double().flatten(1)[:, None]  # (B, 1, 2), against components (3, 2)
        a, s = float(a), float(s)
        spread = a**2 * STDS**2 + s**2
        log_p = WEIGHTS.log() - (((x - a * MEANS) ** 2) / spread + spread.log()).sum(-1) / 2
        self.responsibilities = log_p.softmax(-1)  # (B, 3)
        self.share = self.responsibilities[..., None]
        eps = s * (x - a * MEANS) / spread
        self._x_0 = MEANS + a * STDS**2 * (x - a * MEANS) / spread
        self._variance = (STDS**2 * s**2 / spread).expand_as(self._x_0)
        self.eps, self.x_0 = (self._latents((self.share * value).sum(1)) for value in (eps, self._x_0))

    @property
    def variance(self):
        """Var[x_0 | x_t], coordinate by coordinate."""
        second_moment = (self.share * (self._variance + self._x_0**2)).sum(1)
        return self._latents(second_moment) - self.x_0**2

    @staticmethod
    def _latents(x):
        return x[:, :, None, None]


def draw(count, seed):
    """True samples (count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return MEANS[k] + STDS[k] * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def mean():
    return WEIGHTS @ MEANS


def covariance():
    centred = MEANS - mean()
    return (WEIGHTS[:, None] * STDS**2).sum(0).diag() + (WEIGHTS[:, None] * centred).T @ centred


def mode_shares(samples):
    """How the samples (B, 2) fall to the modes: E p(k | x), which for true samples is the weights."""
    return Known(samples[:, :, None, None], 1.0, 0.0).responsibilities.mean(0)


def p_values(samples):
    """Of samples (B, 2): Kolmogorov-Smirnov tests along four directions, and a z-test of the mean log density.

    The former compare with the exact distribution functions, the latter (more sensitive to the modes' widths) with
    the entropy.
    """
    values = [
        stats.kstest(samples.numpy() @ direction, lambda x, d=direction: _distribution_function(x, d)).pvalue
        for direction in DIRECTIONS
    ]
    truth = log_density(draw(200_000, seed=99))
    z = (log_density(samples).mean() - truth.mean()) / (truth.std() / math.sqrt(len(samples)))
    return [*values, 2 * stats.norm.sf(abs(float(z)))]


def log_density(samples):
    """log p(x) of samples (B, 2), but for a constant."""
    z = (samples[:, None] - MEANS) / STDS
    return (WEIGHTS.log() - (z**2 / 2 + STDS.log()).sum(-1)).logsumexp(-1)


def _distribution_function(x, direction):
    means = MEANS.numpy() @ direction
    stds = np.sqrt((STDS.numpy() ** 2) @ direction**2)
    return (WEIGHTS.numpy() * stats.norm.cdf(x[:, None], means, stds)).sum(1)


def probability_flow(x_T, sigma_from, sigma_to):
    """x / a at sigma_to where d(x / a) / d sigma = E[eps | x] and x begins as x_T; sigma = s / a."""

    def slope(log_sigma, flat):
        sigma = math.exp(log_sigma)
        a = 1 / math.sqrt(1 + sigma**2)
        x = torch.from_numpy(flat).view_as(x_T) * a
        return sigma * Known(x, a, sigma * a).eps.flatten().numpy()

    start = (x_T.double() * math.sqrt(1 + sigma_from**2)).flatten().numpy()
    span = (math.log(sigma_from), math.log(sigma_to))
    solved = solve_ivp(slope, span, start, method="DOP853", rtol=1e-9, atol=1e-10)
    return torch.from_numpy(solved.y[:, -1]).view_as(x_T)


def no_noise():
    raise AssertionError("a deterministic sampler draws no noise")
