"""DINOv2's class token, against its definition written out, from files with its authors' names."""

import math

import pytest
import torch
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from diffussm.evaluation.dino import DINOv2, VisionTransformer
from diffussm.runtime.errors import ConfigError, DataError

WIDTH, DEPTH, GRID = 128, 2, 18


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = VisionTransformer(WIDTH, DEPTH, GRID**2 + 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save(network.state_dict() | {"mask_token": torch.zeros(1, WIDTH)}, path)
    return path


def by_definition(state, images):
    """In float64, with attention spelled out head by head."""
    state = {key: value.double() for key, value in state.items()}
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = []
    for image in images.double():
        patches = ((image / 255 - mean) / std).unfold(1, 14, 14).unfold(2, 14, 14)  # (3, 16, 16, 14, 14)
        patches = patches.permute(1, 2, 0, 3, 4).reshape(256, -1)
        x = linear(patches, state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"])
        grid = state["pos_embed"][:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        grid = interpolate(grid, scale_factor=(16.1 / GRID, 16.1 / GRID), mode="bicubic").flatten(2)[0].T
        x = torch.cat([state["cls_token"][0] + state["pos_embed"][0, :1], x + grid])
        for n in range(DEPTH):
            at = {key.removeprefix(f"blocks.{n}."): value for key, value in state.items()}
            y = layer_norm(x, (WIDTH,), at["norm1.weight"], at["norm1.bias"], 1e-6)
            q, k, v = linear(y, at["attn.qkv.weight"], at["attn.qkv.bias"]).split(WIDTH, dim=1)
            heads = [
                (q[:, s] @ k[:, s].T / math.sqrt(64)).softmax(dim=1) @ v[:, s]
                for s in (slice(0, 64), slice(64, 128))
            ]
            mixed = linear(torch.cat(heads, dim=1), at["attn.proj.weight"], at["attn.proj.bias"])
            x = x + at["ls1.gamma"] * mixed
            y = layer_norm(x, (WIDTH,), at["norm2.weight"], at["norm2.bias"], 1e-6)
            y = linear(
                gelu(linear(y, at["mlp.fc1.weight"], at["mlp.fc1.bias"])), at["mlp.fc2.weight"], at["mlp.fc2.bias"]
            )
            x = x + at["ls2.gamma"] * y
        tokens.append(layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)[0])
    return torch.stack(tokens)


def test_features_are_the_class_token_by_definition(weights):
    images = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0)).byte()
    extractor = DINOv2(str(weights))
    features = extractor(images)
    assert features.spatial is None and features.logits is None and extractor.dims == {"pool": WIDTH}
    torch.testing.assert_close(
        features.pool.double(), by_definition(torch.load(weights), images), rtol=1e-3, atol=1e-4
    )


def test_images_of_any_size_are_resized(weights):
    flat = torch.full((1, 3, 64, 80), 90, dtype=torch.uint8)
    extractor = DINOv2(str(weights))
    large = torch.full((1, 3, 224, 224), 90, dtype=torch.uint8)
    torch.testing.assert_close(extractor(flat).pool, extractor(large).pool, rtol=1e-3, atol=1e-4)


def test_missing_and_foreign_weights_are_one_line(weights, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^evaluation\.extractor\.weights=no\.pth: no such file: give dinov2_vitl14"
    ):
        DINOv2("no.pth")
    state = torch.load(weights)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "a.pth")
    del state["blocks.1.ls1.gamma"]
    torch.save(state, tmp_path / "b.pth")
    for name, says in (("a.pth", "no pos_embed"), ("b.pth", r"blocks\.1\.ls1\.gamma is missing, not \(128,\)")):
        with pytest.raises(DataError, match=says):
            DINOv2(str(tmp_path / name))
