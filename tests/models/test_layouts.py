"""Layouts of DiT's weights: conversions invert each other, shapes tell the network, misfits are named."""

import diffusers
import pytest
import torch
from models.test_dit import CONDITIONINGS, inputs, tiny
from torch import Tensor

import diffussm
from diffussm.models import DiT
from diffussm.models.layouts import (
    check_weights,
    detect_layout,
    diffusers_config,
    from_diffusers,
    infer_dit_arguments,
    to_diffusers,
)


def arguments(state: dict[str, Tensor], num_heads: int = 4) -> dict:
    return {**infer_dit_arguments(state), "num_heads": num_heads}


def in_diffusers(state: dict[str, Tensor]) -> diffusers.DiTTransformer2DModel:
    config = diffusers_config(arguments(state))
    config.pop("_class_name")
    model = diffusers.DiTTransformer2DModel(**config)
    model.load_state_dict(to_diffusers(state))  # strict
    return model.eval()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_diffusers_network_agrees_to_1e_5_once_its_sinusoid_is_dits(learn_sigma):
    ours = tiny(learn_sigma=learn_sigma)
    theirs = in_diffusers(ours.state_dict())
    assert {norm.eps for norm in theirs.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-6}
    x_t, t, y = inputs()
    expected = ours(x_t, t, y)
    assert not torch.allclose(theirs(x_t, t, y).sample, expected, atol=1e-4)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert (theirs(x_t, t, y).sample - expected).abs().max() < 1e-5


def test_conversions_invert_each_other_bit_for_bit():
    state = tiny().state_dict()
    back = from_diffusers(to_diffusers(state), input_size=6)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with torch.random.fork_rng():
        theirs = diffusers.DiTTransformer2DModel(4, 4, 3, 6, 2, sample_size=6, num_embeds_ada_norm=5).state_dict()
    embedders = {name: tensor for name, tensor in theirs.items() if ".emb." in name}
    theirs |= {name: embedders[name.replace("blocks.1", "blocks.0")] for name in embedders}
    forth = to_diffusers(from_diffusers(theirs, input_size=6))
    assert forth.keys() == theirs.keys()
    assert all(torch.equal(forth[name], theirs[name]) for name in theirs)


def test_converted_tensors_share_no_memory():
    pointers = [tensor.untyped_storage().data_ptr() for tensor in to_diffusers(tiny().state_dict()).values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_shapes_tell_the_network(conditioning, num_classes):
    model = tiny(
        conditioning=conditioning, num_classes=num_classes, learn_sigma=False, mlp_ratio=2.0, patch_size=3, depth=3
    )
    state = model.state_dict()
    assert detect_layout(state) == "official"
    rebuilt = DiT(**arguments(state))
    check_weights(state, rebuilt.state_dict())
    rebuilt.load_state_dict(state)
    labels = None if num_classes is None else torch.tensor([4, 0])
    x_t, t, _ = inputs()
    assert torch.equal(rebuilt.eval()(x_t, t, labels), model(x_t, t, labels))
    assert rebuilt.null_label == num_classes


@pytest.mark.parametrize("name", ["dit_s_8", "dit_b_4", "dit_l_2", "dit_xl_2"])
def test_the_published_family_is_known_with_its_heads(name):
    with torch.device("meta"):
        model = diffussm.create_model(name)
        inferred = infer_dit_arguments(model.state_dict())
        assert DiT(**inferred).blocks[0].attn.num_heads == model.blocks[0].attn.num_heads
    assert inferred["num_classes"] == 1000 and inferred["input_size"] == 32 and inferred["learn_sigma"]


def test_heads_of_other_sizes_are_not_guessed():
    assert infer_dit_arguments(tiny().state_dict())["num_heads"] is None


def test_layouts_are_told_apart():
    state = tiny().state_dict()
    assert detect_layout(to_diffusers(state)) == "diffusers"
    with pytest.raises(ValueError, match=r"neither the official .* nor those of diffusers: weight, bias"):
        detect_layout({"weight": torch.zeros(1), "bias": torch.zeros(1)})
    diffussm_state = diffussm.create_model("diffussm_tiny", depth=1).state_dict()
    with pytest.raises(ValueError, match="neither"):
        detect_layout(diffussm_state)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_what_does_not_fit_is_named_and_counted_in_one_line():
    state = tiny().state_dict()
    wrong = without(state, *(f"blocks.0.{name}" for name in (
        "attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"
    )))  # fmt: skip
    wrong |= {"colour": torch.zeros(1), "final_layer.linear.bias": torch.zeros(3)}
    with pytest.raises(ValueError) as refused:
        check_weights(wrong, state)
    assert str(refused.value) == (
        "weights do not fit: 4 missing: blocks.0.attn.qkv.bias, blocks.0.attn.proj.bias, blocks.0.mlp.fc1.bias, "
        "...; 1 unknown: colour; 1 of another shape: final_layer.linear.bias: [3] instead of [24]"
    )


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"])
def test_inference_names_what_it_misses(name):
    state = tiny().state_dict()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        infer_dit_arguments(without(state, name))
    with pytest.raises(ValueError, match=rf"{name}: has shape \[2\]"):
        infer_dit_arguments({**state, name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", (1, 8, 16), "8 tokens are no square"),
        ("final_layer.linear.weight", (7, 16), "7 outputs"),
        ("blocks.0.adaLN_modulation.1.weight", (80, 16), "80 rows"),
    ],
)
def test_inference_refuses_shapes_that_mean_nothing(name, shape, message):
    with pytest.raises(ValueError, match=message):
        infer_dit_arguments({**tiny().state_dict(), name: torch.zeros(shape)})


def test_names_that_diffusers_lacks_or_adds_are_refused():
    theirs = to_diffusers(tiny().state_dict())
    lost = "transformer_blocks.1.attn1.to_k.bias"
    with pytest.raises(ValueError, match=f"1 missing: {lost}; 1 unknown: colour"):
        from_diffusers({**without(theirs, lost), "colour": torch.zeros(1)}, input_size=6)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_q\.bias.*do not go together"):
        from_diffusers({**theirs, lost: torch.zeros(3)}, input_size=6)
    with pytest.raises(ValueError, match="input_size=5"):
        from_diffusers(theirs, input_size=5)


def test_embedders_that_differ_between_blocks_are_refused_by_name():
    theirs = to_diffusers(tiny().state_dict())
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    theirs[name] = theirs[name].clone()
    theirs[name][2, 3] += 1e-3
    with pytest.raises(ValueError, match=rf"{name}: differs from transformer_blocks\.0"):
        from_diffusers(theirs, input_size=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "adaln"}, "conditioning=adaln: diffusers has adaln_zero only"),
        ({"conditioning": "in_context"}, "conditioning=in_context"),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2.0: diffusers has 4.0 only"),
        ({"num_classes": None}, "no unconditional DiT"),
    ],
)
def test_what_diffusers_has_no_place_for_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(tiny(**options).state_dict())


def test_positions_other_than_sin_cos_are_kept_by_dit_and_refused_for_diffusers():
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["pos_embed"] = state["pos_embed"].flip(-1)
    before = model(*inputs())
    model.load_state_dict(state)
    assert not torch.allclose(model(*inputs()), before, atol=1e-3)
    with pytest.raises(ValueError, match="pos_embed: not the sin-cos table"):
        to_diffusers(state)


def test_any_width_of_the_mlp_survives_its_ratio():
    model = DiT(
        in_channels=1, num_classes=2, input_size=4, hidden_size=88, depth=1, num_heads=2, mlp_ratio=120 / 88
    )
    assert model.blocks[0].mlp.fc1.out_features == 120
    arguments = infer_dit_arguments(model.state_dict())
    again = DiT(**{**arguments, "num_heads": 2})
    check_weights(model.state_dict(), again.state_dict())
