"""Frozen autoencoders: diffusers' own numbers, lazily, in fp32, from checked files that are never unpickled."""

import json
import shutil
import threading

import diffusers
import pytest
import torch
from data.tiny_vae import make_tiny_dc, make_tiny_vae
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import load_file, save_file

from diffussm.data import pretrained, tf32
from diffussm.data.autoencoder import DCAutoencoder, IdentityAutoencoder, KLAutoencoder
from diffussm.data.pretrained import PICKLE_FILE, WEIGHTS_FILE
from diffussm.runtime.errors import ConfigError, DataError, DivergedError

SCALE, SHIFT = 0.5, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny VAE with a scale and a shift of its own."""
    return make_tiny_vae(tmp_path_factory.mktemp("vae") / "kl", scaling_factor=SCALE, shift_factor=SHIFT)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def pictures(count: int = 3, side: int = 32) -> torch.Tensor:
    """Noise with some order in it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    noise = 0.1 * torch.rand(count, 3, side, side, generator=generator)
    return (255 * (0.9 * torch.nn.functional.interpolate(coarse, side) + noise)).to(torch.uint8)


def noise_like(latents: torch.Tensor) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_identity_is_an_autoencoder_too():
    images, identity = pictures(), IdentityAutoencoder()
    assert identity.fingerprint == {"kind": "identity"} and not identity.is_stochastic
    assert identity.to(torch.device("cpu")) is identity
    assert torch.equal(identity.to_pixels(identity.to_latents(images)), images)
    assert identity.latent_shape((1, 8, 8)) == identity.image_shape((1, 8, 8)) == (1, 8, 8)


@torch.no_grad()
def test_latents_are_diffusers_mean_and_standard_deviation_for_given_noise(folder, theirs):
    images, ours = pictures(), KLAutoencoder(folder)
    posterior = theirs.encode(images.double().div(127.5).sub(1).float()).latent_dist
    noise = noise_like(posterior.mean)
    expected = (posterior.mean + posterior.std * noise - SHIFT) * SCALE
    assert close(ours.to_latents(images, noise), expected)
    assert close(ours.to_latents(images), (posterior.mean - SHIFT) * SCALE)
    moments = ours.encode(images)
    assert moments.shape == (3, 8, 4, 4) and close(moments.chunk(2, dim=1)[1].exp(), posterior.var)
    assert not close(ours.to_latents(images, noise), ours.to_latents(images), 0.1)


@torch.no_grad()
def test_pixels_are_diffusers_quantised_as_everywhere(folder, theirs):
    latents = noise_like(torch.zeros(3, 4, 4, 4))
    decoded = theirs.decode(latents / SCALE + SHIFT).sample
    ours = KLAutoencoder(folder).to_pixels(latents)
    assert ours.dtype == torch.uint8 and ours.float().std() > 10
    assert torch.equal(ours, IdentityAutoencoder().to_pixels(decoded))


def test_scale_and_shift_come_from_the_config_unless_they_are_given(folder, tmp_path):
    assert (KLAutoencoder(folder).scale, KLAutoencoder(folder).shift) == (SCALE, SHIFT)
    given = KLAutoencoder(folder, scale=2.0, shift=-1.0)
    plain = KLAutoencoder(folder, scale=1.0, shift=0.0).to_latents(pictures())
    assert close(given.to_latents(pictures()), (plain + 1) * 2)
    config = json.loads((folder / "config.json").read_text())
    for key in ("scaling_factor", "shift_factor"):  # as in the oldest ones
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (KLAutoencoder(tmp_path).scale, KLAutoencoder(tmp_path).shift) == (0.18215, 0.0)


def test_shapes_are_inverses_and_misfits_name_their_key(folder):
    ours = KLAutoencoder(folder)
    assert ours.latent_shape((3, 64, 32)) == (4, 8, 4) and ours.image_shape((4, 8, 4)) == (3, 64, 32)
    for shape, says in (
        ((3, 36, 36), "data.resolution=36: must be a multiple of 8"),
        ((3, 64, 36), "data.resolution=64x36: must be a multiple of 8"),
        ((1, 64, 64), "takes images of 3 channels, the data gives 1: choose autoencoder=identity"),
    ):
        with pytest.raises(ConfigError, match=says):
            ours.latent_shape(shape)
    with pytest.raises(ConfigError, match=r"autoencoder.tile=100: must be a multiple of 32"):
        KLAutoencoder(folder, tile=100).latent_shape((3, 64, 64))


def test_it_works_in_fp32_whatever_the_callers_autocast_and_needs_no_gradient(folder):
    images, ours = pictures(), KLAutoencoder(folder)
    latents = ours.to_latents(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours.to_latents(images)
        assert torch.equal(inside, latents) and inside.dtype == torch.float32
        drawn = ours.to_pixels(latents)
    assert torch.equal(drawn, ours.to_pixels(latents))
    assert not inside.requires_grad and not any(p.requires_grad for p in ours.network.parameters())
    assert not ours.network.training


def test_other_precisions_are_used_when_asked_for(folder, tmp_path, capsys):
    latents = KLAutoencoder(folder).to_latents(pictures())
    rough = KLAutoencoder(folder, precision="bf16")
    found = rough.to_latents(pictures())
    assert rough.network.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert not close(found, latents, 1e-4) and close(found, latents, 0.1)
    assert KLAutoencoder(folder, precision="fp16").network.dtype == torch.float16
    upcast = KLAutoencoder(make_tiny_vae(tmp_path, force_upcast=True), precision="fp16")
    assert upcast.encoding["precision"] == "fp32" and upcast.network.dtype == torch.float32
    assert capsys.readouterr().err.count("autoencoder.precision=fp16") == 1
    assert rough.encoding == {"precision": "bf16", "tile": 1024}
    assert rough.rounding == {"diffusers": diffusers.__version__, "autoencoder.batch_size": 8}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_is_not_tf32(folder, precision):
    def are_exact() -> list[bool]:
        return [getattr(owner, name) == full for owner, name, full in tf32._settings()]

    ours, before, seen = KLAutoencoder(folder, precision=precision), are_exact(), []
    for part in (ours.network.encoder, ours.network.decoder):
        part.register_forward_hook(lambda *_: seen.append(are_exact()))
    ours.to_pixels(ours.to_latents(pictures()))
    assert seen == [[True, True] if precision == "fp32" else before] * 2
    assert are_exact() == before and before[0] is False


def test_an_overflow_is_not_drawn(folder):
    ours = KLAutoencoder(folder, precision="bf16")
    with torch.no_grad():
        ours.network.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(DivergedError, match=r"autoencoder overflows in bf16: set autoencoder.precision=fp32"):
        ours.to_pixels(torch.zeros(1, 4, 4, 4))


def test_results_do_not_depend_on_the_batch_size(folder):
    images = pictures(5)
    whole, parts = KLAutoencoder(folder, batch_size=5), KLAutoencoder(folder, batch_size=2)
    latents = whole.to_latents(images)
    assert close(parts.to_latents(images), latents)
    assert (parts.to_pixels(latents).int() - whole.to_pixels(latents)).abs().max() <= 1


@pytest.mark.parametrize("make", [KLAutoencoder, DCAutoencoder])
def test_large_images_pass_in_tiles_and_others_whole(folder, tmp_path, make):
    path = folder if make is KLAutoencoder else make_tiny_dc(tmp_path)
    small, large = pictures(1, 64), pictures(1, 160)
    whole, tiled = make(path, tile=None), make(path, tile=64)
    assert torch.equal(whole.to_latents(small), tiled.to_latents(small))
    latents = whole.to_latents(large)
    assert tiled.to_latents(large).shape == latents.shape
    assert not torch.equal(tiled.to_latents(large), latents)
    images = tiled.to_pixels(latents)
    assert images.shape == large.shape
    # A tile sees what lies in it alone, so the corner is the corner's own decoding.
    side = 16 // (tiled.factor // 4)
    own = whole.to_pixels(latents[..., :side, :side])
    assert (images[..., :40, :40].int() - own[..., :40, :40]).abs().max() <= 1


@torch.no_grad()
def test_dc_ae_has_latents_and_no_posterior(tmp_path):
    path = make_tiny_dc(tmp_path)
    theirs, ours = AutoencoderDC.from_pretrained(path, low_cpu_mem_usage=False).eval(), DCAutoencoder(path)
    images = pictures()
    latents = theirs.encode(images.float() / 127.5 - 1).latent * 0.4
    assert not ours.is_stochastic and ours.latent_shape((3, 32, 32)) == (8, 8, 8)
    assert close(ours.to_latents(images), latents)
    assert torch.equal(
        ours.to_pixels(latents), IdentityAutoencoder().to_pixels(theirs.decode(latents / 0.4).sample)
    )
    assert ours.fingerprint["kind"] == "DCAutoencoder" and ours.fingerprint["factor"] == 4


def test_weights_load_at_the_first_image_and_a_missing_file_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "vae" / WEIGHTS_FILE).unlink()
    ours = KLAutoencoder(tmp_path / "vae").to(torch.device("cpu"))
    assert ours.latent_shape((3, 32, 32)) == (4, 4, 4) and ours.scale == SCALE
    for use in (
        lambda: ours.to_pixels(torch.zeros(1, 4, 4, 4)),
        lambda: ours.to_latents(pictures()),
        lambda: ours.fingerprint,
    ):
        with pytest.raises(DataError, match=rf"autoencoder.pretrained={tmp_path}/vae: no {WEIGHTS_FILE} in"):
            use()


def test_a_preset_knows_its_shapes_without_any_file_and_is_checked_against_them(folder):
    assert KLAutoencoder("some/where", latent_channels=4, factor=8).latent_shape((3, 32, 32)) == (4, 4, 4)
    with pytest.raises(ConfigError, match=r"autoencoder.latent_channels=16: config.json of .* says 4"):
        KLAutoencoder(folder, latent_channels=16).scale  # noqa: B018


def test_fingerprints_tell_what_decides_latents_and_not_where_it_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere" / "vae")
    mine = KLAutoencoder(folder).fingerprint
    assert mine == KLAutoencoder(tmp_path / "elsewhere", precision="bf16", batch_size=1, tile=None).fingerprint
    assert str(folder) not in json.dumps(mine) and len(mine["sha256"]) == 64
    assert mine != KLAutoencoder(folder, scale=1.0).fingerprint
    other = make_tiny_vae(tmp_path / "other", seed=1, scaling_factor=SCALE, shift_factor=SHIFT)
    assert mine != (before := KLAutoencoder(other).fingerprint)
    shutil.copy(folder / WEIGHTS_FILE, other / WEIGHTS_FILE)
    assert mine == KLAutoencoder(other).fingerprint != before


def test_fingerprints_follow_the_architecture_and_an_exported_copy_keeps_them(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    described = json.loads(config.read_text())
    mine = KLAutoencoder(folder).fingerprint
    config.write_text(json.dumps({**described, "act_fn": "relu"}))
    other = KLAutoencoder(tmp_path / "vae").fingerprint
    assert {key for key in mine if mine[key] != other[key]} == {"config_sha256"}
    told = {"_name_or_path": "x", "_diffusers_version": "0", "sample_size": 9, "force_upcast": True}
    config.write_text(json.dumps(dict(reversed({**described, **told}.items()))))
    assert KLAutoencoder(tmp_path / "vae").fingerprint == mine

    given = KLAutoencoder(tmp_path / "vae", scale=0.3, shift=-1.0)
    (tmp_path / "copy").mkdir()
    for name, content in given.written_out().items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert KLAutoencoder(tmp_path / "copy").fingerprint == given.fingerprint


def test_a_folder_of_a_whole_pipeline_is_searched(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    shutil.copytree(folder, tmp_path / "fine" / "tuned")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for subfolder in ("vae", None, "fine/tuned"):
        assert KLAutoencoder(tmp_path, subfolder=subfolder).fingerprint == KLAutoencoder(folder).fingerprint
    assert KLAutoencoder(tmp_path / "vae", subfolder="vae").scale == SCALE
    with pytest.raises(
        DataError, match=r"autoencoder\.subfolder=vea: no config\.json in .*/vea: set it to null for"
    ):
        KLAutoencoder(tmp_path, subfolder="vea").scale  # noqa: B018
    with pytest.raises(DataError, match=r"autoencoder\.subfolder=fine: no config\.json in .*/fine: put"):
        KLAutoencoder(tmp_path / "fine", subfolder="fine").scale  # noqa: B018
    with pytest.raises(DataError, match="of AutoencoderKL, not AutoencoderDC"):
        DCAutoencoder(folder).scale  # noqa: B018


def test_a_pickle_is_never_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    torch.save(load_file(folder / WEIGHTS_FILE), tmp_path / "vae" / PICKLE_FILE)
    (tmp_path / "vae" / WEIGHTS_FILE).unlink()
    with pytest.raises(DataError, match=f"{PICKLE_FILE}: a pickle.*put {WEIGHTS_FILE} of the same model there"):
        KLAutoencoder(tmp_path / "vae").to_latents(pictures())


def test_files_that_are_damaged_or_of_another_network_are_named(folder, tmp_path, capfd):
    shutil.copytree(folder, tmp_path / "vae")
    weights, config = tmp_path / "vae" / WEIGHTS_FILE, tmp_path / "vae" / "config.json"
    tensors, described = load_file(weights), json.loads(config.read_text())

    def fails(says: str) -> None:
        with pytest.raises(DataError, match=says):
            KLAutoencoder(tmp_path / "vae").to_latents(pictures())

    save_file({name: tensor for name, tensor in tensors.items() if name != "encoder.conv_in.bias"}, weights)
    fails(rf"{WEIGHTS_FILE}: does not fit its config.json \(1 tensors, such as encoder.conv_in.bias\)")
    save_file({**tensors, "colour": torch.zeros(1)}, weights)
    fails("such as colour")
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(f"{WEIGHTS_FILE}: cannot be loaded")
    for content, says in (
        ("{", "not a configuration of diffusers"),
        ("[]", "not a configuration of diffusers"),
        (json.dumps({**described, "latent_channels": None}), "config.json is not whole"),
        (json.dumps({**described, "in_channels": 1}), "takes images of 1 channels"),
    ):
        config.write_text(content)
        fails(says)
    config.unlink()
    fails(r"no config.json there or in vae/: put config.json and diffusion_pytorch_model.safetensors there")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": 0.0}, "scale=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tile": 0}, "tile=0"),
        ({"factor": 0}, "factor=0"),
        ({"latent_channels": -1}, "latent_channels=-1"),
    ],
)
def test_options_that_cannot_work_are_refused(folder, options, says):
    with pytest.raises(ValueError, match=says):
        KLAutoencoder(folder, **options)


def test_what_the_hub_does_not_give_is_one_line_that_says_what_to_put_where(monkeypatch, capfd):
    remedy = f"put config.json and {WEIGHTS_FILE} into a directory and set autoencoder.pretrained=DIRECTORY"
    with pytest.raises(DataError, match=f"autoencoder.pretrained=no-where: no such directory: {remedy}"):
        KLAutoencoder("no-where").scale  # noqa: B018
    asked = []
    monkeypatch.setattr(pretrained, "_answers", lambda url: asked.append(url))
    with pytest.raises(DataError, match=f"=no/where: not found here and the hub cannot be reached: {remedy}"):
        KLAutoencoder("no/where").scale  # noqa: B018
    assert asked and capfd.readouterr() == ("", "")


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    never = threading.Event()

    def hang(*_, **__):
        never.wait(60)
        raise OSError

    monkeypatch.setattr(pretrained, "HUB_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", hang)
    assert not pretrained._answers("https://hub.invalid")
    never.set()


def test_what_the_hub_refuses_is_quoted(monkeypatch):
    def refuse(*_, local_files_only=False, **__):
        raise OSError("not cached" if local_files_only else "gated: ask for access\nand more")

    monkeypatch.setattr(pretrained, "_answers", lambda url: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(DataError, match=r"the hub gives no config.json \(gated: ask for access\): put"):
        KLAutoencoder("no/where").scale  # noqa: B018


def test_files_of_the_hub_are_of_one_revision(monkeypatch, folder, tmp_path):
    snapshot = tmp_path / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    revisions = []

    def cached(repository, name, *, subfolder, revision, **_):
        revisions.append(revision)
        return str(snapshot / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    assert KLAutoencoder("some/where").fingerprint == KLAutoencoder(folder).fingerprint
    assert revisions == [None, "abc"]


def test_an_index_that_names_other_weights_is_refused(tmp_path):
    """diffusers would follow it, past the file whose hash identifies the autoencoder, and to a pickle too."""
    make_tiny_vae(tmp_path / "vae")
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(DataError, match=f"{index.name}: diffusers would load .*: remove it"):
        _ = KLAutoencoder(str(tmp_path / "vae")).fingerprint
