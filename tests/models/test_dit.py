"""DiT: the paper's parameter counts, the official network spelled out from its definition, and its contracts."""

import math

import jaxtyping
import pytest
import torch
from torch import Tensor

import diffussm
from diffussm.models import DiT
from diffussm.runtime.errors import ConfigError

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
PATCH, WIDTH, HEADS = 2, 16, 4


def tiny(**options) -> DiT:
    """A small model with every parameter away from zero, in eval mode."""
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "num_classes": 5, "input_size": 6, "patch_size": PATCH}
    model = DiT(**{**sizes, "hidden_size": WIDTH, "depth": 2, "num_heads": HEADS, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, 6, 6, generator=generator),
        torch.randint(1000, (batch,), generator=generator),
        torch.randint(5, (batch,), generator=generator),
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dit_s_2", 32.9), ("dit_b_2", 130.3), ("dit_l_2", 457.8), ("dit_xl_2", 674.8), ("dit_xl_4", 675.0)],
)
def test_parameter_counts_are_the_papers(name, millions):
    with torch.device("meta"):
        model = diffussm.create_model(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("conditioning", "millions"), [("in_context", 449), ("cross_attention", 598), ("adaln", 600)]
)
def test_parameter_counts_of_the_other_conditionings_are_the_papers(conditioning, millions):
    with torch.device("meta"):
        model = diffussm.create_model("dit_xl_2", conditioning=conditioning)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_the_digits_models_have_the_same_number_of_parameters_to_3_percent():
    counts = [
        sum(parameter.numel() for parameter in diffussm.create_model(name).parameters())
        for name in ("dit_tiny", "diffussm_tiny")
    ]
    assert counts[0] == pytest.approx(counts[1], rel=0.03)


def test_state_names_are_the_official_ones():
    linears = [f"blocks.{n}.{name}" for n in range(2) for name in (
        "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1",
    )]  # fmt: skip
    linears += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    linears += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    names = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    state = tiny().state_dict()
    assert set(state) == names | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert state["pos_embed"].shape == (1, 9, WIDTH)
    assert state["x_embedder.proj.weight"].shape == (WIDTH, 3, PATCH, PATCH)
    assert state["y_embedder.embedding_table.weight"].shape == (6, WIDTH)


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def tanh_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head: softmax(q k^T / sqrt(d)) v."""
    size, heads = q.shape[-1] // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = torch.exp(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
    return torch.cat(heads, -1)


def positions(side: int) -> Tensor:
    """Number by number: for token (row, column) sin and cos of the column's, then of the row's phases."""
    table = torch.zeros(1, side * side, WIDTH, dtype=torch.float64)
    quarter = WIDTH // 4
    for token in range(side * side):
        for half, place in enumerate((token % side, token // side)):
            for k in range(quarter):
                phase = place / 10_000 ** (k / quarter)
                table[0, token, half * 2 * quarter + k] = math.sin(phase)
                table[0, token, half * 2 * quarter + quarter + k] = math.cos(phase)
    return table


def spelled_out(w: dict[str, Tensor], conditioning: str, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network as the paper and its public checkpoints define it, from the tensors of a state dict."""

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.split(WIDTH, -1) if x.shape[-1] == parts * WIDTH else pytest.fail(f"not {parts} parts")

    def modulation(name: str, parts: int) -> list[Tensor]:
        return [vector[:, None] for vector in split(affine(f"{name}.adaLN_modulation.1", silu(c)), parts)]

    side = x_t.shape[-1] // PATCH
    kernel = w["x_embedder.proj.weight"].flatten(1)
    tokens = [
        x_t[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].flatten(1) @ kernel.T
        for row in range(side)
        for column in range(side)
    ]
    x = torch.stack(tokens, 1) + w["x_embedder.proj.bias"] + positions(side).to(x_t)
    phase = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=x_t.dtype) / 128)
    t_vector = affine(
        "t_embedder.mlp.2", silu(affine("t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], 1)))
    )
    y_vector = w["y_embedder.embedding_table.weight"][y]
    c, extra = t_vector + y_vector, torch.stack([t_vector, y_vector], 1)
    if conditioning == "in_context":
        x = torch.cat([x, extra], 1)
    for n in range(2):
        block = f"blocks.{n}"
        shift_1 = scale_1 = shift_2 = scale_2 = 0
        gate_1 = gate_2 = 1
        if conditioning == "adaln_zero":
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(block, 6)
        elif conditioning == "adaln":
            shift_1, scale_1, shift_2, scale_2 = modulation(block, 4)
        has_adaln = conditioning.startswith("adaln")
        h = layer_norm(x) * (1 + scale_1) + shift_1 if has_adaln else norm(f"{block}.norm1", x)
        q, k, v = split(affine(f"{block}.attn.qkv", h), 3)
        x = x + gate_1 * affine(f"{block}.attn.proj", attention(q, k, v))
        if conditioning == "cross_attention":
            q = affine(f"{block}.cross_attn.q", norm(f"{block}.norm_cross", x))
            k, v = split(affine(f"{block}.cross_attn.kv", extra), 2)
            x = x + affine(f"{block}.cross_attn.proj", attention(q, k, v))
        h = layer_norm(x) * (1 + scale_2) + shift_2 if has_adaln else norm(f"{block}.norm2", x)
        x = x + gate_2 * affine(f"{block}.mlp.fc2", tanh_gelu(affine(f"{block}.mlp.fc1", h)))
    x = x[:, : side * side]
    if conditioning.startswith("adaln"):
        shift, scale = modulation("final_layer", 2)
        x = layer_norm(x) * (1 + scale) + shift
    else:
        x = norm("final_layer.norm_final", x)
    x = affine("final_layer.linear", x)
    channels = x.shape[-1] // PATCH**2
    pixels = torch.zeros(len(x), channels, side * PATCH, side * PATCH, dtype=x.dtype)
    for token in range(side * side):
        for index in range(PATCH * PATCH):
            row, column = token // side * PATCH + index // PATCH, token % side * PATCH + index % PATCH
            pixels[:, :, row, column] = x[:, token, index * channels : (index + 1) * channels]
    return pixels


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_agrees_with_the_official_network_to_1e_5(conditioning):
    model = tiny(conditioning=conditioning)
    expected = spelled_out(model.state_dict(), conditioning, *inputs())
    assert expected.abs().max() > 1
    assert (model(*inputs()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_are_those_of_the_official_network(conditioning, monkeypatch):
    model = tiny(conditioning=conditioning).double()
    exact = lambda t, dim: torch.cat(  # noqa: E731  (the network's own is fp32, whatever its weights are)
        [
            f(t[:, None] * 10_000.0 ** (-torch.arange(dim // 2).double() / (dim // 2)))
            for f in (torch.cos, torch.sin)
        ],
        1,
    )
    monkeypatch.setattr("diffussm.models.layers.timestep_sinusoid", exact)
    model.pos_embed.copy_(positions(3))
    x_t, t, y = inputs()
    x_t = x_t.double()
    parameters = dict(model.named_parameters())
    results = []
    for network in (model, lambda *a: spelled_out(parameters, conditioning, *a)):
        output = network(x_t, t, y)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()))
        results.append((output.detach(), gradients))
    (fast, fast_gradients), (slow, slow_gradients) = results
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-11)
    for name, ours, expected in zip(parameters, fast_gradients, slow_gradients, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-7, atol=1e-9), name


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = DiT(num_classes=1000, hidden_size=64, depth=2, num_heads=4, input_size=4)
    state = model.state_dict()
    assert torch.allclose(state.pop("pos_embed")[0, 1, :3], torch.tensor([1.0, 0.56234, 0.31623]).sin(), atol=1e-4)
    zeros = {name for name, tensor in state.items() if not tensor.any()}
    expected = {
        name for name in state if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer")
    }
    assert zeros == expected
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name, fans in (
        ("x_embedder.proj.weight", 16 + 64),
        ("blocks.1.attn.qkv.weight", 64 + 192),
        ("blocks.1.attn.proj.weight", 64 + 64),
        ("blocks.0.mlp.fc1.weight", 64 + 256),
        ("blocks.0.mlp.fc2.weight", 256 + 64),
    ):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < state[name].abs().max() <= bound
        assert state[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_blocks_of_adaln_zero_start_as_the_identity_and_every_network_as_the_zero_function():
    x_t, t, y = inputs()
    for conditioning in CONDITIONINGS:
        assert (DiT(3, 5, 6, 2, 16, 1, 4, conditioning=conditioning)(x_t, t, y) == 0).all()
    block, x = DiT(3, 5, 6, 2, 16, 1, 4).blocks[0], torch.randn(2, 9, 16)
    assert torch.equal(block(x, torch.randn(2, 16)), x)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 6), (False, 3)])
def test_output_channels(learn_sigma, channels):
    assert tiny(learn_sigma=learn_sigma)(*inputs()).shape == (2, channels, 6, 6)


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_parameter_is_trained_and_has_a_role(conditioning, num_classes):
    model = tiny(conditioning=conditioning, num_classes=num_classes).train()
    x_t, t, y = inputs()
    model(x_t, t, None if num_classes is None else y, torch.ones(2)).square().sum().backward()
    roles = {}
    for name, parameter in model.named_parameters():
        # Where t is the only token to attend to, its weight is 1, whatever the query is.
        of_query = ".cross_attn.q." in name or ".norm_cross." in name
        if not (of_query and num_classes is None):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        roles[name] = parameter.role
    assert set(roles.values()) == {"decay", "no_decay"}
    assert roles["x_embedder.proj.weight"] == roles["blocks.0.attn.qkv.weight"] == "decay"
    assert roles["x_embedder.proj.bias"] == roles["final_layer.linear.bias"] == "no_decay"


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_time_and_label_reach_every_output(conditioning):
    model = tiny(conditioning=conditioning)
    x_t, t, y = inputs(1)
    before = model(x_t, t, y)
    assert (model(x_t, (t + 300) % 1000, y) != before).all()
    assert (model(x_t, t, (y + 1) % 5) != before).all()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_labels_are_dropped_in_training_only_and_by_the_given_draws(conditioning):
    model = tiny(class_dropout_prob=0.5, conditioning=conditioning)
    x_t, t, y = inputs()
    draws = torch.tensor([0.4, 0.6])
    kept, dropped = model(x_t, t, y), model(x_t, t, torch.full_like(y, model.null_label))
    assert torch.equal(model(x_t, t, y, drop_uniform=draws), kept)
    assert torch.equal(model(x_t, t), dropped)
    mixed = model.train()(x_t, t, y, drop_uniform=draws)
    assert torch.allclose(mixed[0], dropped[0], atol=1e-5) and not torch.allclose(mixed[0], kept[0], atol=1e-3)
    assert torch.allclose(mixed[1], kept[1], atol=1e-5)


def test_without_label_dropping_there_is_no_null_label():
    model = tiny(class_dropout_prob=0.0)
    assert model.null_label is None and len(model.y_embedder.embedding_table.weight) == 5
    with pytest.raises(ValueError, match="labels are needed"):
        model(*inputs()[:2])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_unconditional_model_takes_no_labels(conditioning):
    model = tiny(num_classes=None, conditioning=conditioning)
    x_t, t, y = inputs()
    assert model.null_label is None and model(x_t, t).shape == (2, 6, 6, 6)
    with pytest.raises(ValueError, match="unconditional"):
        model(x_t, t, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18}, "hidden_size=18: must be divisible by num_heads=4"),
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size=18: must be divisible by 4"),
        ({"input_size": 7}, "input_size=7: must be divisible by patch_size=2"),
        ({"depth": 0}, "depth=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob=1.0"),
    ],
)
def test_refuses_bad_options_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_refuses_conditionings_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"model\.conditioning=film: must be one of adaln_zero, adaln, cross"):
        diffussm.create_model("dit_tiny", conditioning="film")


@pytest.mark.parametrize("shape", [(8, 8), (6, 8), (12, 3)])
def test_refuses_latents_of_another_size(shape):
    with pytest.raises(ValueError, match=rf"input_size=6: {shape[0]}x{shape[1]} latents"):
        tiny()(torch.zeros(1, 3, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_under_autocast_the_residual_stream_and_the_prediction_stay_fp32(conditioning):
    model, seen = tiny(conditioning=conditioning), []
    exact = model(*inputs())
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs())
    assert seen == [(torch.float32, torch.float32)] * 2 and rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05
    assert not torch.equal(rounded, rounded.bfloat16().float())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_activation_checkpointing_changes_no_gradient_and_recomputes_blocks(conditioning):
    gradients, calls = [], []
    for recompute in (False, True):
        model = tiny(conditioning=conditioning, activation_checkpointing=recompute).train()
        count = []
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *_, count=count: count.append(1))
        model(*inputs(), drop_uniform=torch.tensor([0.0, 1.0])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(len(count))
    assert calls == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("options", [{}, {"conditioning": "cross_attention"}, {"activation_checkpointing": True}])
def test_compiles_as_one_graph(options, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes are no part of the graph
    model = tiny(**options).train()
    draws = torch.tensor([0.05, 0.5])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(*inputs(), drop_uniform=draws).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*gradients, strict=True))
