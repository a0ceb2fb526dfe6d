"""The variational bound against the closed forms of its terms, for Gaussian data whose reverse process is known.

Data are N(MEAN, STD^2) in every dimension, in the middle of the range of pixels; what is expected is computed with
numpy and scipy from the betas alone.
"""

import math

import numpy as np
import pytest
import torch
from mixture import Known
from scipy import integrate, stats

from diffussm.diffusion.likelihood import prior_term, variational_bound
from diffussm.diffusion.loss import discretized_gaussian_log_likelihood, variational_bound_term
from diffussm.diffusion.process import Gaussian, p_posterior, predictor, q_posterior
from diffussm.diffusion.schedule import Schedule, linear_schedule, respace, spaced_timesteps

MEAN, STD = 0.1, 0.3
SCHEDULE = linear_schedule(30)
T = len(SCHEDULE)
BETAS = SCHEDULE.betas.numpy()
ALPHAS = np.cumprod(1 - BETAS)
PREVIOUS = np.concatenate([[1.0], ALPHAS[:-1]])
TILDE = BETAS * (1 - PREVIOUS) / (1 - ALPHAS)
FLOOR = np.concatenate([TILDE[1:2], TILDE[1:]])  # iDDPM's, which stands in for the zero of t = 0


def posterior_of_x_0(x_t, t):
    """(E, Var) of x_0 given x_t."""
    precision = 1 / STD**2 + ALPHAS[t] / (1 - ALPHAS[t])
    return (MEAN / STD**2 + np.sqrt(ALPHAS[t]) * x_t / (1 - ALPHAS[t])) / precision, 1 / precision


def exact_reverse_variance(t):
    of_x_0 = np.sqrt(PREVIOUS[t]) * BETAS[t] / (1 - ALPHAS[t])
    return FLOOR[t] if t == 0 else TILDE[t] + of_x_0**2 * posterior_of_x_0(0.0, t)[1]


def reverse(variance, x_t, t):
    """(mean, standard deviation) of p(x_{t-1} | x_t) with the exact mean and this variance."""
    x_0, _ = posterior_of_x_0(x_t, t)
    mean = (
        np.sqrt(PREVIOUS[t]) * BETAS[t] / (1 - ALPHAS[t]) * x_0
        + np.sqrt(1 - BETAS[t]) * (1 - PREVIOUS[t]) / (1 - ALPHAS[t]) * x_t
    )
    fixed = {"beta": BETAS[t] if t else FLOOR[0], "beta_tilde": FLOOR[t]}
    return mean, math.sqrt(exact_reverse_variance(t) if variance == "learned" else fixed[variance])


def kl_by_integration(mean_p, std_p, mean_q, std_q):
    """KL(p || q) in nats."""
    p, q = stats.norm(mean_p, std_p), stats.norm(mean_q, std_q)
    ends = mean_p - 12 * std_p, mean_p + 12 * std_p
    return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), *ends, epsabs=1e-13, limit=200)[0]


def expected_term(variance, x_0, x_t, t):
    """L_t of one number, in bits."""
    mean, std = reverse(variance, x_t, t)
    if t == 0:
        lower = -math.inf if x_0 < -0.999 else x_0 - 1 / 255
        upper = math.inf if x_0 > 0.999 else x_0 + 1 / 255
        return -math.log2(stats.norm.cdf(upper, mean, std) - stats.norm.cdf(lower, mean, std))
    posterior_mean = (
        np.sqrt(PREVIOUS[t]) * BETAS[t] / (1 - ALPHAS[t]) * x_0
        + np.sqrt(1 - BETAS[t]) * (1 - PREVIOUS[t]) / (1 - ALPHAS[t]) * x_t
    )
    return kl_by_integration(posterior_mean, math.sqrt(TILDE[t]), mean, std) / math.log(2)


def network(prediction="eps", learned=False):
    """The perfect network; for `learned` with the output that stands for the exact reverse variance."""

    def predict(x_t, t, y=None):
        step = int(t[0])
        x_0, _ = posterior_of_x_0(x_t, step)
        a, s = math.sqrt(ALPHAS[step]), math.sqrt(1 - ALPHAS[step])
        eps = (x_t - a * x_0) / s
        value = {"eps": eps, "x_0": x_0, "v": a * eps - s * x_0}[prediction]
        if not learned:
            return value
        fraction = math.log(exact_reverse_variance(step) / FLOOR[step]) / math.log(BETAS[step] / FLOOR[step])
        return torch.cat([value, torch.full_like(value, 2 * fraction - 1)], dim=1)

    return predict


def pixels(shape, seed=0):
    """x_0 from the data's distribution, on the grid of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    x = MEAN + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def normal(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("variance", ["learned", "beta", "beta_tilde"])
def test_every_term_is_its_definition(variance, prediction):
    x_0 = pixels((1, 2, 1, 1))
    noise = normal(x_0.shape)
    predict = predictor(network(prediction, variance == "learned"), SCHEDULE, prediction)
    for step in range(T):
        z = noise()
        x_t = math.sqrt(ALPHAS[step]) * x_0 + math.sqrt(1 - ALPHAS[step]) * z
        t = torch.tensor([step])
        p = p_posterior(SCHEDULE, predict(x_t, t, None), x_t, t, variance)
        ours = float(variational_bound_term(SCHEDULE, x_0, x_t, t, p))
        pairs = zip(x_0.flatten().tolist(), x_t.flatten().tolist(), strict=True)
        expected = np.mean([expected_term(variance, *pair, step) for pair in pairs])
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9), step


@pytest.mark.parametrize("x", [0.2, -1.0, 1.0])
def test_the_prior_is_its_definition(x):
    expected = kl_by_integration(math.sqrt(ALPHAS[-1]) * x, math.sqrt(1 - ALPHAS[-1]), 0.0, 1.0) / math.log(2)
    ours = prior_term(SCHEDULE, torch.full((1, 1, 2, 2), x, dtype=torch.float64))
    assert float(ours) == pytest.approx(expected, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("variance", ["learned", "beta", "beta_tilde"])
def test_the_bound_is_the_sum_of_its_terms_with_the_same_noise(variance):
    x_0 = pixels((2, 1, 1, 1), seed=3)
    predict = predictor(network(learned=variance == "learned"), SCHEDULE)
    options = {} if variance == "learned" else {"fixed_variance": variance}
    ours = variational_bound(predict, SCHEDULE, x_0, None, normal(x_0.shape), **options)
    noise, terms = normal(x_0.shape), []
    for step in reversed(range(T)):  # it draws from the noisiest down
        x_t = math.sqrt(ALPHAS[step]) * x_0 + math.sqrt(1 - ALPHAS[step]) * noise()
        pairs = zip(x_0.flatten().tolist(), x_t.flatten().tolist(), strict=True)
        terms.append(np.array([expected_term(variance, *pair, step) for pair in pairs]))
    ends = math.sqrt(1 - ALPHAS[-1])
    prior = [kl_by_integration(math.sqrt(ALPHAS[-1]) * x, ends, 0, 1) / math.log(2) for x in x_0.flatten()]
    prior = np.array(prior)
    assert ours["vlb_decoder"].numpy() == pytest.approx(terms[-1], rel=1e-6)
    assert ours["vlb_prior"].numpy() == pytest.approx(prior, rel=1e-6)
    assert ours["vlb"].numpy() == pytest.approx(sum(terms) + prior, rel=1e-6)


@pytest.mark.parametrize("variance", ["learned", "beta", "beta_tilde"])
def test_the_mean_over_noise_is_the_closed_form_of_the_whole_bound(variance):
    """For one x_0: E over x_t of every KL in closed form, of the decoder by integration."""
    x_0, count = 57 / 127.5 - 1, 4000
    total = 0.0
    for t in range(T):
        a, s = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
        if t == 0:
            integrand = lambda z: stats.norm.pdf(z) * expected_term(variance, x_0, a * x_0 + s * z, 0)  # noqa: B023, E731
            total += integrate.quad(integrand, -6, 6, limit=200)[0]
            continue
        # difference of means = c0 + c1 z, both means affine in x_t
        differences = []
        for z in (0.0, 1.0):
            x_t = a * x_0 + s * z
            of_x_0 = np.sqrt(PREVIOUS[t]) * BETAS[t] / (1 - ALPHAS[t])
            differences.append(of_x_0 * (x_0 - posterior_of_x_0(x_t, t)[0]))
        squared = differences[0] ** 2 + (differences[1] - differences[0]) ** 2
        _, std = reverse(variance, 0.0, t)
        ratio = TILDE[t] / std**2
        total += (ratio - 1 - math.log(ratio) + squared / std**2) / 2 / math.log(2)
    total += kl_by_integration(math.sqrt(ALPHAS[-1]) * x_0, math.sqrt(1 - ALPHAS[-1]), 0, 1) / math.log(2)
    x = torch.full((count, 1, 1, 1), x_0, dtype=torch.float64)
    options = {} if variance == "learned" else {"fixed_variance": variance}
    predict = predictor(network(learned=variance == "learned"), SCHEDULE)
    ours = variational_bound(predict, SCHEDULE, x, None, normal(x.shape), **options)["vlb"]
    standard_error = float(ours.std()) / math.sqrt(count)
    assert standard_error < 0.02 * total
    assert abs(float(ours.mean()) - total) < 4 * standard_error


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_on_a_mixture_of_gaussians_the_mean_is_the_closed_form(variance):
    """For one x_0: every term integrated over x_t by quadrature, with the mixture's exact E[x_0 | x_t]."""
    x_0 = np.array([32, -77]) / 127.5
    x_0 = np.round((x_0 + 1) * 127.5) / 127.5 - 1  # on the grid of 8 bits
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
    total = 0.0
    for t in range(T):
        a, s = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
        x_t = a * x_0 + s * z
        known = Known(torch.from_numpy(x_t)[:, :, None, None], a, s).x_0.flatten(1).numpy()
        of_x_0 = np.sqrt(PREVIOUS[t]) * BETAS[t] / (1 - ALPHAS[t])
        if t == 0:
            std = math.sqrt(FLOOR[0])
            near, far = (stats.norm.logsf((np.abs(x_0 - known) + side / 255) / std) for side in (-1, 1))
            terms = -(near + np.log1p(-np.exp(far - near))) / math.log(2)
        else:
            q = BETAS[t] if variance == "beta" else TILDE[t]
            squared = (of_x_0 * (x_0 - known)) ** 2
            terms = (TILDE[t] / q - 1 - math.log(TILDE[t] / q) + squared / q) / 2 / math.log(2)
        total += mass @ terms.mean(axis=1)
    ends = math.sqrt(1 - ALPHAS[-1])
    prior = [kl_by_integration(math.sqrt(ALPHAS[-1]) * x, ends, 0, 1) / math.log(2) for x in x_0]
    total += np.mean(prior)

    def eps(x_t, t, y):
        return Known(x_t, math.sqrt(ALPHAS[int(t[0])]), math.sqrt(1 - ALPHAS[int(t[0])])).eps

    x = torch.from_numpy(x_0).view(1, 2, 1, 1).expand(4000, 2, 1, 1)
    ours = variational_bound(predictor(eps, SCHEDULE), SCHEDULE, x, None, normal(x.shape), variance)["vlb"]
    standard_error = float(ours.std()) / math.sqrt(len(ours))
    assert standard_error < 0.02 * total
    assert abs(float(ours.mean()) - total) < 4 * standard_error


def test_clipping_bounds_the_predicted_x_0():
    x_0 = pixels((3, 1, 1, 1))
    wild = predictor(lambda x_t, t, y: torch.full_like(x_t, -50.0), SCHEDULE)
    one = predictor(lambda x_t, t, y: torch.ones_like(x_t), SCHEDULE, "x_0")  # what the wild one is clipped to
    clipped = variational_bound(wild, SCHEDULE, x_0, None, normal(x_0.shape), clip_x_0=True)["vlb"]
    assert torch.allclose(clipped, variational_bound(one, SCHEDULE, x_0, None, normal(x_0.shape))["vlb"])


def test_the_bound_is_above_and_close_to_the_entropy_of_the_data():
    """E[-log2 p(x)] of pixels from N(MEAN, STD^2) is known; the bound of the perfect network is above, not far."""
    x_0 = pixels((2000, 1, 1, 1))
    fine = linear_schedule(1000)

    def perfect(x_t, t, y=None):
        alpha = float(fine.alphas_cumprod[t[0]])
        precision = 1 / STD**2 + alpha / (1 - alpha)
        x = (MEAN / STD**2 + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
        eps = (x_t - math.sqrt(alpha) * x) / math.sqrt(1 - alpha)
        # the variance of x_0 is nearly beta at t = 0, elsewhere nearly either
        return torch.cat([eps, torch.full_like(eps, 1.0 if t[0] == 0 else 0.0)], dim=1)

    entropy = math.log2(STD * math.sqrt(2 * math.pi * math.e) * 127.5)
    bound = float(variational_bound(predictor(perfect, fine), fine, x_0, None, normal(x_0.shape))["vlb"].mean())
    assert entropy < bound < entropy + 0.3


def test_a_worse_network_has_a_larger_bound():
    x_0 = pixels((200, 1, 1, 1))
    bounds = []
    for factor in (1.0, 0.9, 0.7):
        predict = predictor(lambda x, t, y, f=factor: f * network()(x, t), SCHEDULE)
        bounds.append(float(variational_bound(predict, SCHEDULE, x_0, None, normal(x_0.shape))["vlb"].mean()))
    assert bounds == sorted(bounds) and bounds[0] < bounds[-1] - 0.1


def test_a_respaced_bound_tells_the_network_its_training_timesteps():
    short = respace(SCHEDULE, spaced_timesteps(T, 5, "linspace"))
    assert isinstance(short, Schedule)
    told = []

    def eps(x_t, t, y):
        told.append(int(t[0]))
        return torch.zeros_like(x_t)

    x_0 = pixels((1, 1, 1, 1))
    variational_bound(predictor(eps, SCHEDULE), short, x_0, None, normal(x_0.shape))
    assert told == short.timesteps.tolist()[::-1]


@pytest.mark.parametrize("distance", [0.0, 0.5, 4.0, 6.5, 20.0, 3000.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_small_likelihoods_are_exact_on_both_sides_of_the_mean(sign, distance):
    """In float32, to masses far below its smallest number, and with the gradients of a Gaussian's tail."""
    std = 0.01
    x = torch.tensor(100 / 127.5 - 1)
    mean = torch.tensor(float(x) + sign * distance * std, requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(x, Gaussian(mean, torch.tensor(2 * math.log(std))))
    near, far = ((abs(mean.item() - float(x)) + side / 255) / std for side in (-1, 1))
    upper, lower = stats.norm.logsf(near), stats.norm.logsf(far)
    assert log_p.item() == pytest.approx(upper + math.log1p(-math.exp(lower - upper)), rel=1e-4)
    (gradient,) = torch.autograd.grad(log_p, mean)
    densities = (stats.norm.logpdf(z) - upper for z in (near, far))
    ratio = (lambda a, b: math.exp(a) - math.exp(b))(*densities) / -math.expm1(lower - upper)
    assert gradient.item() == pytest.approx(-sign * ratio / std, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("x", [-1.0, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 1.0, 1.3])
def test_the_outer_bins_are_open(x, mean):
    std = 0.1
    p = Gaussian(torch.tensor(mean), torch.tensor(2 * math.log(std)))
    expected = stats.norm.logsf((1 - 1 / 255 - mean * x) / std)
    assert discretized_gaussian_log_likelihood(torch.tensor(x), p).item() == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )


def test_a_perfect_posterior_has_no_divergence():
    x_0 = pixels((3, 1, 2, 2))
    t = torch.tensor([1, 7, 29])
    x_t = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    term = variational_bound_term(SCHEDULE, x_0, x_t, t, q_posterior(SCHEDULE, x_0, x_t, t))
    assert torch.equal(term, torch.zeros_like(term))
