"""NoisyClassifier: uniform at first, right gradients in x_t however it is held, and its contracts."""

import math

import pytest
import torch

import diffussm
from diffussm.models import NoisyClassifier
from diffussm.models.complexity import measure_complexity


def tiny(**options) -> NoisyClassifier:
    """A small classifier with every parameter away from where it starts, in eval mode."""
    torch.manual_seed(0)
    arguments = {"in_channels": 2, "num_classes": 5, "hidden_size": 8, "depth": 2, "d_state": 4, **options}
    model = NoisyClassifier(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 2, 4, 4, generator=generator, dtype=dtype)
    return x_t, torch.randint(1000, (batch,), generator=generator)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "none", "token_order": "serpentine"},
        {"patch_size": 2, "hourglass_ratio": 1, "token_order": "alternating"},
        {"bidirectional": False, "hourglass_ratio": 4, "learn_B": False},
        {"activation_checkpointing": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@OPTIONS
def test_gradients_in_x_t_are_the_finite_differences(options, is_training, is_frozen):
    model = tiny(**options).double().train(is_training).requires_grad_(not is_frozen)
    x_t, t = inputs(dtype=torch.float64)
    if is_frozen and not is_training:
        with torch.no_grad():
            model(x_t + 1, t)  # leaves kept spectra behind
            assert all(block.ssm._spectra is not None for block in model.blocks)
    assert torch.autograd.gradcheck(lambda x: model(x, t).log_softmax(dim=1), x_t.requires_grad_(), atol=1e-8)


def test_a_sampler_may_ask_for_the_gradient_while_gradients_are_off():
    model = tiny()
    x_t, t = inputs()
    expected = torch.autograd.grad(model(x_t.requires_grad_(), t)[:, 3].sum(), x_t)[0]
    model.requires_grad_(False)
    with torch.no_grad():
        without = model(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            logits = model(x, t)
            gradient = torch.autograd.grad(logits[:, 3].sum(), x)[0]
        assert torch.allclose(model(x_t, t), without, atol=1e-6)
    assert torch.allclose(logits, without, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-6) and gradient.abs().sum() > 0


def test_an_untrained_network_finds_all_classes_equally_likely():
    model = NoisyClassifier(in_channels=2, num_classes=5, hidden_size=8, depth=1)
    log_p = model(*inputs()).log_softmax(dim=1)
    assert torch.allclose(log_p, torch.full((2, 5), math.log(1 / 5)))


def test_the_first_gradient_depends_on_where_pixels_are():
    """Were the gates 0 at first, the last layer would see of an image only which pixels it has: a bag of them."""
    model = NoisyClassifier(2, 5, 8, 1, positions="none", hourglass_ratio=1, d_state=4)
    x_t, t = inputs()
    shuffled = x_t.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))].view_as(x_t)
    gradients = []
    for images in (x_t, shuffled):
        loss = torch.nn.functional.cross_entropy(model(images, t), torch.tensor([1, 3]))
        gradients.append(torch.autograd.grad(loss, model.final_layer.linear.weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 0.02 * gradients[0].norm()


def test_the_logits_are_the_vote_of_the_mean_token():
    model, seen = tiny(), []
    layer = model.final_layer
    layer.register_forward_pre_hook(lambda module, args: seen.extend(args))
    logits = model(*inputs())
    x, c = seen
    scale, shift = layer.adaLN_modulation(torch.nn.functional.silu(c)).chunk(2, dim=1)
    token = (layer.norm(x) * (1 + scale[:, None]) + shift[:, None]).mean(dim=1)
    assert torch.allclose(c, model.t_embedder(inputs()[1]))
    assert torch.allclose(logits, token @ layer.linear.weight.T + layer.linear.bias, atol=1e-5)


def test_every_token_and_the_timestep_reach_the_logits():
    model = tiny()
    x_t, t = inputs(1)
    gradient = torch.autograd.grad(model(x_t.requires_grad_(), t)[0, 2], x_t)[0]
    assert (gradient.abs() > 0).all()
    assert not torch.allclose(model(x_t, t), model(x_t, t + 300), atol=1e-4)


def test_positions_tell_tokens_apart_that_nothing_else_does():
    """A block of zeros adds nothing, so a token's vote depends on its pixel, and with positions on its place."""
    x_t, t = inputs()
    for positions, same in (("none", True), ("sincos", False)):
        model = tiny(positions=positions, depth=1, patch_size=1)
        for parameter in model.blocks.parameters():
            parameter.data.zero_()
        assert torch.allclose(model(x_t, t), model(x_t.flip(-1), t), atol=1e-5) is same


def test_every_parameter_is_trained_and_has_a_role():
    model = tiny().train()
    model(*inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.role in ("decay", "no_decay", "ssm"), name


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for is_on in (False, True):
        model = tiny(activation_checkpointing=is_on).train()
        model(*inputs()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_under_autocast_the_logits_stay_fp32_and_close():
    model = tiny()
    exact = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_its_complexity_is_measured_without_labels():
    cost = measure_complexity(diffussm.create_model("classifier_tiny"), (1, 8, 8))
    assert 100_000 < cost.parameters < 350_000 and cost.macs > 0 and cost.ssm_flops > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: must be at least 2"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"hidden_size": 9}, "hidden_size=9: must be divisible by hourglass_ratio=2"),
        ({"hidden_size": 6}, "hidden_size=6: must be divisible by 4"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"d_state": 3}, "d_state=3"),
    ],
)
def test_refuses_bad_options_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_refuses_latents_that_do_not_fit():
    with pytest.raises(ValueError, match="4x4 latents: not divisible by patch_size=3"):
        tiny(patch_size=3)(*inputs())
    with pytest.raises(ValueError, match="9 tokens"):
        tiny()(torch.zeros(1, 2, 3, 3), torch.zeros(1))
