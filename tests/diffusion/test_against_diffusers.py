"""Our samplers against diffusers' schedulers, step for step with the same noise.

The schedulers keep their tables in float32, so that agreement is to 1e-4 of the largest value; networks and states
are float64. `linspace` is compared for DDPM only and `leading` for DDIM, where diffusers is right.
"""

import itertools

import diffusers
import pytest
import torch

from diffussm.diffusion.process import predictor
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import cosine_schedule, linear_schedule
from diffussm.diffusion.solvers import diffusers_solver

SHAPE = (3, 2, 4, 4)
SCHEDULES = {"linear": linear_schedule(), "cosine": cosine_schedule()}
THEIR_NAMES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def network(x_t, t, y=None):
    """Smooth, and nonlinear in x_t and t; the first half a prediction, the second a variance in -1 .. 1."""
    t = t.double().view(-1, 1, 1, 1) / 1000
    value = 0.9 * torch.tanh(x_t + 0.5 * torch.sin(3 * t)) + 0.1 * x_t.roll(1, 3)
    return torch.cat([value, torch.sin(2 * x_t + 5 * t)], dim=1)


def prediction_only(x_t, t, y=None):
    return network(x_t, t)[:, : SHAPE[1]]


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def follow(scheduler, num_steps, model, x, **options):
    """The sampling loop of diffusers' pipelines."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(x_t, t.expand(len(x))), t, x, **options).prev_sample
    return x


def theirs(name, schedule, **options):
    betas = schedule.betas.tolist()
    return getattr(diffusers, name)(num_train_timesteps=len(betas), trained_betas=betas, **options)


def assert_close(ours, expected):
    assert expected.isfinite().all() and expected.abs().max() > 0.1
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def their_noise(monkeypatch):
    """diffusers' DDPMScheduler draws the numbers of `normal(1)`."""
    from diffusers.schedulers import scheduling_ddpm

    noise = normal(1)

    def same(shape, **options):
        assert tuple(shape) == SHAPE
        return noise()

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", same)


@pytest.mark.parametrize("num_steps", [10, 27, 250, 1000])
def test_ddpm_with_learned_range(their_noise, num_steps):
    schedule = SCHEDULES["linear"]
    x_T = normal(0)()
    scheduler = theirs(
        "DDPMScheduler",
        schedule,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    expected = follow(scheduler, num_steps, network, x_T)
    ours = ddpm(predictor(network, schedule), schedule, x_T, None, normal(1), num_steps=num_steps)
    assert_close(ours, expected)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("prediction", THEIR_NAMES)
def test_ddpm_with_fixed_variances_predictions_and_clipping(their_noise, prediction, variance, clip):
    # fixed_large differs from beta at t = 0 only, where neither adds noise
    schedule = SCHEDULES["cosine" if prediction == "v" else "linear"]
    x_T = normal(0)()
    scheduler = theirs(
        "DDPMScheduler",
        schedule,
        variance_type={"beta_tilde": "fixed_small", "beta": "fixed_large"}[variance],
        clip_sample=clip,
        prediction_type=THEIR_NAMES[prediction],
        timestep_spacing="linspace",
    )
    predict = predictor(prediction_only, schedule, prediction)
    ours = ddpm(predict, schedule, x_T, None, normal(1), num_steps=40, variance=variance, clip_x_0=clip)
    assert_close(ours, follow(scheduler, 40, prediction_only, x_T))


def ddim_by_diffusers(schedule, x_T, num_steps, eta, prediction="eps", clip=False):
    scheduler = theirs(
        "DDIMScheduler",
        schedule,
        clip_sample=clip,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
        prediction_type=THEIR_NAMES[prediction],
    )
    noise = normal(1)
    scheduler.set_timesteps(num_steps)
    x = x_T
    for t in scheduler.timesteps:
        # At t = 0 its variance is 0, and ours draws nothing.
        z = noise() if eta > 0 and t > 0 else torch.zeros_like(x)
        output = prediction_only(x, t.expand(len(x)))
        step = scheduler.step(output, t, x, eta=eta, variance_noise=z, use_clipped_model_output=clip)
        x = step.prev_sample
    return x


@pytest.mark.parametrize(("num_steps", "eta"), [*itertools.product([10, 50, 250], [0.0, 0.4, 1.0])])
def test_ddim(num_steps, eta):
    schedule = SCHEDULES["linear"]
    x_T = normal(0)()
    predict = predictor(prediction_only, schedule)
    options = {"num_steps": num_steps, "spacing": "leading", "eta": eta}
    ours = ddim(predict, schedule, x_T, None, normal(1), **options)
    assert_close(ours, ddim_by_diffusers(schedule, x_T, num_steps, eta))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", THEIR_NAMES)
def test_ddim_with_predictions_and_clipping(prediction, clip):
    schedule = SCHEDULES["cosine" if prediction == "v" else "linear"]
    x_T = normal(0)()
    predict = predictor(prediction_only, schedule, prediction)
    options = {"num_steps": 50, "spacing": "leading", "eta": 0.7, "clip_x_0": clip}
    ours = ddim(predict, schedule, x_T, None, normal(1), **options)
    assert_close(ours, ddim_by_diffusers(schedule, x_T, 50, 0.7, prediction, clip))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "midpoint"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
        ("DEISMultistepScheduler", {"solver_order": 2}),
        ("HeunDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {}),
    ],
)
def test_a_solver_is_diffusers_scheduler_fed_with_eps(name, options):
    """Also where the network learns a variance, of which the scheduler must see nothing."""
    schedule = SCHEDULES["linear"]
    x_T = normal(0)()
    scheduler = theirs(name, schedule, timestep_spacing="linspace", **options)
    scheduler.set_timesteps(20)  # decides init_noise_sigma
    expected = follow(scheduler, 20, prediction_only, x_T * scheduler.init_noise_sigma)
    if name == "DEISMultistepScheduler":  # which leaves the noise of the first timestep to us
        alpha = schedule.alphas_cumprod[0]
        eps = prediction_only(expected, torch.zeros(len(x_T)))
        expected = (expected - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    predict = predictor(network, schedule)
    ours = diffusers_solver(predict, schedule, x_T, None, normal(1), scheduler=name, num_steps=20, options=options)
    assert_close(ours, expected)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_of_v_is_the_scheduler_that_knows_v(name):
    schedule = SCHEDULES["linear"]
    x_T = normal(0)()
    scheduler = theirs(name, schedule, timestep_spacing="linspace", prediction_type="v_prediction")
    expected = follow(scheduler, 20, prediction_only, x_T)
    predict = predictor(prediction_only, schedule, "v")
    ours = diffusers_solver(predict, schedule, x_T, None, normal(1), scheduler=name, num_steps=20)
    assert_close(ours, expected)
