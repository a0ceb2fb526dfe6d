"""Samplers against closed forms: for Gaussian data the exact eps is known, and so is what must come out."""

import pytest
import torch

from diffussm.diffusion.process import posterior_log_variance, predictor
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import linear_schedule, respace, spaced_timesteps

MEAN, STD = 0.5, 0.2
SCHEDULE = linear_schedule()


def exact_eps(x_t, t, y=None):
    """eps*(x_t) = E[eps | x_t] for data N(MEAN, STD^2), and v = -1 (variance beta-tilde)."""
    alpha = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1).to(x_t.dtype)
    eps = (1 - alpha).sqrt() * (x_t - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
    return torch.cat([eps, -torch.ones_like(eps)], dim=1)


EXACT = predictor(exact_eps, SCHEDULE)


def draw_noise(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddpm, {"variance": "learned"}),
        (ddpm, {"variance": "beta_tilde"}),
        (ddpm, {"variance": "beta"}),
        (ddim, {"eta": 0.0}),
        (ddim, {"eta": 0.5}),
        (ddim, {"eta": 1.0}),
    ],
)
def test_samples_have_the_moments_of_the_data(sampler, options):
    noise = draw_noise(5_000)
    x = sampler(EXACT, SCHEDULE, noise(), None, noise, num_steps=1000, **options)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.04)


def test_ddim_error_falls_with_the_number_of_steps():
    errors = []
    for num_steps in (10, 40, 160):
        noise = draw_noise(20_000)
        x = ddim(EXACT, SCHEDULE, noise(), None, noise, num_steps=num_steps)
        errors.append(abs(x.std().item() - STD))
    assert errors[0] > errors[1] > errors[2]


def test_ddim_with_eta_1_is_ddpm_with_beta_tilde():
    outputs = []
    for sampler, options in ((ddpm, {"variance": "beta_tilde"}), (ddim, {"eta": 1.0})):
        noise = draw_noise(50)
        outputs.append(sampler(EXACT, SCHEDULE, noise(), None, noise, num_steps=1000, **options))
    assert torch.allclose(*outputs, atol=1e-9)


def test_ddpm_step_is_mean_plus_sigma_noise():
    schedule = respace(SCHEDULE, spaced_timesteps(1000, 2, "linspace"))
    x_T = draw_noise(3)()
    z = torch.full((3, 1, 1, 1), 0.7, dtype=torch.float64)
    x = ddpm(EXACT, SCHEDULE, x_T, None, lambda: z, num_steps=2)
    beta, alpha = schedule.betas, schedule.alphas_cumprod
    eps = exact_eps(x_T, torch.tensor([999] * 3))[:, :1]
    mean = (x_T - beta[1] / (1 - alpha[1]).sqrt() * eps) / (1 - beta[1]).sqrt()
    x_1 = mean + (posterior_log_variance(schedule)[1] / 2).exp() * z
    eps = exact_eps(x_1, torch.tensor([0] * 3))[:, :1]
    expected = (x_1 - (1 - alpha[0]).sqrt() * eps) / alpha[0].sqrt()  # the last step is noiseless
    assert torch.allclose(x, expected, atol=1e-9)


def test_the_network_is_told_the_training_timesteps():
    told = []

    def model(x_t, t, y):
        told.append(t.tolist())
        return torch.zeros_like(x_t)

    ddim(
        predictor(model, SCHEDULE),
        SCHEDULE,
        torch.zeros(2, 1, 1, 1),
        None,
        lambda: torch.zeros(2, 1, 1, 1),
        num_steps=3,
    )
    assert told == [[999, 999], [500, 500], [0, 0]]


def test_clipping_keeps_x_0_within_bounds():
    x_T = 5 * torch.ones(2, 1, 1, 1)
    zero_noise = lambda: torch.zeros(2, 1, 1, 1)  # noqa: E731
    model = predictor(lambda x, t, y: torch.zeros_like(x), SCHEDULE)
    assert ddim(model, SCHEDULE, x_T, None, zero_noise, num_steps=5).max() > 1
    assert ddim(model, SCHEDULE, x_T, None, zero_noise, num_steps=5, clip_x_0=True).max() <= 1


def test_options_that_cannot_work_are_refused():
    one = torch.zeros(1, 1, 1, 1)
    model = predictor(lambda x, t, y: torch.zeros_like(x), SCHEDULE)
    with pytest.raises(ValueError, match="learn_sigma"):
        ddpm(model, SCHEDULE, one, None, lambda: one, num_steps=3)
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        ddim(model, SCHEDULE, one, None, lambda: one, eta=1.5)
