"""Schedules and respacing against their definitions, restated one step at a time, and against diffusers."""

import math

import diffusers
import pytest
import torch

from diffussm.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    quadratic_schedule,
    respace,
    schedule_from_betas,
    sigmoid_schedule,
    spaced_timesteps,
)

CONSTRUCTORS = [linear_schedule, quadratic_schedule, sigmoid_schedule, cosine_schedule]
BETA_RANGES = CONSTRUCTORS[:3]
LENGTHS = [1000, 100, 4000]


def stated_betas(constructor, T: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    """beta_1 .. beta_T as the papers write them; those that are made for T = 1000 times 1000 / T."""
    if constructor is cosine_schedule:
        f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
        return [min(1 - f(t + 1) / f(t), 0.999) for t in range(T)]
    betas = []
    for t in range(T):
        part = t / (T - 1)
        if constructor is linear_schedule:
            beta = start + part * (end - start)
        elif constructor is quadratic_schedule:
            beta = (math.sqrt(start) + part * (math.sqrt(end) - math.sqrt(start))) ** 2
        else:
            beta = start + (end - start) / (1 + math.exp(6 - 12 * part))
        betas.append(1000 / T * beta)
    return betas


def table(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("T", [1000, 100])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_schedules_are_what_their_papers_say(constructor, T):
    schedule = constructor(T)
    betas = stated_betas(constructor, T)
    expected = table([math.prod(1 - beta for beta in betas[: t + 1]) for t in range(T)])
    assert schedule.alphas_cumprod.dtype == torch.float64 and len(schedule) == T
    assert torch.equal(schedule.timesteps, torch.arange(T))
    assert torch.allclose(schedule.alphas_cumprod, expected, rtol=1e-10, atol=0)
    assert torch.allclose(schedule.betas, table(betas), rtol=1e-8, atol=0)


def test_schedules_begin_and_end_at_the_betas_that_were_asked_for():
    for constructor in (linear_schedule, quadratic_schedule):
        ends = constructor(500, 0.001, 0.01).betas[[0, -1]]
        assert ends.tolist() == pytest.approx([0.002, 0.02], rel=1e-9)
    low, high = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(-6))
    ends = sigmoid_schedule(500, 0.001, 0.01).betas[[0, -1]]
    assert ends.tolist() == pytest.approx([2 * (0.001 + 0.009 * low), 2 * (0.001 + 0.009 * high)], rel=1e-9)
    assert cosine_schedule(max_beta=0.5).betas.max().item() == pytest.approx(0.5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("schedule", "name", "betas"),
    [
        (linear_schedule, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (quadratic_schedule, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (sigmoid_schedule, "sigmoid", {"beta_start": 1e-4, "beta_end": 0.02}),
        (cosine_schedule, "squaredcos_cap_v2", {}),
    ],
)
def test_diffusers_has_the_same_schedules(schedule, name, betas, zero):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero, **betas)
    ours = schedule(**betas, zero_terminal_snr=zero)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_a_zero_terminal_shifts_and_scales_the_signal(constructor, T):
    plain, schedule = constructor(T), constructor(T, zero_terminal_snr=True)
    roots, shifted = plain.alphas_cumprod.sqrt(), schedule.alphas_cumprod.sqrt()
    assert schedule.has_zero_terminal_snr and not plain.has_zero_terminal_snr
    assert schedule.alphas_cumprod[-1] == 0 and schedule.betas[-1] == 1
    assert schedule.alphas_cumprod[0] == plain.alphas_cumprod[0]
    for t in (1, T // 3, T // 2, T - 2):  # the map is affine: ratios of differences are kept
        expected = (roots[0] - roots[t]) / (roots[0] - roots[-1])
        assert ((shifted[0] - shifted[t]) / shifted[0]).item() == pytest.approx(expected.item(), rel=1e-9)
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_tables_of_a_zero_terminal_are_finite_and_agree(constructor):
    schedule = constructor(zero_terminal_snr=True)
    for steps in ([0, 400, 999], [999], range(1000)):
        short = respace(schedule, torch.tensor(list(steps)))
        assert short.alphas_cumprod[-1] == 0 and short.betas[-1] == 1 and short.has_zero_terminal_snr
        for values in (short.betas, short.posterior_variance, short.alphas_cumprod_prev, short.snr):
            assert values.isfinite().all() and (values >= 0).all()
        assert torch.allclose(torch.cumprod(1 - short.betas, 0), short.alphas_cumprod, rtol=1e-9, atol=0)
    assert not respace(schedule, torch.tensor([0, 400])).has_zero_terminal_snr


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_snr_is_signal_power_over_noise_power(constructor):
    schedule = constructor()
    for t in (0, 1, 500, 999):
        alpha = schedule.alphas_cumprod[t].item()
        assert schedule.snr[t].item() == pytest.approx(alpha / (1 - alpha), rel=1e-12)
        assert schedule.log_snr[t].item() == pytest.approx(math.log(alpha) - math.log1p(-alpha), rel=1e-12)
    zero = constructor(zero_terminal_snr=True)
    assert zero.snr[-1] == 0 and zero.log_snr[-1] == -math.inf and zero.log_snr[:-1].isfinite().all()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_alphabar_at_whole_timesteps_is_the_tables(dtype, zero):
    schedule = cosine_schedule(zero_terminal_snr=zero)
    alphas_cumprod = schedule.at(torch.arange(1000, dtype=dtype))
    assert alphas_cumprod.dtype == torch.float64 and torch.equal(alphas_cumprod, schedule.alphas_cumprod)


def test_alphabar_between_timesteps_interpolates_sigma():
    schedule = linear_schedule()
    sigma = lambda alpha: math.sqrt((1 - alpha) / alpha)  # noqa: E731
    for t, part in ((0, 0.5), (500, 0.25), (998, 0.875)):
        below, above = schedule.alphas_cumprod[t : t + 2].tolist()
        expected = (1 - part) * sigma(below) + part * sigma(above)
        assert sigma(schedule.at(table([t + part])).item()) == pytest.approx(expected, rel=1e-9)


def test_alphabar_agrees_with_the_sigmas_of_diffusers_euler():
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace")
    scheduler.set_timesteps(27)
    alphas_cumprod = linear_schedule().at(scheduler.timesteps.double())
    assert scheduler.timesteps.frac().any()
    sigmas = (1 / alphas_cumprod - 1).sqrt()
    assert torch.allclose(sigmas, scheduler.sigmas[:-1].double(), rtol=1e-4)


def test_alphabar_beside_an_infinite_sigma_is_zero():
    schedule = linear_schedule(zero_terminal_snr=True)
    assert schedule.at(table([998, 998.5, 999])).tolist() == [schedule.alphas_cumprod[998].item(), 0, 0]


@pytest.mark.parametrize("t", [-0.5, 999.5])
def test_alphabar_outside_the_schedule_is_not_invented(t):
    with pytest.raises(AssertionError):
        linear_schedule().at(table([t]))


def test_alphabar_at_training_timesteps_needs_all_of_them():
    with pytest.raises(AssertionError):
        respace(linear_schedule(), torch.tensor([0, 500, 999])).at(table([0]))


REFUSED = [
    *((lambda f=f: f(0), "num_timesteps=0: must be at least 1") for f in CONSTRUCTORS),
    *((lambda f=f: f(-5), "num_timesteps=-5: ") for f in CONSTRUCTORS),
    *((lambda f=f: f(10), r"beta_start=0.0001, beta_end=0.02: .*1000/num_timesteps=100") for f in BETA_RANGES),
    *((lambda f=f: f(beta_start=0.1, beta_end=0.01), "beta_start=0.1, beta_end=0.01: ") for f in BETA_RANGES),
    *((lambda f=f: f(beta_start=0.0), "beta_start=0.0, ") for f in BETA_RANGES),
    *((lambda f=f: f(beta_start=-0.1), "beta_start=-0.1, ") for f in BETA_RANGES),
    *((lambda f=f: f(beta_end=1.0), "beta_end=1.0: ") for f in BETA_RANGES),
    *((lambda f=f: f(beta_end=math.nan), "beta_end=nan: ") for f in BETA_RANGES),
    # alphabar would round to 1 at the start, or fall to 0 by itself
    *((lambda f=f: f(beta_start=1e-17), r"betas=.*\.\.0.02: float64") for f in BETA_RANGES[:2]),
    *((lambda f=f: f(beta_start=0.6, beta_end=0.9), "betas=0.6.*: float64") for f in BETA_RANGES),
    *((lambda f=f: f(beta_start=0.6, beta_end=0.9, zero_terminal_snr=True), "betas=0.6") for f in BETA_RANGES),
    (lambda: cosine_schedule(max_beta=1.0), "max_beta=1.0: must lie in"),
    (lambda: cosine_schedule(max_beta=0.0), "max_beta=0.0: "),
    (lambda: cosine_schedule(1, zero_terminal_snr=True), "num_timesteps=1: zero_terminal_snr needs at least 2"),
    (lambda: linear_schedule(1, 1e-5, 1e-4, zero_terminal_snr=True), "num_timesteps=1: zero_terminal_snr"),
    (lambda: schedule_from_betas(table([0.1, 1.0])), r"betas=0.1\.\.1: each must lie in"),
    (lambda: schedule_from_betas(table([])), "num_timesteps=0: "),
    (lambda: spaced_timesteps(1000, 1001, "linspace"), "num_steps=1001: must lie in 1..1000"),
    (lambda: spaced_timesteps(1000, 0, "linspace"), "num_steps=0: must lie in 1..1000"),
    (lambda: spaced_timesteps(1000, 0, "trailing"), "num_steps=0: must lie in 1..1000"),
    (lambda: spaced_timesteps(1000, 999, "leading"), "num_steps=999: no integer stride"),
    (lambda: spaced_timesteps(1000, [10, 15], "trailing"), r"num_steps=\[10, 15\]: spacing=trailing takes one"),
    (lambda: spaced_timesteps(1000, [10, 15], "leading"), r"num_steps=\[10, 15\]: spacing=leading takes one"),
    (lambda: spaced_timesteps(1000, [], "linspace"), r"num_steps=\[\]: give"),
    (lambda: spaced_timesteps(10, [3, 4, 3], "linspace"), "section 2 of 3 has 3 timesteps"),
    (lambda: spaced_timesteps(10, [4, 0, 3], "linspace"), r"num_steps=\[4, 0, 3\]: section 2 of 3"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_impossible_schedules_are_refused_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value) and "=" in str(refused.value).split(": ")[0]


def adm_steps(T: int, counts: list[int]) -> list[int]:
    """ADM's rule: sections with the remainder in front, each walked by adding up a stride."""
    steps, start = [], 0
    for section, count in enumerate(counts):
        size = T // len(counts) + (1 if section < T % len(counts) else 0)
        stride = 1.0 if count == 1 else (size - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    assert start == T
    return steps


def diffusers_steps(num_steps: int, spacing: str) -> list[int]:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [10, 27, 250, 1000])
def test_linspace_is_that_of_adm_and_diffusers(num_steps):
    steps = spaced_timesteps(1000, num_steps, "linspace")
    assert steps.tolist() == adm_steps(1000, [num_steps])
    assert steps.flip(0).tolist() == diffusers_steps(num_steps, "linspace")


@pytest.mark.parametrize("num_steps", [10, 20, 250, 1000])
def test_leading_is_that_of_diffusers_where_the_stride_is_whole(num_steps):
    steps = spaced_timesteps(1000, num_steps, "leading")
    assert steps.flip(0).tolist() == diffusers_steps(num_steps, "leading")
    assert steps.tolist() == list(range(0, 1000, 1000 // num_steps))


def test_leading_finds_adms_stride_where_the_number_does_not_divide():
    assert spaced_timesteps(1000, 27, "leading").tolist() == list(range(0, 1000, 38))


@pytest.mark.parametrize("num_steps", [1, 10, 27, 250, 1000])
def test_trailing_is_that_of_diffusers_and_ends_at_the_last_timestep(num_steps):
    steps = spaced_timesteps(1000, num_steps, "trailing")
    assert steps.flip(0).tolist() == diffusers_steps(num_steps, "trailing") and steps[-1] == 999


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_every_number_of_steps_is_that_many_different_ones_up_to_the_last(spacing):
    for T in (1, 2, 7, 100):
        for num_steps in range(1, T + 1):
            steps = spaced_timesteps(T, num_steps, spacing)
            assert len(steps) == num_steps and (steps.diff() > 0).all()
            assert steps[0] >= 0 and steps[-1] == T - 1


@pytest.mark.parametrize(
    ("T", "counts"),
    [(1000, [10, 15, 20]), (300, [10, 15, 20]), (1000, [90, 60, 60, 20, 20]), (7, [3, 1, 2]), (3, [1, 1, 1])],
)
def test_a_list_is_adms_sections(T, counts):
    assert spaced_timesteps(T, counts, "linspace").tolist() == adm_steps(T, counts)


def test_sections_run_from_their_first_step_to_their_last():
    steps = spaced_timesteps(10, [2, 1, 3], "linspace").tolist()  # sections 0..3, 4..6, 7..9
    assert steps == [0, 3, 4, 7, 8, 9]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_a_list_of_one_is_its_number(spacing):
    for num_steps in (1, 50):
        steps = spaced_timesteps(1000, num_steps, spacing)
        assert torch.equal(spaced_timesteps(1000, [num_steps], spacing), steps)
    assert spaced_timesteps(1000, [1], spacing).tolist() == [999]  # one step starts from pure noise too


def test_respacing_keeps_alphas_cumprod_and_timesteps():
    schedule = linear_schedule()
    steps = spaced_timesteps(1000, 10, "linspace")
    short = respace(schedule, steps)
    assert steps.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert torch.equal(short.timesteps, steps) and isinstance(short, Schedule)
    assert torch.equal(short.alphas_cumprod, schedule.alphas_cumprod[steps])
    assert torch.allclose(torch.cumprod(1 - short.betas, 0), schedule.alphas_cumprod[steps])
    assert torch.equal(respace(schedule, spaced_timesteps(1000, 1000, "linspace")).betas, schedule.betas)
