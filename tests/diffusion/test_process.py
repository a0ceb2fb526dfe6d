"""Conversions, posterior, learned range and bound against their definitions."""

import math

import pytest
import torch
from scipy import integrate, stats

from diffussm.diffusion.loss import (
    DDPMObjective,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from diffussm.diffusion.objective import Draws
from diffussm.diffusion.process import (
    Gaussian,
    eps_from_x_0,
    learned_range_log_variance,
    q_posterior,
    q_sample,
    x_0_from_eps,
)
from diffussm.diffusion.schedule import cosine_schedule, linear_schedule

SCHEDULES = {"linear": linear_schedule(), "cosine": cosine_schedule(), "short": linear_schedule(100)}


def draw(schedule, batch=6):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(batch, 2, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.randint(1, len(schedule), (batch,), generator=generator)
    return x_0, noise, t


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_eps_and_x_0_invert_each_other_through_q_sample(schedule):
    x_0, noise, t = draw(schedule)
    x_t = q_sample(schedule, x_0, t, noise)
    assert torch.allclose(x_0_from_eps(schedule, x_t, t, noise), x_0, atol=1e-9)
    assert torch.allclose(eps_from_x_0(schedule, x_t, t, x_0), noise, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_posterior_is_bayes_rule(schedule):
    # q(x_{t-1} | x_t, x_0) from q(x_t | x_{t-1}) q(x_{t-1} | x_0), multiplying the two Gaussians
    x_0, noise, t = draw(schedule)
    x_t = q_sample(schedule, x_0, t, noise)
    shape = (-1, 1, 1, 1)
    beta, previous = schedule.betas[t].view(shape), schedule.alphas_cumprod_prev[t].view(shape)
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean = ((1 - beta).sqrt() * x_t / beta + previous.sqrt() * x_0 / (1 - previous)) / precision
    posterior = q_posterior(schedule, x_0, x_t, t)
    assert torch.allclose(posterior.mean, mean, atol=1e-9)
    assert torch.allclose(posterior.log_variance.exp(), 1 / precision, rtol=1e-9)


def test_q_sample_has_the_stated_moments():
    schedule = linear_schedule()
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    x_t = q_sample(schedule, torch.full_like(noise, 2.0), torch.full((200_000,), 300), noise)
    alpha = schedule.alphas_cumprod[300].item()
    assert x_t.mean().item() == pytest.approx(2 * math.sqrt(alpha), abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - alpha, rel=0.02)


def test_learned_range_spans_beta_tilde_to_beta():
    schedule = linear_schedule()
    t = torch.tensor([1, 500, 999])
    low, high = (
        learned_range_log_variance(schedule, t, torch.full((3, 1), v, dtype=torch.float64)) for v in (-1.0, 1.0)
    )
    assert torch.allclose(low[:, 0].exp(), schedule.posterior_variance[t])
    assert torch.allclose(high[:, 0].exp(), schedule.betas[t])


def test_kl_equals_the_integral():
    p, q = Gaussian(torch.tensor(0.3), torch.tensor(-0.5)), Gaussian(torch.tensor(-0.4), torch.tensor(0.7))
    P, Q = (stats.norm(float(g.mean), math.exp(float(g.log_variance) / 2)) for g in (p, q))
    expected, _ = integrate.quad(lambda x: P.pdf(x) * (P.logpdf(x) - Q.logpdf(x)), -12, 12)
    assert float(normal_kl(p, q)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0, 1, 100, 254, 255])
def test_discretized_likelihood_is_the_mass_of_the_bin(value):
    x = torch.tensor(value / 127.5 - 1, dtype=torch.float64)
    p = Gaussian(torch.tensor(0.1, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64))
    P = stats.norm(0.1, math.exp(-1))
    lower = -math.inf if value == 0 else float(x) - 1 / 255
    upper = math.inf if value == 255 else float(x) + 1 / 255
    expected = math.log(P.cdf(upper) - P.cdf(lower))
    assert float(discretized_gaussian_log_likelihood(x, p)) == pytest.approx(expected, rel=1e-6)


def test_discretized_likelihood_sums_to_one():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    p = Gaussian(torch.tensor(0.2).double().expand(256), torch.tensor(-1.0).double().expand(256))
    assert float(discretized_gaussian_log_likelihood(x, p).exp().sum()) == pytest.approx(1, abs=1e-9)


class Constant(torch.nn.Module):
    """A network that gives the same eps and v everywhere, both trainable."""

    def __init__(self, eps: float, v: float | None) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps, dtype=torch.float64))
        self.v = None if v is None else torch.nn.Parameter(torch.tensor(v, dtype=torch.float64))

    def forward(self, x_t, t, y, drop_uniform=None):
        parts = [self.eps.expand_as(x_t)] + ([] if self.v is None else [self.v.expand_as(x_t)])
        return torch.cat(parts, dim=1)


def test_hybrid_loss_is_noise_mse_plus_the_bound_in_bits():
    schedule = linear_schedule()
    x_0, noise, _ = draw(schedule)
    x_0 = x_0.clamp(-1, 1)
    t = torch.tensor([0, 0, 1, 10, 500, 999])
    draws = Draws(t, torch.ones(6), torch.ones(6))
    terms = DDPMObjective(schedule)(Constant(0.1, 0.3), x_0, None, draws, noise)
    assert torch.allclose(terms["mse"], ((noise - 0.1) ** 2).flatten(1).mean(1))
    for i, step in enumerate(t.tolist()):
        alpha, previous = schedule.alphas_cumprod[step], schedule.alphas_cumprod_prev[step]
        beta = 1 - alpha / previous
        tilde = beta * (1 - previous) / (1 - alpha)
        floor = tilde if step else schedule.posterior_variance[1]
        sigma = torch.exp((0.65 * beta.log() + 0.35 * floor.log()) / 2)
        x_t = alpha.sqrt() * x_0[i] + (1 - alpha).sqrt() * noise[i]
        mean = (x_t - beta / (1 - alpha).sqrt() * 0.1) / (1 - beta).sqrt()  # DDPM eq. 11
        if step:
            target = (
                previous.sqrt() * beta / (1 - alpha) * x_0[i]
                + (1 - beta).sqrt() * (1 - previous) / (1 - alpha) * x_t
            )
            kl = torch.distributions.kl_divergence(
                torch.distributions.Normal(target, tilde.sqrt()), torch.distributions.Normal(mean, sigma)
            )
            expected = kl.mean() / math.log(2)
        else:
            upper = torch.where(
                x_0[i] > 0.999, 1.0, torch.from_numpy(stats.norm.cdf(x_0[i] + 1 / 255, mean, sigma))
            )
            lower = torch.where(
                x_0[i] < -0.999, 0.0, torch.from_numpy(stats.norm.cdf(x_0[i] - 1 / 255, mean, sigma))
            )
            expected = -(torch.as_tensor(upper - lower).clamp_min(1e-12)).log().mean() / math.log(2)
        assert terms["vb"][i].item() == pytest.approx(float(expected), rel=1e-4), step
    assert torch.allclose(terms["loss"], terms["mse"] + terms["vb"])


def test_the_bound_trains_the_variance_but_not_the_mean():
    schedule = linear_schedule()
    x_0, noise, t = draw(schedule)
    model = Constant(0.1, 0.3)
    terms = DDPMObjective(schedule)(model, x_0, None, Draws(t, torch.ones(6), torch.ones(6)), noise)
    terms["vb"].sum().backward(retain_graph=True)
    assert model.v.grad.abs() > 0 and (model.eps.grad is None or model.eps.grad == 0)
    model.zero_grad()
    terms["mse"].sum().backward()
    assert model.eps.grad.abs() > 0 and (model.v.grad is None or model.v.grad == 0)


def test_without_learned_sigma_the_loss_is_the_mse():
    schedule = linear_schedule()
    x_0, noise, t = draw(schedule)
    terms = DDPMObjective(schedule)(Constant(0.1, None), x_0, None, Draws(t, torch.ones(6), torch.ones(6)), noise)
    assert set(terms) == {"loss", "mse"} and torch.equal(terms["loss"], terms["mse"])


def test_vb_weight_scales_the_bound():
    schedule = linear_schedule()
    x_0, noise, t = draw(schedule)
    terms = DDPMObjective(schedule, vb_weight=0.25)(
        Constant(0.1, 0.3), x_0, None, Draws(t, torch.ones(6), torch.ones(6)), noise
    )
    assert torch.allclose(terms["loss"], terms["mse"] + 0.25 * terms["vb"])
    with pytest.raises(ValueError, match="vb_weight=-1"):
        DDPMObjective(schedule, vb_weight=-1.0)


def test_draws_of_a_slice_are_the_slice_of_the_draws():
    objective = DDPMObjective(linear_schedule())
    draws = objective.draw((8, 1, 2, 2), torch.Generator().manual_seed(3))
    again = objective.draw((8, 1, 2, 2), torch.Generator().manual_seed(3))
    assert torch.equal(draws[2:5].drop_uniform, again.drop_uniform[2:5])
    assert torch.equal(draws[2:5].t, again.t[2:5])
    assert draws.t.min() >= 0 and draws.t.max() < 1000
