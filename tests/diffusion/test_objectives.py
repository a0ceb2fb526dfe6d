"""Every objective is its formula, in values and in gradients, for all three predictions."""

import math

import pytest
import torch

from diffussm.diffusion.guidance import Classifier
from diffussm.diffusion.loss import DDPMObjective, variational_bound_term
from diffussm.diffusion.objective import Draws, Objective
from diffussm.diffusion.process import Gaussian, eps_from_x_0, v_from_x_0_and_eps, x_0_and_eps_from_v
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import cosine_schedule, linear_schedule

SCHEDULE = linear_schedule()
SNR_0 = cosine_schedule(zero_terminal_snr=True)
PREDICTIONS = ["eps", "x_0", "v"]
BATCH = 6
T = torch.tensor([0, 1, 10, 300, 700, 999])


def inputs(weight=None):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(BATCH, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.ones(BATCH) if weight is None else weight
    return x_0.clamp(-1, 1), Draws(T, torch.zeros(BATCH), weight), noise


def coefficients(schedule, t):
    alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


class Network(torch.nn.Module):
    """tanh of an affine map of x_t and t, element by element, and an affine variance output if asked for."""

    def __init__(self, learned=False):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([0.7, 0.2, -0.1], dtype=torch.float64))
        self.variance = torch.nn.Parameter(torch.tensor([0.1, 0.3], dtype=torch.float64)) if learned else None

    def forward(self, x_t, t, y=None, drop_uniform=None):
        a, b, c = self.value
        time = t.double().view(-1, 1, 1, 1) / 1000
        value = torch.tanh(a * x_t + b + c * time)
        if self.variance is None:
            return value
        return torch.cat([value, self.variance[0] * x_t.tanh() + self.variance[1]], dim=1)


def target(prediction, schedule, x_0, t, noise):
    a, s = coefficients(schedule, t)
    return {"eps": noise, "x_0": x_0, "v": a * noise - s * x_0}[prediction]


def gradients(loss, network):
    """Of every parameter, zero where it was not reached."""
    found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(network.parameters(), found, strict=True)]


def assert_same(ours, expected, network):
    assert torch.allclose(ours, expected, rtol=1e-9, atol=0)
    for mine, theirs in zip(gradients(ours.sum(), network), gradients(expected.sum(), network), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_squared_error_of_the_prediction(prediction):
    x_0, draws, noise = inputs()
    network = Network()
    terms = DDPMObjective(SCHEDULE, "simple", prediction)(network, x_0, None, draws, noise)
    a, s = coefficients(SCHEDULE, T)
    output = network(a * x_0 + s * noise, T)
    expected = (target(prediction, SCHEDULE, x_0, T, noise) - output).square().mean((1, 2, 3))
    assert_same(terms["loss"], expected, network)
    assert set(terms) == {"loss", "mse"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_one_weighting_of_the_error_of_x_0(prediction):
    """min(SNR, gamma) |x_0 - x_0'|^2, whatever is predicted."""
    gamma = 5.0
    x_0, draws, noise = inputs()
    network = Network()
    terms = DDPMObjective(SCHEDULE, "simple", prediction, min_snr_gamma=gamma)(network, x_0, None, draws, noise)
    a, s = coefficients(SCHEDULE, T)
    x_t = a * x_0 + s * noise
    output = network(x_t, T)
    predicted = {"eps": (x_t - s * output) / a, "x_0": output, "v": a * x_t - s * output}[prediction]
    weight = (a / s).square().flatten().clamp(max=gamma)
    expected = weight * (x_0 - predicted).square().mean((1, 2, 3))
    assert torch.allclose(terms["loss"], expected, rtol=1e-6)
    for mine, theirs in zip(
        gradients(terms["loss"].sum(), network), gradients(expected.sum(), network), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-6)


def bound_term(prediction, schedule, x_0, draws, noise, network, fixed_variance, detach):
    """L_t in bits, written out from DDPM eq. 5 to 7 and 13 and iDDPM eq. 15; without t = 0."""
    t = draws.t
    a, s = coefficients(schedule, t)
    x_t = a * x_0 + s * noise
    output = network(x_t, t)
    value, v = output.chunk(2, dim=1) if network.variance is not None else (output, None)
    value = value.detach() if detach else value
    predicted = {"eps": (x_t - s * value) / a, "x_0": value, "v": a * x_t - s * value}[prediction]
    previous = schedule.alphas_cumprod[t - 1].view(-1, 1, 1, 1)
    beta = 1 - a**2 / previous
    tilde = beta * (1 - previous) / s**2
    if v is None:
        variance = {"beta": beta, "beta_tilde": tilde}[fixed_variance].expand_as(x_t)
    else:
        variance = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log())
    means = [
        previous.sqrt() * beta / s**2 * x + (1 - beta).sqrt() * (1 - previous) / s**2 * x_t
        for x in (x_0, predicted)
    ]
    p, q = (
        torch.distributions.Normal(mean, variance.sqrt())
        for mean, variance in zip(means, (tilde.expand_as(x_t), variance), strict=True)
    )
    return torch.distributions.kl_divergence(p, q).mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned", "beta", "beta_tilde"])
def test_vlb_is_T_times_the_term_with_gradients_into_mean_and_variance(prediction, variance):
    x_0, draws, noise = inputs()
    x_0, draws, noise = x_0[1:], draws[1:], noise[1:]
    network = Network(variance == "learned")
    options = {} if variance == "learned" else {"fixed_variance": variance}
    terms = DDPMObjective(SCHEDULE, "vlb", prediction, **options)(network, x_0, None, draws, noise)
    expected = bound_term(prediction, SCHEDULE, x_0, draws, noise, network, variance, detach=False)
    assert_same(terms["vb"], expected, network)
    assert_same(terms["loss"], 1000 * expected, network)
    assert all(gradient.abs().min() > 0 for gradient in gradients(terms["loss"].sum(), network))


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_decoder_trains_what_the_other_terms_train(prediction, loss):
    """At t = 0, where L_0 is a likelihood."""
    x_0, draws, noise = inputs()
    network = Network(learned=True)
    terms = DDPMObjective(SCHEDULE, loss, prediction)(network, x_0[:1], None, draws[:1], noise[:1])
    of_value, of_variance = gradients(terms["vb"].sum(), network)
    assert of_variance.abs().min() > 0
    assert of_value.abs().max() > 0 if loss == "vlb" else of_value.abs().max() == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_adds_the_bound_whose_gradient_reaches_the_variance_only(prediction):
    x_0, draws, noise = inputs()
    x_0, draws, noise = x_0[1:], draws[1:], noise[1:]
    network = Network(learned=True)
    objective = DDPMObjective(SCHEDULE, "hybrid", prediction, vb_weight=0.3, min_snr_gamma=5.0)
    terms = objective(network, x_0, None, draws, noise)
    simple = DDPMObjective(SCHEDULE, "hybrid", prediction, vb_weight=0.0, min_snr_gamma=5.0)
    bound = bound_term(prediction, SCHEDULE, x_0, draws, noise, network, None, detach=True)
    assert_same(terms["vb"], bound, network)
    assert_same(terms["loss"], simple(network, x_0, None, draws, noise)["loss"] + 0.3 * bound, network)
    of_value, of_variance = gradients(terms["vb"].sum(), network)
    assert of_value.abs().max() == 0 and of_variance.abs().min() > 0
    of_value, of_variance = gradients(terms["mse"].sum(), network)
    assert of_value.abs().min() > 0 and of_variance.abs().max() == 0


def test_the_bound_at_the_first_timestep_is_the_likelihood_of_the_bin():
    x_0 = torch.full((1, 1, 1, 1), 17 / 127.5 - 1, dtype=torch.float64)
    p = Gaussian(x_0 + 0.004, torch.full_like(x_0, 2 * math.log(0.01)))
    term = variational_bound_term(SCHEDULE, x_0, x_0, torch.tensor([0]), p)
    z = [(-0.004 + side / 255) / 0.01 for side in (-1, 1)]
    mass = (math.erf(z[1] / math.sqrt(2)) - math.erf(z[0] / math.sqrt(2))) / 2
    assert float(term) == pytest.approx(-math.log2(mass), rel=1e-9)


@pytest.mark.parametrize("loss", ["simple", "hybrid", "vlb"])
def test_the_weight_of_a_draw_scales_its_terms(loss):
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 0.25])
    network = Network(learned=loss != "simple")
    objective = DDPMObjective(SCHEDULE, loss)
    x_0, draws, noise = inputs()
    plain = objective(network, x_0, None, draws, noise)
    weighted = objective(network, x_0, None, inputs(weight)[1], noise)
    for name in plain:
        assert torch.allclose(weighted[name], weight * plain[name], rtol=1e-6)


@pytest.mark.parametrize("schedule", [SCHEDULE, SNR_0], ids=["linear", "zero terminal"])
def test_v_and_x_0_and_eps_invert_each_other(schedule):
    x_0, _, noise = inputs()
    a, s = coefficients(schedule, T)
    x_t = a * x_0 + s * noise
    v = v_from_x_0_and_eps(schedule, x_0, T, noise)
    assert torch.allclose(v, a * noise - s * x_0)
    back, eps = x_0_and_eps_from_v(schedule, x_t, T, v)
    assert torch.allclose(back, x_0) and torch.allclose(eps, noise)
    assert torch.allclose(eps_from_x_0(schedule, x_t, T, x_0), noise, atol=1e-9)


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_zero_terminal_snr_trains_finitely(prediction, loss):
    x_0, draws, noise = inputs()
    network = Network(learned=True)
    terms = DDPMObjective(SNR_0, loss, prediction)(network, x_0, None, draws, noise)
    assert all(term.isfinite().all() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(terms["loss"].sum(), network))


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddpm, {"variance": "learned"}),
        (ddpm, {"variance": "beta"}),
        (ddpm, {"variance": "beta_tilde"}),
        (ddim, {"eta": 0.0}),
        (ddim, {"eta": 1.0}),
    ],
)
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_zero_terminal_snr_samples_finitely_what_the_network_is_certain_of(prediction, sampler, options):
    """The network knows x_0 = 0.3 whatever it sees, so that is what must come out, from pure noise."""

    def certain(x_t, t, y=None):
        a, s = coefficients(SNR_0, t)
        x_0 = torch.full_like(x_t, 0.3)
        value = x_0 if prediction == "x_0" else a * (x_t - a * x_0) / s - s * x_0
        return torch.cat([value, torch.zeros_like(x_t)], dim=1)

    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    predict = DDPMObjective(SNR_0, "hybrid", prediction).predictor(certain)
    x_0 = sampler(predict, SNR_0, noise(), None, noise, num_steps=50, **options)
    assert torch.allclose(x_0, torch.full_like(x_0, 0.3), atol=1e-9)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_a_classifier_guides_finitely_from_zero_terminal_snr(sampler):
    class Network:
        num_classes = None

        def __call__(self, x_t, t, y):
            return torch.cat([-0.5 * x_t, torch.zeros_like(x_t)], dim=1)

    def classifier(x, t):
        return x.flatten(1).sum(1, keepdim=True) * torch.arange(3, dtype=x.dtype)

    classifier.num_classes = 3
    predictor_of = DDPMObjective(SNR_0, prediction="v").predictor
    predict = Classifier("c", 2.0)(Network(), predictor_of, lambda path, weights: classifier).predict
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(2, 1, 2, 2, generator=generator)  # noqa: E731
    x_0 = sampler(predict, SNR_0, noise(), torch.tensor([0, 2]), noise, num_steps=20)
    assert x_0.isfinite().all() and x_0[1].mean() > x_0[0].mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDPMObjective(SCHEDULE, "simple").check_network(True), "loss=simple: .*learn_sigma=false"),
        (lambda: DDPMObjective(SNR_0, prediction="eps"), "prediction=eps: .*choose v or x_0"),
        (lambda: DDPMObjective(SCHEDULE, "vlb", min_snr_gamma=5.0), "min_snr_gamma: .*set it to null"),
        (lambda: DDPMObjective(SCHEDULE, min_snr_gamma=0.0), r"min_snr_gamma=0\.0: must be positive"),
        (
            lambda: DDPMObjective(SCHEDULE, min_snr_gamma=math.inf),
            "min_snr_gamma=inf: must be positive and finite",
        ),
        (lambda: DDPMObjective(SNR_0, prediction="v", min_snr_gamma=5.0), r"min_snr_gamma=5\.0: .*never trained"),
        (lambda: DDPMObjective(SCHEDULE, vb_weight=math.nan), "vb_weight=nan: must be finite"),
        (lambda: Objective().predictor(Network()), "trains no generative model"),
    ],
)
def test_objectives_that_cannot_work_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_every_network_that_has_what_its_loss_trains_is_accepted(loss):
    DDPMObjective(SCHEDULE, loss).check_network(True)
    DDPMObjective(SCHEDULE, loss).check_network(False)
    DDPMObjective(SCHEDULE, "simple").check_network(False)
