"""The cost model against formulas written from the equations, the paper's table and a run on real tensors."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffussm.build import create_model
from diffussm.models import DiffuSSM
from diffussm.models.complexity import Complexity, measure_complexity, s4d_flops

SMALL = {"hidden_size": 24, "depth": 3, "d_state": 8, "num_classes": 7}


def measure(name: str, side: int, **overrides) -> Complexity:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    return measure_complexity(model, (model.in_channels, side, side))


def embedding_macs(D: int) -> int:
    """Timestep: 256 -> D -> D. Labels are looked up."""
    return 256 * D + D * D


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("side", [4, 8])
def test_diffussm_macs_are_those_of_its_equations(M, side):
    D, N, L = 24, 3, side * side
    model = DiffuSSM(in_channels=4, hourglass_ratio=M, **SMALL)
    core = (
        L * D * D // M  # Wx_k: D -> D/M at every token
        + L // M * D * D  # W0
        + L // M * D * M * D  # W^up: D -> MD
        + L * 2 * D * 2 * D // M  # W_k^down: 2D -> 2D/M at every token
        + L // M * (2 * D * D + D * D + D * D)  # W2, W1, W3
        + L // M * D * M * D  # W^out: D -> MD
    )
    if M == 2:
        assert core == (10 + 2 * M) * D * D * L // 2
    expected = N * (core + 3 * D * D) + embedding_macs(D) + L * 4 * D + 2 * D * D + L * D * 8
    assert measure_complexity(model, (4, side, side)).macs == expected


def test_ssm_work_is_counted_apart_and_adds_up_over_blocks():
    D, L, pairs = 24, 64, 4
    n = 2 * L
    transforms = 2.5 * n * math.log2(n) * (D + 2 * D + 2 * D)  # input, kernels, outputs
    products = 2 * D * (L + 1) * 6
    kernels = 2 * (2 * D) * (2 * pairs) * L
    cost = measure_complexity(DiffuSSM(**SMALL), (4, 8, 8))
    assert cost.ssm_flops == 3 * (transforms + products + kernels)
    assert s4d_flops(5, D, D, pairs, L) < 5 * s4d_flops(1, D, D, pairs, L)  # kernels are shared by a batch


@pytest.mark.parametrize(
    ("name", "side", "gmacs", "parameters"),
    [
        ("diffussm_xl", 32, 276.0, 673.1e6),
        ("diffussm_xl", 64, 1103.6, 673.1e6),
        ("diffussm_l", 32, 105.8, 261e6),
        ("diffussm_s", 32, 13.8, 35.5e6),
    ],
)
def test_presets_cost_what_the_paper_implies(name, side, gmacs, parameters):
    cost = measure(name, side)
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.06)
    assert cost.parameters == pytest.approx(parameters, rel=2e-3)
    assert cost.flops == 2 * cost.macs


def test_the_ssm_without_its_kernel_is_linear_but_for_the_logarithm():
    short, long = measure("diffussm_s", 32), measure("diffussm_s", 64)
    assert 4 < long.ssm_flops / short.ssm_flops < 4.5
    assert long.macs / short.macs == pytest.approx(4, rel=1e-3)


def test_torch_counts_the_same_macs_when_the_model_really_runs():
    class NoSSM(nn.Module):
        def forward(self, u):
            return torch.cat([u, u], dim=-1)

    model = DiffuSSM(**SMALL)
    expected = measure_complexity(model, (4, 8, 8)).macs
    for block in model.blocks:
        block.ssm = NoSSM()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([2]))
    assert counter.get_total_flops() == 2 * expected


class Toy(nn.Module):
    """x W through a square: autograd keeps x and x W, one fp32 number for each element."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 16, bias=False)

    def forward(self, x, t):
        tokens = x.flatten(2).transpose(1, 2).contiguous()  # (B, L, 4)
        return self.layer(tokens).square()


def test_activations_are_what_autograd_keeps_without_parameters():
    assert measure_complexity(Toy(), (4, 8, 8)).activation_bytes == 4 * 64 * (4 + 16)


def test_a_tensor_kept_twice_counts_once():
    class Twice(Toy):
        def forward(self, x, t):
            y = super().forward(x, t)
            return y.sin() * y.cos()

    # kept: x, x W, y (twice), sin y, cos y
    assert measure_complexity(Twice(), (4, 8, 8)).activation_bytes == 4 * 64 * (4 + 16 + 16 + 16 + 16)


def test_measuring_leaves_the_model_as_it_was():
    model = DiffuSSM(**SMALL).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    measure_complexity(model, (4, 8, 8))
    assert not model.training and all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_model_that_was_used_costs_the_same():
    model = DiffuSSM(**SMALL)
    expected = measure_complexity(model, (4, 8, 8))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([2]))
    assert measure_complexity(model, (4, 8, 8)) == expected


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="hourglass_ratio=2"):
        measure_complexity(DiffuSSM(**SMALL), (4, 3, 3))


@pytest.mark.parametrize("side", [8, 16])
def test_dit_macs_are_those_of_its_equations(side):
    D, depth, p, C = 32, 3, 2, 4
    L = (side // p) ** 2
    block = 12 * D * D * L + 2 * L * L * D + 6 * D * D  # attention, MLP of 4D; scores and values; adaLN
    decode = L * D * p * p * 2 * C + 2 * D * D
    expected = depth * block + L * p * p * C * D + embedding_macs(D) + decode
    cost = measure("dit_s_2", side, input_size=side, hidden_size=D, depth=depth, num_heads=2)
    assert cost.macs == expected and cost.ssm_flops == 0


@pytest.mark.parametrize(
    ("name", "gmacs", "parameters"),
    [
        ("dit_s_2", 6.06, 32.9e6), ("dit_b_2", 23.01, 130.3e6), ("dit_l_2", 80.70, 457.8e6),
        ("dit_xl_2", 118.62, 674.8e6), ("dit_s_4", 1.41, None), ("dit_b_4", 5.57, None),
        ("dit_l_4", 19.70, None), ("dit_xl_4", 29.04, None), ("dit_s_8", 0.36, None),
        ("dit_b_8", 1.42, None), ("dit_l_8", 5.01, None), ("dit_xl_8", 7.39, None),
    ],
)  # fmt: skip
def test_dit_presets_cost_what_their_paper_says(name, gmacs, parameters):
    cost = measure(name, 32)
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.005, abs=0.006)
    assert parameters is None or cost.parameters == pytest.approx(parameters, rel=2e-3)


def test_attention_keeps_no_matrix_of_scores():
    short, long = (measure("dit_s_2", side, input_size=side, depth=1) for side in (32, 64))
    assert long.activation_bytes / short.activation_bytes < 4.1
