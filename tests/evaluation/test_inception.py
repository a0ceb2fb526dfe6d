"""Inception is torch-fidelity's to the last bit, its spatial features are ADM's, its weights are checked."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from diffussm.cli import main
from diffussm.data.fake import Fake
from diffussm.evaluation import inception
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.generate import Generated
from diffussm.evaluation.inception import Inception, resize
from diffussm.runtime.errors import ConfigError, DataError

KEY = "evaluation.extractor.weights"


@pytest.fixture(scope="session")
def network() -> Inception:
    return Inception.untrained()


@pytest.fixture(scope="session")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def theirs(weights) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))


def pictures(count: int, side: int = 48) -> torch.Tensor:
    """Images that differ in colour, in coarse and in fine structure."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    return (255 * (0.8 * smooth + 0.2 * torch.rand(count, 3, side, side, generator=generator))).byte()


@pytest.fixture(scope="session")
def seen(network, theirs):
    """Images, our features, theirs, and what their Mixed_6d.branch1x1 gave."""
    taps = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, output: taps.append(output.clone())
    )
    images = pictures(6)
    with torch.no_grad():
        result = images, network(images), theirs(images), taps
    hook.remove()
    return result


def test_every_feature_is_torch_fidelitys_bit_for_bit(seen):
    _, ours, (pool, logits), _ = seen
    assert ours.pool.shape == (6, 2048) and ours.logits.shape == (6, 1008)
    assert torch.equal(ours.pool, pool) and torch.equal(ours.logits, logits)
    assert pool.std(dim=0).mean() / pool.std() > 0.01  # images differ, or the comparison would be empty


@pytest.mark.parametrize("shape", [(8, 8), (64, 48), (256, 256), (299, 299), (300, 512)])
def test_images_are_resized_as_torch_fidelity_does_bit_for_bit(shape):
    images = torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize(images, 299), theirs)


def test_spatial_features_are_seven_channels_of_the_branch_in_nhwc_order(seen):
    _, ours, _, (branch,) = seen
    assert branch.shape == (6, 192, 17, 17) and branch.min() == 0  # after its ReLU
    expected = branch[:, :7].permute(0, 2, 3, 1).reshape(6, 2023)
    assert torch.equal(ours.spatial, expected) and expected.std(dim=0).max() > 0


def test_dims_are_what_it_gives(seen):
    features = seen[1]
    assert {name: getattr(features, name).shape[1] for name in Inception.dims} == Inception.dims


def test_other_arithmetic_reports_how_far_it_deviates(network, seen):
    images = seen[0][:2]
    assert network.deviation(images) is None and network.settings == {}
    bf16 = Inception.untrained(precision="bf16", channels_last=True)
    assert bf16.settings == {"precision": "bf16", "channels_last": True} and bf16.sha256 == network.sha256
    plain, fast = seen[1].pool[:2], bf16(images).pool
    expected = (fast - plain).abs().max() / plain.square().mean().sqrt()
    assert fast.dtype == torch.float32 and bf16.deviation(images) == pytest.approx(float(expected), rel=0.05)
    assert 1e-4 < bf16.deviation(images) < 0.5
    assert torch.equal(bf16(images).pool, fast)  # measuring leaves it as it was


def test_stats_and_an_evaluation_go_by_its_features_from_end_to_end(weights, network, in_tmp, capsys):
    command = ["stats", "data=fake", "data.resolution=16", "data.num_images=5", "evaluation=fid5k", "to=fake.npz"]
    command += ["device=cpu", "num_workers=0", "num_images=4"]
    command += [f"{KEY}={weights}", f"evaluation.extractor.sha256={sha256(weights)}"]
    assert main(command) == 0
    assert "of 5 images, by inception" in capsys.readouterr().out
    images = torch.stack([Fake(5, resolution=16)[index][0] for index in range(5)])
    with torch.no_grad():
        features = network(images)
    with np.load("fake.npz") as made:
        assert made["arr_0"].shape == (4, 16, 16, 3)
        for suffix, values in (("", features.pool), ("_s", features.spatial)):
            np.testing.assert_allclose(made[f"mu{suffix}"], values.double().mean(0), rtol=1e-4, atol=1e-5)
            expected = np.cov(values.double().numpy(), rowvar=False)
            np.testing.assert_allclose(made[f"sigma{suffix}"], expected, atol=1e-3 * np.abs(expected).max())
    loaded = Inception(str(weights), sha256=None, channels_last=True)
    evaluation = Evaluation(loaded, "fake.npz", num_samples=5, k=1)
    batches = [Generated(range(5), images, None)]
    # Of dimensions so many, an eigendecomposition takes seconds: what needs none.
    found = evaluation._measure(batches, torch.device("cpu"), ["is", "precision", "kid"])
    assert {"IS", "precision", "KID", "feature_deviation"} == set(found)
    assert found["precision"] == 1.0 and 0 < found["feature_deviation"] < 1e-3
    extractor = evaluation.record()["extractor"]
    assert extractor == {"name": "inception", "sha256": sha256(weights), "channels_last": True}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_taken_with_its_own_hash_only(weights, network, monkeypatch, capsys):
    with pytest.raises(
        ConfigError, match=rf"its SHA-256 is {sha256(weights)}, not 6726825d0af5.*extractor\.sha256"
    ):
        Inception(str(weights))
    loaded = Inception(str(weights), sha256=sha256(weights))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    monkeypatch.setenv("DIFFUSSM_INCEPTION_WEIGHTS", str(weights))
    assert Inception(sha256=None).sha256 == sha256(weights)


def test_safetensors_are_weights_too(weights, tmp_path, network):
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.network.state_dict().items()}, path)
    loaded = Inception(str(path), sha256=None)
    assert torch.equal(loaded.network.fc.weight, network.network.fc.weight)


def test_the_cache_of_torch_is_where_torch_fidelity_keeps_them(monkeypatch, tmp_path, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ConfigError, match=rf"not set and not in torch's cache: put https.*pth at {tmp_path}"
    ) as error:
        Inception()
    assert "\n" not in str(error.value)
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.symlink_to(weights)
    assert Inception(sha256=None).sha256 == Inception("download", sha256=None).sha256 == sha256(weights)


def test_weights_that_are_missing_are_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{KEY}=nowhere.pth: no such file: put https://"):
        Inception("nowhere.pth")
    monkeypatch.setenv("DIFFUSSM_INCEPTION_WEIGHTS", "elsewhere.pth")
    with pytest.raises(ConfigError, match=r"^DIFFUSSM_INCEPTION_WEIGHTS=elsewhere\.pth: no such file"):
        Inception()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", (tmp_path / "absent.pth").as_uri())
    with pytest.raises(ConfigError, match=rf"^{KEY}=download: file:.* does not arrive"):
        Inception("download")


def test_a_download_of_other_content_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"other")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", (tmp_path / "other.pth").as_uri())
    with pytest.raises(ConfigError, match=r"does not arrive .*invalid hash value"):
        Inception("download")
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hostile-was-here"),)


def test_hostile_damaged_and_foreign_files_are_refused_and_nothing_runs(in_tmp):
    Path("pickle.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save({"fc.weight": Hostile()}, "inside.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, "foreign.pth")
    torch.save({"fc.weight": "text"}, "text.pth")
    for name in ("empty.pth", "cut.safetensors"):
        Path(name).write_bytes(b"")
    for name in ("pickle.pth", "inside.pth", "foreign.pth", "text.pth", "empty.pth", "cut.safetensors"):
        with pytest.raises(DataError, match=rf"^{KEY}={name}: ") as error:
            Inception(name, sha256=None)
        assert "\n" not in str(error.value)
    assert not Path("hostile-was-here").exists()
