"""Guidance on networks whose answers are known: what is extrapolated, where, and what is called how often."""

import pytest
import torch

from diffussm.diffusion.guidance import Autoguidance, Classifier, ClassifierFree, log_probability_gradient
from diffussm.diffusion.process import predictor
from diffussm.diffusion.samplers import ddim, ddpm, shifted
from diffussm.diffusion.schedule import linear_schedule

SCHEDULE = linear_schedule()
NULL = 7


class Labelled:
    """eps = label + offset in all three channels, variance output = 10 * label; remembers its batch sizes."""

    num_classes, null_label = 7, NULL

    def __init__(self, offset=0.0):
        self.offset, self.batches = offset, []

    def __call__(self, x_t, t, y):
        self.batches.append(len(x_t))
        value = y.to(x_t.dtype).view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([value + self.offset, 10 * value], dim=1)


def no_companion(path, weights):
    raise AssertionError("nothing else to load")


def outputs(guidance, network, load=no_companion, t=500):
    """What the guided network says of two samples labelled 2 and 3: (eps, variance output)."""
    predict, num_classes = guidance(network, lambda n: predictor(n, SCHEDULE), load)
    assert num_classes == 7
    x_t = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    prediction = predict(x_t, torch.full((2,), t), torch.tensor([2, 3]))
    return prediction.eps, prediction.variance_output


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance_extrapolates_all_channels_and_keeps_the_conditional_variance(scale):
    network = Labelled()
    eps, variance_output = outputs(ClassifierFree(scale), network)
    for i, label in enumerate((2, 3)):
        assert torch.allclose(eps[i], torch.tensor(NULL + scale * (label - NULL)).double())
        assert torch.allclose(variance_output[i], torch.tensor(10.0 * label).double())
    assert network.batches == [2 if scale == 1 else 4]  # both halves in one batch


def test_scale_zero_is_the_unconditional_model_with_its_variance_alone():
    network = Labelled()
    eps, variance_output = outputs(ClassifierFree(0.0), network)
    assert (eps == NULL).all() and (variance_output == 10.0 * NULL).all()
    assert network.batches == [2]


def test_guidance_of_some_channels_leaves_the_others_conditional():
    eps, _ = outputs(ClassifierFree(3.0, channels=2), Labelled())
    for i, label in enumerate((2, 3)):
        assert torch.allclose(eps[i, :2], torch.tensor(NULL + 3.0 * (label - NULL)).double())
        assert torch.allclose(eps[i, 2:], torch.tensor(float(label)).double())


@pytest.mark.parametrize(("t", "is_guided"), [(199, False), (200, True), (800, True), (801, False)])
def test_outside_its_interval_the_model_is_conditional_and_called_once(t, is_guided):
    network = Labelled()
    eps, _ = outputs(ClassifierFree(3.0, interval=[200, 800]), network, t=t)
    assert eps[0, 0, 0, 0] == (NULL + 3.0 * (2 - NULL) if is_guided else 2)
    assert network.batches == [4 if is_guided else 2]


def test_an_interval_decides_sample_by_sample():
    predict, _ = ClassifierFree(3.0, interval=[200, 800])(
        Labelled(), lambda n: predictor(n, SCHEDULE), no_companion
    )
    x_t = torch.zeros(2, 3, 2, 2)
    eps = predict(x_t, torch.tensor([100, 500]), torch.tensor([2, 2])).eps
    assert eps[0].unique().tolist() == [2.0] and eps[1].unique().tolist() == [NULL + 3.0 * (2 - NULL)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_autoguidance_moves_away_from_the_weaker_model(scale):
    eps, variance_output = outputs(Autoguidance("weak", scale), Labelled(), lambda path, weights: Labelled(0.5))
    assert torch.allclose(eps[0], torch.tensor(2.5 + scale * (2 - 2.5)).double())
    assert torch.allclose(variance_output[0], torch.tensor(20.0).double())


class Linear:
    """log p(y | x_t) proportional to y times the sum of x_t: its gradient is known."""

    num_classes = 7

    def __call__(self, x, t):
        return x.flatten(1).sum(1, keepdim=True) * torch.arange(7, dtype=x.dtype)


class Unlabelled(Labelled):
    num_classes = null_label = None

    def __call__(self, x_t, t, y):
        assert y is None
        return torch.cat([0.1 * x_t, torch.zeros_like(x_t)], dim=1)


def expected_gradient(x, y):
    """grad log softmax(k s)_y = y - E[k], where s is the sum of x."""
    p = torch.softmax(x.flatten(1).sum(1, keepdim=True) * torch.arange(7).double(), dim=1)
    return (y - p @ torch.arange(7).double()).view(-1, 1, 1, 1).expand_as(x)


def test_the_classifiers_gradient_is_that_of_the_log_probability():
    x = 0.1 * torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 5, 6])
    with torch.no_grad():  # as samplers are
        gradient = log_probability_gradient(Linear(), x, torch.zeros(4), y)
    assert torch.allclose(gradient, expected_gradient(x, y))


def guided_by_classifier(scale=2.0):
    return Classifier("c", scale)(Unlabelled(), lambda n: predictor(n, SCHEDULE), lambda path, weights: Linear())


def test_ddpm_shifts_its_mean_by_the_variance_times_the_gradient():
    predict, num_classes = guided_by_classifier()
    plain = predictor(Unlabelled(), SCHEDULE)
    x, y = 0.1 * torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.tensor([1, 6])
    zero = lambda: torch.zeros_like(x)  # noqa: E731
    assert num_classes == 7
    step = lambda p, y: ddpm(p, SCHEDULE, x, y, zero, num_steps=1, variance="beta")  # noqa: E731
    sigma_squared = 1 - SCHEDULE.alphas_cumprod[-1]  # of the one step from T to the data
    assert torch.allclose(step(predict, y) - step(plain, None), 2.0 * sigma_squared * expected_gradient(x, y))


def test_ddim_shifts_eps_by_the_gradient():
    predict, _ = guided_by_classifier()
    x, y = 0.1 * torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.tensor([1, 6])
    x_0 = ddim(predict, SCHEDULE, x, y, lambda: x, num_steps=1)
    alpha = SCHEDULE.alphas_cumprod[-1]
    eps = 0.1 * x - (1 - alpha).sqrt() * 2.0 * expected_gradient(x, y)
    assert torch.allclose(x_0, (x - (1 - alpha).sqrt() * eps) / alpha.sqrt())
    t = torch.full((2,), len(SCHEDULE) - 1)
    prediction = shifted(SCHEDULE, predict(x, t, y), t)
    assert torch.allclose(prediction.eps, eps) and torch.allclose(prediction.x_0, x_0)
    assert prediction.gradient is None  # it is not applied twice


class NoNull(Labelled):
    null_label = None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassifierFree(-1.0), "scale=-1.0"),
        (lambda: ClassifierFree(2.0, channels=0), "channels=0"),
        (lambda: ClassifierFree(2.0, interval=[5]), "interval="),
        (lambda: ClassifierFree(2.0, interval=[5, 1]), "interval="),
        (lambda: outputs(ClassifierFree(2.0, channels=4), Labelled()), "channels=4: the latents have 3"),
        (lambda: outputs(ClassifierFree(2.0), NoNull()), "scale=2.0: needs a conditional model"),
        (
            lambda: outputs(Autoguidance("weak"), Labelled(), lambda p, w: Unlabelled()),
            "checkpoint=weak: knows None",
        ),
    ],
)
def test_guidance_that_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
