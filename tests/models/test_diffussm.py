"""DiffuSSM: the paper's parameter counts, its equations against a slow spelling-out, and its contracts."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, silu

import diffussm
from diffussm.models import DiffuSSM
from diffussm.runtime.errors import ConfigError


def tiny(**options) -> DiffuSSM:
    """A small model with every parameter away from zero, in eval mode."""
    torch.manual_seed(0)
    arguments = {"in_channels": 3, "num_classes": 5, "hidden_size": 8, "depth": 2, "d_state": 4, **options}
    model = DiffuSSM(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int] = (4, 4)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, *size, generator=generator),
        torch.randint(1000, (batch,), generator=generator),
        torch.randint(5, (batch,), generator=generator),
    )


@pytest.mark.parametrize(
    ("name", "overrides", "millions"),
    [
        ("diffussm_xl", {}, 673.1),
        ("diffussm_xl", {"learn_B": False}, 668.9),
        ("diffussm_l", {}, 261.1),
        ("diffussm_s", {}, 35.5),
    ],
)
def test_parameter_counts_are_the_papers(name, overrides, millions):
    with torch.device("meta"):
        model = diffussm.create_model(name, **overrides)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize(("reading", "core"), [("figure", 10), ("equation", 13)])
def test_dense_layers_hold_the_papers_number_of_weights(ratio, reading, core):
    width = 16
    with torch.device("meta"):
        block = DiffuSSM(hidden_size=width, depth=1, hourglass_ratio=ratio, reading=reading).blocks[0]
    matrices = [p for module in (block.dense, block.fusion) for p in module.parameters() if p.role == "decay"]
    per_up_scale = 2 if reading == "figure" else 1
    assert sum(p.numel() for p in matrices) == (core + per_up_scale * ratio) * width**2


def spelled_out(model: DiffuSSM, options: dict, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor):
    """The whole network token by token, from the equations of both readings."""
    M, D, p = model.hourglass_ratio, model.x_embedder.out_features, model.patch_size
    equation = options.get("reading") == "equation"
    G = M if equation else 1  # tokens per vector of the residual stream
    batch, _, height, width = x_t.shape
    rows, columns = height // p, width // p
    L, J = rows * columns, rows * columns // M
    c = model.t_embedder(t) + model.y_embedder.embedding_table(y)

    def patch(image, l):
        top, left = l // columns * p, l % columns * p
        return image[:, :, top : top + p, left : left + p]

    tokens = [patch(x_t, l).permute(0, 2, 3, 1).flatten(1) for l in range(L)]
    x = [model.x_embedder(torch.cat(tokens[i * G : i * G + G], 1)) for i in range(L // G)]
    if options.get("positions") == "sincos":
        w = [10_000 ** (-k / (D // 4)) for k in range(D // 4)]
        waves = lambda v: [f(v * wk) for f in (math.sin, math.cos) for wk in w]  # noqa: E731
        place = lambda l: torch.tensor(waves(l % columns) + waves(l // columns)).to(x[0])  # noqa: E731
        x = [value + place(i * G) for i, value in enumerate(x)]
    x = torch.stack(x, dim=1)
    bank = lambda layer, k, v: v @ layer.weight[k].T + layer.bias[k]  # noqa: E731
    for index, block in enumerate(model.blocks):
        gamma, beta, alpha = block.adaLN_modulation(silu(c)).chunk(3, dim=1)
        h = layer_norm(x, (D,), eps=1e-6) * (1 + gamma[:, None]) + beta[:, None]
        if equation:
            I = list(h.unbind(1))
        else:
            I = [torch.cat([bank(block.dense.down, k, h[:, M * j + k]) for k in range(M)], 1) for j in range(J)]
        U = [gelu(bank(block.dense.up, l % M, gelu(block.dense.mlp(I[l // M])))) for l in range(L)]
        sequence = list(range(L))
        if options.get("token_order") == "serpentine":
            sequence = [r * columns + (q if r % 2 == 0 else columns - 1 - q) for r, q in grid(rows, columns)]
        elif options.get("token_order") == "alternating" and index % 2:
            sequence = [r * columns + q for q, r in grid(columns, rows)]
        Y_sequence = block.ssm(torch.stack([U[l] for l in sequence], dim=1))
        Y = [Y_sequence[:, sequence.index(l)] for l in range(L)]
        O = []
        for j in range(J):
            I2 = torch.cat([gelu(bank(block.fusion.down, k, Y[M * j + k])) for k in range(M)], 1)
            O.append(block.fusion.out(gelu(block.fusion.value(I2)) * gelu(block.fusion.gate(I[j]))))
        if not equation:
            O = [bank(block.fusion.up, l % M, O[l // M]) for l in range(L)]
        x = x + alpha[:, None] * torch.stack(O, 1)
    scale, shift = model.final_layer.adaLN_modulation(silu(c)).chunk(2, dim=1)
    x = layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    out = model.final_layer.linear(x).unflatten(2, (G, -1)).flatten(1, 2)  # (B, L, p p C_out)
    pixels = torch.empty(batch, out.shape[-1] // p**2, height, width, dtype=out.dtype)
    for l in range(L):
        patch(pixels, l)[:] = out[:, l].unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)
    return pixels


def grid(outer: int, inner: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(outer) for b in range(inner)]


@pytest.mark.parametrize(
    "options",
    [
        {"hourglass_ratio": 1},
        {"hourglass_ratio": 2},
        {"hourglass_ratio": 4},
        {"hourglass_ratio": 8},
        {"patch_size": 2},
        {"patch_size": 4, "hourglass_ratio": 1, "positions": "sincos"},
        {"reading": "equation", "hourglass_ratio": 1},
        {"reading": "equation", "hourglass_ratio": 2, "positions": "sincos"},
        {"reading": "equation", "hourglass_ratio": 4, "patch_size": 2, "bidirectional": False},
        {"reading": "equation", "hourglass_ratio": 8, "token_order": "alternating"},
        {"bidirectional": False},
        {"token_order": "serpentine"},
        {"token_order": "alternating", "positions": "sincos", "patch_size": 2},
        {"activation_checkpointing": True},
        {"init": "legs", "discretization": "bilinear", "learn_B": False},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_equals_the_equations_in_values_and_gradients(options):
    model = tiny(class_dropout_prob=0.0, **options).double().train()
    x_t, t, y = inputs(size=(8, 4))
    x_t = x_t.double()
    gradients = []
    for network in (model, lambda *a: spelled_out(model, options, *a)):
        model.zero_grad()
        output = network(x_t, t, y)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        gradients.append((output.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (fast, fast_gradients), (slow, slow_gradients) = gradients
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-11)
    for name, gradient in slow_gradients.items():
        assert gradient.abs().sum() > 0, name
        assert torch.allclose(fast_gradients[name], gradient, rtol=1e-6, atol=1e-8), name


def test_activation_checkpointing_keeps_the_blocks_inputs_only():
    kept = {}
    for is_on in (False, True):
        model = tiny(depth=4, hidden_size=32, activation_checkpointing=is_on).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(*inputs(16))
        kept[is_on] = sum(sizes)
    assert kept[True] < kept[False] / 3


def test_a_frozen_model_samples_from_kept_spectra_with_the_same_result():
    model = tiny()
    expected = model(*inputs())
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.allclose(model(*inputs()), expected.detach(), atol=1e-6)
        assert all(block.ssm._spectra is not None for block in model.blocks)


def test_starts_as_the_zero_function():
    model = DiffuSSM(in_channels=3, num_classes=5, hidden_size=8, depth=1)
    assert (model(*inputs()) == 0).all()


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 6), (False, 3)])
def test_output_channels(learn_sigma, channels):
    assert tiny(learn_sigma=learn_sigma)(*inputs()).shape == (2, channels, 4, 4)


def test_every_parameter_is_trained_and_has_a_role():
    model = tiny().train()
    x_t, t, y = inputs()
    model(x_t, t, y, drop_uniform=torch.ones(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.role in ("decay", "no_decay", "ssm"), name


def test_tokens_beyond_the_group_reach_every_output():
    model = tiny()
    x_t, t, y = inputs(1)
    x_t.requires_grad_()
    for row, column in ((0, 0), (3, 3)):
        gradient = torch.autograd.grad(model(x_t, t, y)[0, :, row, column].sum(), x_t)[0]
        assert (gradient.abs().sum(dim=1) > 0).all()


def test_labels_are_dropped_in_training_only_and_by_the_given_draws():
    model = tiny(class_dropout_prob=0.5)
    x_t, t, y = inputs()
    null = torch.full_like(y, model.null_label)
    draws = torch.tensor([0.4, 0.6])
    kept, dropped = model(x_t, t, y), model(x_t, t, null)
    assert torch.equal(model(x_t, t, y, drop_uniform=draws), kept)
    model.train()
    mixed = model(x_t, t, y, drop_uniform=draws)
    assert torch.allclose(mixed[0], dropped[0], atol=1e-6) and not torch.allclose(mixed[0], kept[0], atol=1e-3)
    assert torch.allclose(mixed[1], kept[1], atol=1e-6)


def test_dropout_without_draws_drops_the_given_share():
    model = tiny(class_dropout_prob=0.3)
    model.train()
    seen = []
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    model.y_embedder(torch.zeros(4000, dtype=torch.long), 4000)
    assert (seen[0] == model.null_label).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_no_labels_means_the_null_label():
    model = tiny()
    x_t, t, y = inputs()
    assert torch.equal(model(x_t, t), model(x_t, t, torch.full_like(y, model.null_label)))
    with pytest.raises(ValueError, match="labels are needed"):
        tiny(class_dropout_prob=0.0)(x_t, t)


def test_unconditional_model_takes_no_labels():
    model = tiny(num_classes=None)
    x_t, t, y = inputs()
    assert model.null_label is None and model(x_t, t).shape == (2, 6, 4, 4)
    with pytest.raises(ValueError, match="unconditional"):
        model(x_t, t, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 9}, "hidden_size=9: must be divisible by hourglass_ratio=2"),
        ({"hourglass_ratio": 0}, "hourglass_ratio=0"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob=1.0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"positions": "sincos", "hidden_size": 6}, "hidden_size=6: must be divisible by 4"),
    ],
)
def test_refuses_bad_options_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_refuses_latents_that_the_hourglass_does_not_divide():
    with pytest.raises(ValueError, match="9 tokens"):
        tiny()(torch.zeros(1, 3, 3, 3), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_refuses_latents_that_the_patches_do_not_divide():
    with pytest.raises(ValueError, match="4x4 latents: not divisible by patch_size=3"):
        tiny(patch_size=3)(*inputs())


def test_bf16_autocast_stays_close_to_fp32():
    model = tiny()
    exact = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs())
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_under_autocast_the_residual_stream_and_the_prediction_stay_fp32():
    model, seen = tiny(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*inputs()).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 2


def test_create_model_names_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"model=diffusm_s: choose .*did you mean diffussm_s"):
        diffussm.create_model("diffusm_s")
    with pytest.raises(ConfigError, match=r"model\.hiden_size: no such key \(did you mean hidden_size"):
        diffussm.create_model("diffussm_s", hiden_size=3)
    with pytest.raises(ConfigError, match=r"model\.hidden_size=7: must be divisible"):
        diffussm.create_model("diffussm_tiny", hidden_size=7)
    assert isinstance(diffussm.create_model("diffussm_tiny", depth=1), nn.Module)
