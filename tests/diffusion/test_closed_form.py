"""Every sampler draws from a mixture of Gaussians, given the network that knows it perfectly.

What comes out must have the mixture's mean, covariance and shares of modes, its distribution function along four
directions (Kolmogorov-Smirnov), and its mean log density. The same tests reject samplers with one factor wrong.
"""

import pytest
import torch
from mixture import Known, covariance, mean, mode_shares, p_values
from mixture import draw as draw_truly

from diffussm.diffusion.flow import StraightPath, flow_euler, flow_heun
from diffussm.diffusion.process import Prediction, predictor
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import linear_schedule
from diffussm.diffusion.solvers import diffusers_solver

SCHEDULE = linear_schedule()
PATH = StraightPath()
COUNT = 2500
REJECTED, ACCEPTED = 1e-6, 1e-3  # p-values of the worst test


def perfect(x_t, t, y=None, factor=1.0):
    """E[eps | x_t], and the output that stands for the exact Var[x_{t-1} | x_t]."""
    step = int(t[0])
    alpha = SCHEDULE.alphas_cumprod[step]
    known = Known(x_t, alpha.sqrt(), (1 - alpha).sqrt())
    eps = factor * known.eps
    if step == 0:
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)  # no noise is added there
    previous = SCHEDULE.alphas_cumprod[step - 1]
    beta = 1 - alpha / previous
    beta_tilde = beta * (1 - previous) / (1 - alpha)
    variance = beta_tilde + previous * (beta / (1 - alpha)) ** 2 * known.variance
    fraction = (variance / beta_tilde).log() / (beta / beta_tilde).log()
    return torch.cat([eps, 2 * fraction - 1], dim=1)


def perfect_flow(x_t, t, y=None, factor=1.0):
    """A prediction whose velocity is exact, times a factor."""
    time = float(t[0]) / 1000
    known = Known(x_t, 1 - time, time)
    return Prediction(factor * known.x_0, factor * known.eps)


def solver(name, num_steps=200, **options):
    return diffusers_solver, {"scheduler": f"{name}Scheduler", "num_steps": num_steps, "options": options}


SAMPLERS = {
    "ddpm, learned": (ddpm, {"variance": "learned", "num_steps": 1000}),
    "ddpm, beta_tilde": (ddpm, {"variance": "beta_tilde", "num_steps": 1000}),
    "ddpm, beta": (ddpm, {"variance": "beta", "num_steps": 1000}),
    "ddim, eta 0": (ddim, {"eta": 0.0, "num_steps": 500}),
    "ddim, eta 0.5": (ddim, {"eta": 0.5, "num_steps": 1000}),
    "ddim, eta 1": (ddim, {"eta": 1.0, "num_steps": 1000}),
    "dpm_solver_pp": solver("DPMSolverMultistep"),
    "dpm_solver_pp, Karras": solver("DPMSolverMultistep", use_karras_sigmas=True),
    "unipc": solver("UniPCMultistep"),
    "deis": solver("DEISMultistep"),
    "heun": solver("HeunDiscrete"),
    "euler": solver("EulerDiscrete", num_steps=500),
    "flow_euler": (flow_euler, {"num_steps": 500}),
    "flow_heun": (flow_heun, {"num_steps": 100}),
}


def normal(seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: factor * torch.randn(COUNT, 2, 1, 1, generator=generator, dtype=torch.float64)


def run(sampler, options, factor=1.0, noise_factor=1.0):
    x_T, noise = normal(5)(), normal(2, noise_factor)
    if sampler in (flow_euler, flow_heun):
        x_0 = sampler(lambda *a: perfect_flow(*a, factor=factor), PATH, x_T, None, noise, **options)
    else:
        predict = predictor(lambda *a: perfect(*a, factor=factor), SCHEDULE)
        x_0 = sampler(predict, SCHEDULE, x_T, None, noise, **options)
    return x_0.flatten(1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_mixture(name):
    samples = run(*SAMPLERS[name])
    assert torch.allclose(samples.mean(0), mean(), atol=0.04)  # 3.5 standard errors
    assert torch.allclose(samples.T.cov(), covariance(), atol=0.03)
    assert torch.allclose(mode_shares(samples), torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.035)
    assert min(p_values(samples)) > ACCEPTED


def test_true_samples_are_accepted():
    assert min(p_values(draw_truly(COUNT, 0))) > ACCEPTED


@pytest.mark.parametrize("name", ["ddpm, learned", "ddpm, beta_tilde", "ddim, eta 1"])
def test_a_noise_that_is_a_tenth_too_strong_is_rejected(name):
    assert min(p_values(run(*SAMPLERS[name], noise_factor=1.1))) < REJECTED


@pytest.mark.parametrize("name", ["ddim, eta 0", "unipc", "heun", "flow_heun"])
def test_a_network_that_is_a_tenth_too_weak_is_rejected(name):
    assert min(p_values(run(*SAMPLERS[name], factor=0.9))) < REJECTED
