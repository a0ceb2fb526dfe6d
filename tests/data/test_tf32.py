"""TF32 is off inside, and as it was before outside, by the settings of old and new torch."""

from types import SimpleNamespace

import pytest
import torch

from diffussm.data.tf32 import without_tf32


def backends(**names) -> SimpleNamespace:
    """What torch.backends has of one version."""
    cudnn = SimpleNamespace(allow_tf32=True)
    if names:
        cudnn = SimpleNamespace(conv=SimpleNamespace(**names))
    return SimpleNamespace(
        cudnn=cudnn, cuda=SimpleNamespace(matmul=SimpleNamespace(**names or {"allow_tf32": True}))
    )


@pytest.mark.parametrize(
    ("names", "on", "off"),
    [
        ({}, {"allow_tf32": True}, {"allow_tf32": False}),
        ({"fp32_precision": "tf32"}, {"fp32_precision": "tf32"}, {"fp32_precision": "ieee"}),
    ],
    ids=["torch 2.8", "torch 2.9"],
)
def test_it_is_off_inside_and_as_before_outside(monkeypatch, names, on, off):
    version = backends(**names)
    places = [version.cudnn.conv if names else version.cudnn, version.cuda.matmul]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "backends", version)
        with pytest.raises(ValueError, match="inside"), without_tf32():
            assert [vars(place) for place in places] == [off, off]
            raise ValueError("inside")
    assert [vars(place) for place in places] == [on, on]


@pytest.mark.filterwarnings("error")
def test_this_torch_takes_it_without_a_warning_and_forgets_it():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with without_tf32():
        pass
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
