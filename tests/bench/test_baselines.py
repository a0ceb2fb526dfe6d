"""The baselines compute what they stand for."""

import pytest
import torch
from torch import nn

from diffussm.bench.baselines import Attention, DiffusersDiT, NoSSM, TextbookS4D
from diffussm.models import S4D


@pytest.fixture
def layer() -> S4D:
    torch.manual_seed(0)
    layer = S4D(d_model=6, d_state=8).double()
    with torch.no_grad():
        layer.D.normal_()
        layer.B.normal_()
    return layer


@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_textbook_layer_equals_ours_in_values_and_gradients(layer, length):
    textbook = TextbookS4D(layer)
    u = torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)
    v = u.detach().clone().requires_grad_()
    y, z = layer(u), textbook(v)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(y)
    y.backward(grad)
    z.backward(grad)
    torch.testing.assert_close(v.grad, u.grad, rtol=1e-8, atol=1e-9)
    ours = dict(layer.named_parameters())
    assert ours.keys() == dict(textbook.named_parameters()).keys()
    for name, parameter in textbook.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name].grad, rtol=1e-7, atol=1e-8)


def test_the_textbook_layer_without_learned_b_equals_ours():
    layer = S4D(d_model=4, d_state=8, learn_B=False)
    u = torch.randn(2, 16, 4)
    torch.testing.assert_close(TextbookS4D(layer)(u), layer(u), rtol=1e-4, atol=1e-5)


def test_its_convolution_is_the_layer_in_channel_major_order(layer):
    textbook = TextbookS4D(layer.float())
    u = torch.randn(2, 16, 6)
    torch.testing.assert_close(textbook.convolve(u.transpose(1, 2)).transpose(1, 2), textbook(u))


def test_the_textbook_layer_has_parameters_of_its_own(layer):
    textbook = TextbookS4D(layer)
    assert not {p.data_ptr() for p in textbook.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("options", [{"discretization": "bilinear"}, {"bidirectional": False}])
def test_layers_that_the_textbook_form_does_not_cover_are_refused(options):
    with pytest.raises(ValueError, match="bidirectional, with zero-order hold"):
        TextbookS4D(S4D(4, 8, **options))


def test_attention_is_that_of_torch():
    ours, theirs = Attention(128), nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 10, 128)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_no_ssm_has_the_shapes_of_one():
    u = torch.randn(2, 5, 3)
    assert torch.equal(NoSSM()(u), torch.cat([u, u], -1))
    assert NoSSM().convolve(u.transpose(1, 2)).shape == (2, 6, 5)


def test_diffusers_dit_is_called_like_our_models():
    model = DiffusersDiT(input_size=8, patch_size=2, hidden_size=64, depth=1)
    y = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert y.shape == (2, 8, 8, 8)
