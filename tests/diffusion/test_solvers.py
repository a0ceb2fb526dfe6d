"""The error of every sampler falls with the number of steps at its order, and steps that cannot work are refused.

The data are a mixture whose exact eps is known. The reference begins at the same x_T, follows the probability-flow
ODE to the lowest timestep that the sampler visits, and there takes the same last step: to the predicted x_0. (That
step is of every method's first order in a distance that the number of steps does not shorten, where the lowest
timestep is 0.)
"""

import itertools
import math

import pytest
import torch
from mixture import Known, no_noise, probability_flow
from scipy.integrate import solve_ivp

from diffussm.diffusion.flow import StraightPath, flow_euler, flow_heun
from diffussm.diffusion.process import Prediction, predictor
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from diffussm.diffusion.solvers import SOUND, diffusers_solver

# Even steps in log sigma, the time of the exponential integrators: a last step t -> t/2 in another schedule halves
# sigma however many steps there are, and the order of the multistep methods does not show.
NUM_TIMESTEPS = 1921  # so that 40, 80 and 160 strides are whole
SIGMAS = torch.logspace(math.log10(0.03), math.log10(30), NUM_TIMESTEPS, dtype=torch.float64)
EVEN = Schedule(1 / (1 + SIGMAS**2), torch.arange(NUM_TIMESTEPS))
SNR_0 = cosine_schedule(zero_terminal_snr=True)
X_T = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Perfect:
    """E[eps | x_t], which remembers the timesteps that it was told."""

    def __init__(self, schedule):
        self.schedule, self.told = schedule, []

    def __call__(self, x_t, t, y=None):
        self.told.append(float(t[0]))
        alpha = self.schedule.alphas_cumprod[int(t[0])]
        assert t[0] == int(t[0])
        return Known(x_t, alpha.sqrt(), (1 - alpha).sqrt()).eps


def error(sampler, num_steps, **options):
    network = Perfect(EVEN)
    x = sampler(predictor(network, EVEN), EVEN, X_T, None, no_noise, num_steps=num_steps, **options)
    first, last = float(SIGMAS[-1]), float(SIGMAS[int(min(network.told))])
    # Heun and Euler begin at sigma x_T where the others begin at sqrt(1 + sigma^2) x_T
    is_sigma_scaled = options.get("scheduler", "").endswith("DiscreteScheduler")
    start = X_T * (first / math.sqrt(1 + first**2) if is_sigma_scaled else 1)
    a = 1 / math.sqrt(1 + last**2)
    reference = Known(a * probability_flow(start, first, last), a, a * last).x_0
    return float((x - reference).square().mean().sqrt())


def slopes(errors):
    """The orders at which errors fall from one number of strides to its double."""
    return [math.log2(before / after) for before, after in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        (ddim, {}, 1),
        (diffusers_solver, {"scheduler": "EulerDiscreteScheduler"}, 1),
        (diffusers_solver, {"scheduler": "HeunDiscreteScheduler"}, 2),
        (diffusers_solver, {"scheduler": "DPMSolverMultistepScheduler"}, 2),
        (diffusers_solver, {"scheduler": "DPMSolverMultistepScheduler", "options": {"solver_type": "heun"}}, 2),
        (diffusers_solver, {"scheduler": "DEISMultistepScheduler", "options": {"solver_order": 2}}, 2),
        # its corrector adds one to the order of its predictor (Zhao et al. 2023, theorem 3.1)
        (diffusers_solver, {"scheduler": "UniPCMultistepScheduler", "options": {"solver_order": 2}}, 3),
        (diffusers_solver, {"scheduler": "UniPCMultistepScheduler", "options": {"solver_order": 1}}, 2),
        (diffusers_solver, {"scheduler": "DPMSolverMultistepScheduler", "options": {"solver_order": 1}}, 1),
    ],
)
def test_the_order_of_samplers(sampler, options, order):
    with_end = sampler is ddim or options["scheduler"].endswith("DiscreteScheduler")  # 41 points make 40 strides
    errors = [error(sampler, strides + with_end, **options) for strides in (40, 80, 160)]
    assert errors[-1] < 0.005
    for slope in slopes(errors):
        assert slope == pytest.approx(order, abs=0.25)


def flow_predict(x_t, t, y=None):
    time = float(t[0]) / 1000
    known = Known(x_t, 1 - time, time)
    return Prediction(known.x_0, known.eps)


@pytest.mark.parametrize("reference_pixels", [None, 16], ids=["even", "shifted"])
@pytest.mark.parametrize(("sampler", "order"), [(flow_euler, 1), (flow_heun, 2)])
def test_the_order_of_flow_samplers(sampler, order, reference_pixels):
    def velocity(t, flat):
        known = Known(torch.from_numpy(flat).view_as(X_T), 1 - t, t)
        return (known.eps - known.x_0).flatten().numpy()

    solved = solve_ivp(velocity, (1, 0), X_T.flatten().numpy(), method="DOP853", rtol=1e-9, atol=1e-10)
    reference = torch.from_numpy(solved.y[:, -1]).view_as(X_T)
    errors = []
    for num_steps in (40, 80, 160):
        x = sampler(flow_predict, StraightPath(reference_pixels), X_T, None, no_noise, num_steps=num_steps)
        errors.append(float((x - reference).square().mean().sqrt()))
    assert errors[-1] < 0.02
    for slope in slopes(errors):
        assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
def test_ddpm_is_of_weak_order_one(variance):
    """For Gaussian data, eps is affine in x_t and so is the whole sampler in its draws: unit vectors here.

    Sample 0 has no noise at all, sample k only the k-th draw, so that the variance is exactly a sum of squares.
    """
    schedule, mean, std = linear_schedule(), 0.5, 0.4

    def network(x_t, t, y=None):
        alpha = schedule.alphas_cumprod[int(t[0])]
        eps = (1 - alpha).sqrt() * (x_t - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)  # midway between log beta and log beta-tilde

    errors = []
    for num_steps in (100, 200, 400):
        draws = iter(torch.eye(num_steps + 1, dtype=torch.float64)[:, 1:].T[..., None, None, None])
        x_T = next(draws)
        predict = predictor(network, schedule)
        options = {"num_steps": num_steps, "variance": variance}
        x = ddpm(predict, schedule, x_T, None, lambda draws=draws: next(draws), **options).flatten()
        errors.append(((x[1:] - x[0]).square().sum().item() - std**2, x[0].item() - mean))
    variance_errors, mean_errors = ([abs(error) for error in column] for column in zip(*errors, strict=True))
    assert variance_errors[-1] < 0.05 * std**2 and mean_errors[-1] < 0.01
    for slope in slopes(variance_errors):
        assert slope == pytest.approx(1, abs=0.25)


def solve(name, schedule=None, num_steps=20, **options):
    schedule = schedule or linear_schedule()
    one = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    predict = predictor(lambda x, t, y: x, schedule)
    return diffusers_solver(predict, schedule, one, None, no_noise, scheduler=name, num_steps=num_steps, **options)


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize(("num_steps", "spacing"), [(1, "leading"), (600, "leading"), (1, "linspace")])
def test_a_solver_that_would_begin_where_x_t_is_not_noise_is_refused(name, num_steps, spacing):
    begins_at_the_end = spacing == "linspace" and "Multistep" in name
    if begins_at_the_end:
        assert solve(name, num_steps=num_steps, spacing=spacing).isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"num_steps={num_steps}: with spacing={spacing} .* choose spacing=trai"):
        solve(name, num_steps=num_steps, spacing=spacing)


@pytest.mark.parametrize("name", [name for name in SOUND if "Multistep" in name])
def test_a_solver_with_two_steps_at_one_timestep_is_refused(name):
    with pytest.raises(ValueError, match=r"num_steps=1000: .* choose another number of steps"):
        solve(name, num_steps=1000)
    assert solve(name, num_steps=999).isfinite().all()


def test_deis_that_would_return_its_noise_is_refused():
    with pytest.raises(ValueError, match=r"num_steps=1: .* choose another number of steps"):
        solve("DEISMultistepScheduler", num_steps=1, options={"use_karras_sigmas": True})


@pytest.mark.parametrize("name", SOUND)
def test_every_solver_ends_at_the_predicted_x_0(name):
    """A network that is certain of x_0 = 0.3 gets exactly that, without the first timestep's noise."""
    schedule = linear_schedule()
    x_T = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    predict = predictor(lambda x, t, y: torch.full_like(x, 0.3), schedule, "x_0")
    x_0 = diffusers_solver(predict, schedule, x_T, None, no_noise, scheduler=name, num_steps=20)
    assert torch.allclose(x_0, torch.full_like(x_0, 0.3), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve("DDIMScheduler"), "scheduler=DDIMScheduler: .* choose sampler=ddim"),
        (lambda: solve("PNDMScheduler"), "scheduler=PNDMScheduler: not known to be sound"),
        (lambda: solve("HeunDiscreteScheduler", num_steps=0), "num_steps=0: must lie in"),
        (lambda: solve("HeunDiscreteScheduler", num_steps=1001), "num_steps=1001: must lie in"),
        (lambda: solve("HeunDiscreteScheduler", options={"solver_order": 4}), r"options\.solver_order=4"),
        (lambda: solve("HeunDiscreteScheduler", options={"clip_sample": True}), r"options\.clip_sample=True"),
        (
            lambda: solve("UniPCMultistepScheduler", options={"solver_type": "x"}),
            "UniPCMultistepScheduler refuses",
        ),
        (
            lambda: diffusers_solver(
                predictor(lambda x, t, y: x, SNR_0, "v"), SNR_0, torch.zeros(1, 1, 1, 1), None, no_noise
            ),
            "zero_terminal_snr=true",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
