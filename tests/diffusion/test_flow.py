"""Rectified flow: its path, its times, its loss, and how samplers see its network."""

import math

import pytest
import torch
from scipy import stats

from diffussm.diffusion.flow import FlowObjective, StraightPath, flow_euler, flow_heun
from diffussm.diffusion.objective import Draws
from diffussm.diffusion.process import Prediction

TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)


def draw(t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = (torch.randn(len(t), 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x_0, Draws(1000 * t, torch.zeros(len(t)), torch.ones(len(t))), noise


class Network(torch.nn.Module):
    """tanh(a x_t + b t), which remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))

    def forward(self, x_t, t, y=None, drop_uniform=None):
        self.shown = x_t, t
        return torch.tanh(self.weight[0] * x_t + self.weight[1] * t.double().view(-1, 1, 1, 1) / 1000)


def test_the_network_sees_the_straight_path_and_is_told_a_thousand_t():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x_0, draws, noise = draw(t)
    network = Network()
    FlowObjective(StraightPath())(network, x_0, None, draws, noise)
    x_t, told = network.shown
    for i, time in enumerate(t.tolist()):
        assert torch.allclose(x_t[i], (1 - time) * x_0[i] + time * noise[i])
        assert told[i] == 1000 * time
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[3], noise[3])


def test_the_loss_is_the_squared_error_of_the_velocity_with_its_gradient():
    """The velocity is the derivative of the path, taken here as a difference quotient."""
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    x_0, draws, noise = draw(t)
    network = Network()
    loss = FlowObjective(StraightPath())(network, x_0, None, draws, noise)["loss"]
    path = lambda t: (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * noise  # noqa: E731
    velocity = (path(t + 1e-6) - path(t - 1e-6)) / 2e-6
    expected = (velocity - network(path(t), 1000 * t)).square().mean((1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(value.sum(), network.weight)[0] for value in (loss, expected))
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_a_predictor_inverts_the_path():
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    x_0, _, noise = draw(t)
    time = t.view(-1, 1, 1, 1)
    x_t = (1 - time) * x_0 + time * noise
    velocity = noise - x_0
    prediction = FlowObjective(StraightPath()).predictor(lambda x, t, y: velocity)(x_t, 1000 * t, None)
    assert torch.allclose(prediction.x_0, x_0) and torch.allclose(prediction.eps, noise)
    assert prediction.variance_output is None


@pytest.mark.parametrize(("pixels", "reference"), [(4096, 1024), (256, 1024), (1024, 1024)])
def test_the_shift_is_that_of_sd3(pixels, reference):
    """t -> s t / (1 + (s - 1) t), s = sqrt(m/n): it multiplies the ratio of noise to signal by s."""
    shifted = StraightPath(reference).shift(TIMES, pixels)
    root = math.sqrt(pixels / reference)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    inner, before = shifted[1:-1], TIMES[1:-1]
    assert torch.allclose(inner / (1 - inner), root * before / (1 - before))
    assert (shifted >= TIMES).all() if root >= 1 else (shifted <= TIMES).all()


def test_without_a_reference_times_are_as_drawn():
    assert torch.equal(StraightPath().shift(TIMES, 10**6), TIMES)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6)])
def test_logit_normal_times_have_their_distribution(mean, std):
    objective = FlowObjective(StraightPath(), "logit_normal", mean, std)
    t = objective.draw((20_000, 1, 1, 1), torch.Generator().manual_seed(0)).t / 1000
    assert stats.kstest(t.double().logit().numpy(), stats.norm(mean, std).cdf).pvalue > 1e-3


def test_uniform_times_are_uniform_and_shifted_by_the_size_of_the_latents():
    for reference, size in ((None, 8), (16, 8)):
        objective = FlowObjective(StraightPath(reference), "uniform")
        draws = objective.draw((20_000, 1, size, size), torch.Generator().manual_seed(0))
        t = draws.t.double() / 1000
        root = 1 if reference is None else 2  # sqrt(64 / 16)
        unshifted = t / (root - (root - 1) * t)
        assert stats.kstest(unshifted.numpy(), stats.uniform.cdf).pvalue > 1e-3
        assert t.min() >= 0 and t.max() <= 1 and draws.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize(("sampler", "evaluations"), [(flow_euler, 5), (flow_heun, 9)])
def test_samplers_walk_the_shifted_times_down_to_the_data(sampler, evaluations):
    """A network that knows x_0 leads straight to it, from any noise, without being asked at t = 0."""
    told = []
    x_0 = torch.full((2, 1, 4, 4), 0.3, dtype=torch.float64)

    def predict(x_t, t, y):
        told.append(float(t[0]) / 1000)
        return Prediction(x_0, (x_t - (1 - told[-1]) * x_0) / told[-1])

    x_T = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = lambda: pytest.fail("deterministic")  # noqa: E731
    x = sampler(predict, StraightPath(4), x_T, None, noise, num_steps=5)
    assert torch.allclose(x, x_0, atol=1e-6)
    even = [1 - i / 5 for i in range(5)]
    assert sorted(set(told), reverse=True) == pytest.approx([2 * t / (1 + t) for t in even], rel=1e-6)
    assert len(told) == evaluations


@pytest.mark.parametrize("sampler", [flow_euler, flow_heun])
def test_clipping_bounds_x_0_and_leaves_what_is_within(sampler):
    x_T = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = lambda: pytest.fail("deterministic")  # noqa: E731
    found = {}
    for certain in (0.5, 3.0):
        x_0 = torch.full_like(x_T, certain)

        def predict(x_t, t, y, x_0=x_0):
            time = float(t[0]) / 1000
            return Prediction(x_0, (x_t - (1 - time) * x_0) / time)

        for clip in (False, True):
            x = sampler(predict, StraightPath(), x_T, None, noise, num_steps=4, clip_x_0=clip)
            found[certain, clip] = x.mean().item()
    assert found == pytest.approx({(0.5, False): 0.5, (0.5, True): 0.5, (3.0, False): 3.0, (3.0, True): 1.0})


def guided(x_t, t, y):
    return Prediction(x_t, x_t, gradient=x_t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StraightPath(0), "reference_pixels=0: must be at least 1"),
        (lambda: FlowObjective(StraightPath(), std=0.0), r"std=0\.0: must be positive"),
        (lambda: FlowObjective(StraightPath(), mean=math.nan), "mean=nan"),
        (lambda: FlowObjective(StraightPath()).check_network(True), "set model.learn_sigma=false"),
        (lambda: sample(num_steps=0), "num_steps=0: must be at least 1"),
        (lambda: sample(num_steps=2), "choose classifier_free"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def sample(num_steps):
    one = torch.ones(1, 1, 1, 1)
    return flow_heun(guided, StraightPath(), one, None, lambda: one, num_steps=num_steps)
