"""S4D against the state recurrence, step by step in complex float64: values and every gradient."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from diffussm.models import S4D, convolution, ssm
from diffussm.models.ssm import initial_A_imag
from diffussm.training.ema import ModelAverages

GRADIENT_NAMES = ("log_dt", "log_A_real", "A_imag", "B", "C", "D")


def recurrence(layer: S4D, u: Tensor) -> Tensor:
    """x_l = Abar x_{l-1} + Bbar u_l, y_l = 2 Re(C x_l) + D u_l, and the same from the end, as written."""
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    B = torch.view_as_complex(layer.B) if layer.B is not None else torch.ones_like(A)
    C = torch.view_as_complex(layer.C)
    dt = layer.log_dt.exp()[:, None]
    if layer.discretization == "zoh":
        Abar = (dt * A).exp()
        Bbar = (Abar - 1) / A * B
    else:
        Abar = (1 + dt * A / 2) / (1 - dt * A / 2)
        Bbar = dt / (1 - dt * A / 2) * B
    outputs = []
    d_model = u.shape[-1]
    for direction in range(2 if layer.bidirectional else 1):
        part = slice(direction * d_model, (direction + 1) * d_model)
        v = u if direction == 0 else u.flip(1)
        x = torch.zeros(u.shape[0], d_model, A.shape[1], dtype=A.dtype)
        steps = []
        for position in range(u.shape[1]):
            x = Abar[part] * x + Bbar[part] * v[:, position, :, None]
            steps.append(2 * (C[part] * x).sum(-1).real + layer.D[part] * v[:, position])
        y = torch.stack(steps, dim=1)
        outputs.append(y if direction == 0 else y.flip(1))
    return torch.cat(outputs, dim=-1)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


def perturbed(**options: object) -> S4D:
    """A layer whose every parameter is away from its initial value."""
    layer = S4D(3, d_state=8, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("learn_B", [True, False])
def test_equals_the_recurrence_in_values_and_gradients(discretization, init, bidirectional, learn_B):
    torch.manual_seed(0)
    layer = perturbed(discretization=discretization, init=init, bidirectional=bidirectional, learn_B=learn_B)
    exact = perturbed(
        discretization=discretization, init=init, bidirectional=bidirectional, learn_B=learn_B
    ).double()
    exact.load_state_dict(layer.state_dict())
    u = torch.randn(2, 37, 3, requires_grad=True)
    u_exact = u.detach().double().requires_grad_()
    y, expected = layer(u), recurrence(exact, u_exact)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (y * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    assert y.shape == (2, 37, 6 if bidirectional else 3)
    assert relative_error(y, expected) < 1e-5
    assert relative_error(u.grad, u_exact.grad) < 1e-4
    for name in GRADIENT_NAMES:
        if getattr(layer, name) is not None:
            assert relative_error(getattr(layer, name).grad, getattr(exact, name).grad) < 1e-4, name


@pytest.mark.parametrize("length", [1, 2, 3, 64, 1000, 1024, 4096, 16384])
def test_is_exact_at_any_length_in_values_and_gradients(length):
    torch.manual_seed(length)
    layer = S4D(1, d_state=64)
    exact = S4D(1).double()
    exact.load_state_dict(layer.state_dict())
    u = torch.randn(1, length, 1, requires_grad=True)
    u_exact = u.detach().double().requires_grad_()
    y, expected = layer(u), recurrence(exact, u_exact)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (y * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(y, expected) < 1e-5
    assert relative_error(u.grad, u_exact.grad) < 1e-4
    for name in GRADIENT_NAMES:
        mine, theirs = getattr(layer, name).grad, getattr(exact, name).grad
        assert relative_error(mine, theirs) < 1e-4, name


@pytest.mark.parametrize("bidirectional", [True, False])
def test_its_own_recurrence_and_steps_equal_the_convolution(bidirectional):
    torch.manual_seed(0)
    layer = perturbed(bidirectional=bidirectional)
    u = torch.randn(2, 40, 3)
    with torch.no_grad():
        y = layer(u)
        assert relative_error(layer.recurrence(u), y) < 1e-5
        state = layer.initial_state(2)
        for position in range(40):
            y_l, state = layer.step(state, u[:, position])
            assert torch.allclose(y_l, y[:, position, :3], atol=1e-4)
    if not bidirectional:
        with pytest.raises(ValueError, match="unidirectional"):
            layer.step(state, u[:, 0], "backward")


def test_channel_major_layout_is_the_same_map():
    torch.manual_seed(0)
    layer, u = S4D(3), torch.randn(2, 20, 3)
    assert torch.equal(layer.convolve(u.transpose(1, 2).contiguous()).transpose(1, 2), layer(u))


def test_float64_agrees_to_rounding():
    torch.manual_seed(0)
    layer = S4D(2, d_state=4).double()
    u = torch.randn(1, 50, 2, dtype=torch.float64)
    assert relative_error(layer(u), recurrence(layer, u)) < 1e-12


def test_forward_is_causal_and_backward_anticausal_and_both_see_their_own_position():
    torch.manual_seed(0)
    layer = S4D(2).double()
    u = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
    y = layer(u)
    position = 4
    forward, backward = (
        torch.autograd.grad(y[0, position, half].sum(), u, retain_graph=True)[0]
        for half in (slice(0, 2), slice(2, 4))
    )
    seen_forward = forward[0].abs().sum(-1) > 1e-9
    seen_backward = backward[0].abs().sum(-1) > 1e-9
    assert seen_forward.tolist() == [True] * 5 + [False] * 4
    assert seen_backward.tolist() == [False] * 4 + [True] * 5


def test_is_stable_whatever_the_parameters_become():
    torch.manual_seed(0)
    layer = S4D(2, d_state=4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=3)
    for discretization in ("zoh", "bilinear"):
        layer.discretization = discretization
        assert (layer.discretize().log_modulus <= 0).all()
        assert layer(torch.randn(1, 500, 2)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_kernel_and_convolution_in_fp32(dtype):
    torch.manual_seed(0)
    layer = S4D(4)
    u = torch.randn(2, 100, 4)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(u)
        assert layer(u.to(dtype)).dtype == dtype
    assert torch.equal(y, layer(u))


def frozen(layer: S4D) -> S4D:
    return layer.requires_grad_(False).eval()


def test_a_frozen_layer_makes_its_spectra_once_and_gives_the_same_result(monkeypatch):
    torch.manual_seed(0)
    layer, u = S4D(3), torch.randn(2, 20, 3)
    made = []
    make = ssm.make_spectra
    monkeypatch.setattr(ssm, "make_spectra", lambda *arguments: made.append(1) or make(*arguments))
    expected = layer(u).detach()
    frozen(layer)
    with torch.no_grad():
        assert torch.allclose(layer(u), expected, atol=1e-6) and torch.equal(layer(u), layer(u))
        assert len(made) == 1
        layer(u[:, :10])
        layer.forget_spectra()
        assert layer._spectra is None
    layer.train()
    assert torch.equal(layer(u), expected) and len(made) == 2


def test_frozen_spectra_do_not_survive_a_change_of_mode_an_address_or_a_copy():
    torch.manual_seed(0)
    layer, u = frozen(S4D(3)), torch.randn(2, 20, 3)
    with torch.no_grad():
        for _ in range(20):  # the allocator likes to hand out the address that was just freed
            layer(u)
            C = layer.C + 1
            del layer.C
            layer.C = torch.nn.Parameter(C.clone(), requires_grad=False)
            del C
            assert torch.allclose(layer(u), layer.recurrence(u), atol=1e-3)
        assert layer._spectra is not None and copy.deepcopy(layer)._spectra is None
        assert pickle.loads(pickle.dumps(layer))._spectra is None
    torch.nn.Sequential(layer).train()  # compiled training leaves no trace in the parameters
    assert layer._spectra is None


def test_layers_made_in_inference_mode_work_and_follow_their_parameters():
    torch.manual_seed(0)
    with torch.inference_mode():
        layer, u = frozen(S4D(3)), torch.randn(2, 20, 3)
        layer(u)
        layer.C.mul_(2)
        assert torch.allclose(layer(u), layer.recurrence(u), atol=1e-4)


def test_refuses_an_empty_sequence_and_no_channels():
    with pytest.raises(ValueError, match="d_model=0"):
        S4D(0)
    with pytest.raises(ValueError, match="nothing to convolve"):
        S4D(3)(torch.zeros(2, 0, 3))


@pytest.mark.parametrize("change", ["in place", "optimizer", "load", "double", "replace", "data", "ema"])
def test_frozen_spectra_follow_every_change_of_the_parameters(change):
    torch.manual_seed(0)
    layer, other, u = S4D(3), S4D(3), torch.randn(2, 20, 3)
    frozen(layer)
    with torch.no_grad():
        layer(u)
        if change == "in place":
            layer.C.mul_(2)
        elif change == "load":
            layer.load_state_dict(other.state_dict())
        elif change == "double":
            layer.double()
        elif change == "replace":
            layer.D = torch.nn.Parameter(layer.D + 1, requires_grad=False)
        elif change == "data":
            layer.D.data = layer.D + 1
    if change == "ema":
        average = ModelAverages(layer, [0.5])
        layer = average.first
        average.update(layer)
        with torch.no_grad():
            layer(u)
        average.update(other)
    if change == "optimizer":
        layer.requires_grad_(True)
        layer(u).square().sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
        frozen(layer)
    with torch.no_grad():
        assert torch.allclose(layer(u), layer.recurrence(u), atol=1e-4)


def test_saves_nothing_but_its_inputs_for_the_backward_pass():
    layer = S4D(16, d_state=8)
    u = torch.randn(4, 512, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(u)
    assert max(sizes) == u.numel() and sum(sizes) < 1.2 * u.numel()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_portions_of_channels_do_not_change_the_result(monkeypatch, bidirectional):
    torch.manual_seed(0)
    results = []
    layer, u = S4D(7, bidirectional=bidirectional), torch.randn(2, 33, 7, requires_grad=True)
    for budget in (1 << 30, 3 * 2 * 72 * 4):
        monkeypatch.setattr(convolution, "CPU_PORTION", budget)
        monkeypatch.setattr(convolution, "LEAST_PORTION", 1)
        y = layer(u)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])])
    for whole, in_portions in zip(*results, strict=True):
        assert relative_error(in_portions, whole) < 1e-5


def test_transforms_are_long_enough_cheap_and_minimal():
    for length in (1, 2, 3, 7, 64, 1000, 1021, 4096):
        n = convolution.padded_length(length)
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1 and n % 2 == 0 and 2 * length - 1 <= n <= max(2, 2.3 * length)
    assert convolution.padded_length(1024) == 2048 and convolution.padded_length(1021) == 2048


def test_the_operator_keeps_the_rules_of_torch_library():
    torch.manual_seed(0)
    layer = S4D(2, d_state=4)
    u = torch.randn(2, 2, 12, requires_grad=True)
    inputs = (u, *(part.detach().requires_grad_() for part in layer.discretize()))
    torch.library.opcheck(convolution.s4d_convolution, inputs)
    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(convolution.s4d_convolution, double)


def allow_rounded_products(way: str) -> None:
    if way == "legacy":
        torch.set_float32_matmul_precision("medium")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("way", ["legacy", "per backend"])
def test_kernels_are_made_in_full_precision_whatever_the_process_allows(monkeypatch, way):
    is_new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if way == "per backend" and not is_new:
        pytest.skip("torch 2.9")

    def precision() -> object:
        if is_new:
            return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        return torch.get_float32_matmul_precision()

    torch.manual_seed(0)
    layer, u = S4D(4), torch.randn(2, 100, 4, requires_grad=True)
    seen = []
    product, at_start = torch.bmm, precision()

    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append((precision(), torch.is_autocast_enabled("cpu")))
        return product(a, b)

    monkeypatch.setattr(torch, "bmm", spy)
    allow_rounded_products(way)
    allowed = precision()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(u)
            layer.kernel(10)
        y.sum().backward()
        with torch.no_grad():
            frozen(layer)(u)
        assert precision() == allowed
    finally:
        if is_new:
            torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = at_start
        if way == "legacy":
            torch.set_float32_matmul_precision("highest")
    exact = ("ieee", "ieee") if is_new else "highest"
    assert len(seen) >= 8 and set(seen) == {(exact, False)}


def test_initial_states_are_the_published_ones():
    n = torch.arange(4)
    assert torch.allclose(initial_A_imag("lin", 8), math.pi * n)
    assert torch.allclose(initial_A_imag("inv", 8), 8 / math.pi * (8 / (2 * n + 1) - 1))
    # HiPPO-LegS itself, from its definition: A + P P^T is normal and has the eigenvalues -1/2 +- i w.
    k = torch.arange(8, dtype=torch.float64)
    root = (2 * k + 1).sqrt()
    hippo = -torch.tril(torch.outer(root, root), -1) - torch.diag(k + 1)
    normal = hippo + torch.outer((k + 0.5).sqrt(), (k + 0.5).sqrt())
    eigenvalues = torch.linalg.eigvals(normal)
    assert torch.allclose(eigenvalues.real, torch.full((8,), -0.5, dtype=torch.float64), atol=1e-9)
    positive = eigenvalues.imag[eigenvalues.imag > 0].sort().values
    assert torch.allclose(initial_A_imag("legs", 8).double(), positive, atol=1e-5)


def test_steps_start_within_their_range_and_A_at_one_half():
    layer = S4D(256, dt_min=0.01, dt_max=0.5)
    dt = layer.log_dt.exp()
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.5 * 1.001
    assert dt.median().item() == pytest.approx(math.sqrt(0.01 * 0.5), rel=0.3)
    assert torch.allclose(-layer.log_A_real.exp(), torch.tensor(-0.5))


def test_parameters_declare_their_optimiser_role():
    roles = {name: parameter.role for name, parameter in S4D(2).named_parameters()}
    assert roles == {
        "log_dt": "ssm", "log_A_real": "ssm", "A_imag": "ssm", "B": "ssm", "C": "no_decay", "D": "no_decay",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"d_state": 7}, "d_state=7"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
        ({"init": "hippo"}, "hippo"),
        ({"discretization": "euler"}, "euler"),
    ],
)
def test_refuses_bad_options_by_name(options, key):
    with pytest.raises(Exception, match=key):  # beartype may be the first to refuse a Literal
        S4D(4, **options)
