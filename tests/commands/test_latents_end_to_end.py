"""Diffusion of a frozen autoencoder's latents from end to end: train, sample, evaluate, export, import."""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from data.tiny_vae import make_tiny_dc, make_tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file

from diffussm.cli import main
from diffussm.data.autoencoder import DCAutoencoder, KLAutoencoder
from diffussm.data.pretrained import PICKLE_FILE, WEIGHTS_FILE
from diffussm.models import DiT
from diffussm.runtime.errors import ConfigError
from diffussm.training.checkpoint import find_checkpoint, seal


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Twelve pictures of 32x32 in two classes, two VAEs, and a finished run on the latents of the first."""
    path = tmp_path_factory.mktemp("latents")
    for index in range(12):
        folder = path / "images" / ("cats", "dogs")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (20 * index, 255 - 20 * index, 90)).save(folder / f"{index}.png")
    make_tiny_vae(path / "vae", scaling_factor=0.7, shift_factor=0.1, force_upcast=True)
    config = path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": str(path)}))
    make_tiny_vae(path / "other", seed=1)
    assert main(train(path)) == 0
    return path


def train(place: Path, *overrides: str) -> list[str]:
    """Arguments of a small run on the latents of place/vae."""
    small = [override for override in SMALL_RUN if not override.startswith("evaluation.")]
    return [
        "train", *small, f"run_dir={place / 'run'}", "data=image_folder", f"data.path={place / 'images'}",
        "data.resolution=32", "data.horizontal_flip=false", "autoencoder=kl",
        f"autoencoder.pretrained={place / 'vae'}", "model.in_channels=4", "model.num_classes=2",
        "sampler.clip_x_0=false", "evaluation=none", *overrides,
    ]  # fmt: skip


def refused(capsys, arguments: list[str], code: int) -> str:
    """The one line that these arguments end in."""
    capsys.readouterr()
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err


@pytest.fixture(scope="module")
def encoded(place) -> Path:
    """The pictures as a latent set of place/vae."""
    data = ["data=image_folder", f"data.path={place / 'images'}", "data.resolution=32", "num_workers=0"]
    arguments = ["encode", *data, "autoencoder=kl", f"autoencoder.pretrained={place / 'vae'}", "device=cpu"]
    assert main([*arguments, f"to={place / 'encoded'}"]) == 0
    return place / "encoded"


def train_on(encoded: Path, place: Path, *overrides: str) -> list[str]:
    """Arguments of a small run on a latent set, without a word of the autoencoder."""
    kept = [one for one in train(place) if not one.startswith(("data", "autoencoder", "run_dir"))]
    return [*kept, "data=latents", f"data.path={encoded}", "run_dir=run", *overrides]


def copy_with(encoded: Path, to: Path, **changes) -> Path:
    """A copy of a latent set whose manifest says something else."""
    manifest = json.loads((encoded / "manifest.json").read_text())
    shutil.copytree(encoded, to)
    (to / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return to


def test_training_on_a_latent_set_wants_the_autoencoder_that_encoded_it(place, encoded, in_tmp, capsys):
    kl = f"autoencoder.pretrained={place / 'vae'}"
    dc = ["autoencoder=dc_ae", f"autoencoder.pretrained={make_tiny_dc(place / 'dc')}"]
    dc += ["autoencoder.latent_channels=8", "autoencoder.factor=4"]
    for given, name in (([], "identity"), (dc, "DCAutoencoder")):
        said = refused(capsys, train_on(encoded, place, *given), 65)
        assert f"another autoencoder (kind: KLAutoencoder there, {name} here): add autoencoder=kl" in said
    other = ["autoencoder=kl", f"autoencoder.pretrained={place / 'other'}"]
    assert "autoencoder (sha256: " in refused(capsys, train_on(encoded, place, *other), 65)
    assert "model.in_channels=3: the data gives 4" in refused(
        capsys, train_on(encoded, place, "autoencoder=kl", kl, "model.in_channels=3"), 2
    )
    assert list(in_tmp.iterdir()) == []
    assert main(train_on(encoded, place, "autoencoder=kl", kl, "trainer.total_images=32")) == 0


def test_a_latent_set_that_contradicts_itself_is_refused(place, encoded, in_tmp, capsys):
    kl = ["autoencoder=kl", f"autoencoder.pretrained={place / 'vae'}"]
    narrow = copy_with(encoded, place / "narrow", latent_shape=[4, 2, 8])
    said = refused(capsys, train_on(narrow, place, *kl), 65)
    assert "holds latents of (4, 2, 8), the autoencoder makes (4, 4, 4) of images of (3, 32, 32)" in said

    def relabelled(name: str, label: int) -> Path:
        labels = np.load(encoded / "labels.npy")
        labels[5] = label
        content = io.BytesIO()
        np.save(content, labels)
        entry = {"size": len(content.getvalue()), "sha256": hashlib.sha256(content.getvalue()).hexdigest()}
        copy = copy_with(encoded, place / name, labels=entry)
        (copy / "labels.npy").write_bytes(content.getvalue())
        return copy

    for name, label, span in (("high", 2, "0 to 2"), ("none", -1, "-1 to 1")):
        said = refused(capsys, train_on(relabelled(name, label), place, *kl), 65)
        assert f"its labels run from {span}, those of model.num_classes=2 from 0 to 1: encode" in said
    assert list(in_tmp.iterdir()) == []


def drawn(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("0*.png"))]


def test_a_checkpoint_records_the_autoencoder_and_pictures_have_the_size_of_images(place):
    checkpoint = find_checkpoint(place / "run")
    data = checkpoint.document("train_state")["data"]
    assert data["autoencoder"] == KLAutoencoder(place / "vae").fingerprint
    assert data["image_shape"] == [3, 32, 32] and str(place) not in json.dumps(data)
    with Image.open(place / "run" / "samples" / "images-000000000128.png") as grid:
        assert grid.size[0] > 10 * 32


def test_samples_are_decoded_by_the_same_vae_wherever_it_is(place, tmp_path):
    arguments = ["sample", f"checkpoint={place / 'run'}", "num_images=4"]
    assert main([*arguments, f"out={tmp_path / 'here'}"]) == 0
    with Image.open(tmp_path / "here" / "000000.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
    shutil.copytree(place / "vae", tmp_path / "pipeline" / "vae")
    moved = [*arguments, f"autoencoder.pretrained={tmp_path / 'pipeline'}"]
    assert main([*moved, f"out={tmp_path / 'there'}"]) == 0
    assert drawn(tmp_path / "there") == drawn(tmp_path / "here")
    assert main([*moved, f"out={tmp_path / 'here'}"]) == 0  # the same request


@pytest.mark.fault("G15")
def test_another_vae_is_refused_with_both_named(place, in_tmp, capsys):
    ours, theirs = (KLAutoencoder(place / name).fingerprint["sha256"][:12] for name in ("other", "vae"))
    other = f"autoencoder.pretrained={place / 'other'}"
    for verb in ("sample", "export"):
        said = refused(capsys, [verb, f"checkpoint={place / 'run'}", other], 2)
        assert f"KLAutoencoder sha256={ours}" in said and f"trained with KLAutoencoder sha256={theirs}" in said
    rescaled = refused(capsys, ["sample", f"checkpoint={place / 'run'}", "autoencoder.scale=0.5"], 2)
    assert "scale=0.5" in rescaled and "scale=0.7" in rescaled
    identity = refused(capsys, ["sample", f"checkpoint={place / 'run'}", "autoencoder=identity"], 2)
    assert "autoencoder: IdentityAutoencoder, but" in identity and "is for KLAutoencoder" in identity
    assert list(in_tmp.iterdir()) == []


@pytest.mark.fault("G15")
def test_training_continues_with_the_same_vae_only(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "vae", tmp_path / "vae")
    longer = train(place, f"run_dir={tmp_path / 'run'}", "trainer.total_images=144")
    assert main([*longer, f"autoencoder.pretrained={place / 'other'}"]) == 73
    said = capsys.readouterr().err.splitlines()[-1]
    shas = [KLAutoencoder(place / name).fingerprint["sha256"] for name in ("vae", "other")]
    assert all(sha in said for sha in shas) and "restore the data" in said
    assert main([*longer, f"autoencoder.pretrained={tmp_path / 'vae'}"]) == 0  # it may have moved
    assert main([*longer, "autoencoder.scale=0.5"]) == 2
    assert "autoencoder.scale: None -> 0.5" in capsys.readouterr().err


def test_what_latents_do_not_allow_is_refused(place, in_tmp, capsys):
    run = f"checkpoint={place / 'run'}"
    assert "latents are not bounded" in refused(capsys, ["sample", run, "sampler.clip_x_0=true"], 2)
    assert "bits per dimension are of pixels" in refused(capsys, ["evaluate", run, "metrics=[vlb]"], 2)
    assert "nothing to compare samples with" in refused(capsys, ["evaluate", run], 2)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["autoencoder.pretrained=no-where"], 65, "autoencoder.pretrained=no-where: no such directory: put"),
        (["data.path=5"], 2, "data.path=5: must be text or a path"),
        (["data.resolution=36"], 2, "data.resolution=36: must be a multiple of 8, the autoencoder's factor"),
        (["model.in_channels=3"], 2, "model.in_channels=3: the data gives 4 channel(s)"),
        (["autoencoder.precision=fp8"], 2, "autoencoder.precision=fp8: must be one of fp32, bf16, fp16"),
        (["autoencoder.batch_size=0"], 2, "autoencoder.batch_size=0: must be at least 1"),
        (["autoencoder.factor=4"], 2, "autoencoder.factor=4: config.json of"),
        (["sampler.clip_x_0=true"], 2, "sampler.clip_x_0=True: latents are not bounded"),
    ],
)
def test_a_run_that_cannot_be_ends_in_one_line_before_anything_is_created(
    place, in_tmp, capsys, overrides, code, says
):
    assert says in refused(capsys, train(place, "run_dir=run", *overrides), code)
    assert list(in_tmp.iterdir()) == []


def test_weights_that_are_missing_or_pickled_end_training_before_it_begins(place, in_tmp, capsys):
    shutil.copytree(place / "vae", "vae")
    (Path("vae") / WEIGHTS_FILE).unlink()
    arguments = train(place, "run_dir=run", "autoencoder.pretrained=vae")
    assert f"no {WEIGHTS_FILE} in vae: put it there" in refused(capsys, arguments, 65)
    torch.save(load_file(place / "vae" / WEIGHTS_FILE), Path("vae") / PICKLE_FILE)
    assert f"vae/{PICKLE_FILE}: a pickle" in refused(capsys, arguments, 65)
    assert [path.name for path in in_tmp.iterdir()] == ["vae"]


def test_a_checkpoint_that_does_not_tell_its_vae_is_taken_at_its_word(place, tmp_path):
    checkpoint = Path(shutil.copytree(find_checkpoint(place / "run").path, tmp_path / "step-000000000008"))
    state = json.loads((checkpoint / "train_state.json").read_text())
    del state["data"]["autoencoder"]
    content, manifest = json.dumps(state).encode(), json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "train_state.json").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["train_state.json"] = entry
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert main(["sample", f"checkpoint={checkpoint}", "num_images=1", f"out={tmp_path / 'out'}"]) == 0


def test_autoguidance_wants_a_companion_of_the_same_vae(place, tmp_path, capsys):
    arguments = ["sample", f"checkpoint={place / 'run'}", "num_images=2", "guidance=autoguidance"]
    shutil.copytree(place / "vae", tmp_path / "moved")
    for name, pretrained in (("same", tmp_path / "moved"), ("foreign", place / "other")):
        assert main(train(place, f"run_dir={tmp_path / name}", f"autoencoder.pretrained={pretrained}")) == 0
    assert main([*arguments, f"guidance.checkpoint={tmp_path / 'same'}", f"out={tmp_path / 'out'}"]) == 0
    capsys.readouterr()
    assert main([*arguments, f"guidance.checkpoint={tmp_path / 'foreign'}", f"out={tmp_path / 'no'}"]) == 2
    assert "was trained with KLAutoencoder sha256=" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(place) -> Path:
    """The run as a pipeline."""
    path = place / "exported"
    assert main(["export", f"checkpoint={place / 'run'}", f"to={path}"]) == 0
    return path


def test_a_pipeline_decodes_with_the_vae_that_it_carries(place, folder, tmp_path):
    from diffussm.pipeline import DiffuSSMPipeline

    pipe = DiffuSSMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.7, 0.1)
    options = {"class_labels": [0, 1, 1], "num_inference_steps": 3}

    def generators():
        return [torch.Generator().manual_seed(index) for index in range(3)]

    latents = pipe(**options, generator=generators(), output_type="latent").images
    assert latents.shape == (3, 4, 4, 4)
    expected = KLAutoencoder(place / "vae").to_pixels(latents)
    pictures = pipe(**options, generator=generators()).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 3
    for picture, pixels in zip(pictures, expected, strict=True):
        assert picture.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()
    assert load_file(folder / "vae" / WEIGHTS_FILE).keys() == load_file(place / "vae" / WEIGHTS_FILE).keys()
    pipe.vae.half()
    again = pipe(**options, generator=generators()).images
    assert pipe.vae.dtype == torch.float32  # for its config.json says that fp16 overflows
    assert all(a.size == b.size for a, b in zip(pictures, again, strict=True))
    pipe.save_pretrained(tmp_path / "again")
    again = DiffuSSMPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**options, generator=generators(), output_type="latent").images, latents)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_other_schedulers_keep_all_four_channels(folder, name):
    import diffusers

    from diffussm.pipeline import DiffuSSMPipeline

    pipe = DiffuSSMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert len(pipe([0, 1], num_inference_steps=3).images) == 2


def test_times_of_an_exported_flow_are_shifted_by_the_size_of_latents(place, tmp_path):
    flow = ["objective=flow", "sampler=flow_heun", "diffusion=rectified_flow", "diffusion.reference_pixels=4"]
    arguments = train(place, *flow, "model.learn_sigma=false", "trainer.total_images=16")
    assert main([*arguments, f"run_dir={tmp_path / 'run'}"]) == 0
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'out'}"]) == 0
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 2  # sqrt(4 x 4 / 4)


def test_an_exported_folder_serves_as_the_autoencoder_and_tells_which_it_is(place, folder, tmp_path):
    arguments = ["sample", f"checkpoint={place / 'run'}", "num_images=1", f"out={tmp_path / 'out'}"]
    assert main([*arguments, f"autoencoder.pretrained={folder}"]) == 0
    card, sha256 = (folder / "README.md").read_text(), KLAutoencoder(place / "vae").fingerprint["sha256"]
    for fact in (
        "colour images of 32x32 pixels",
        "as latents of 4 channels and 1/8 of the sides",
        sha256,
        "scale=0.7",
    ):
        assert fact in card, fact
    for file in folder.rglob("*.*"):
        if file.suffix in (".md", ".json"):
            assert str(place) not in file.read_text(), file
    assert re.search(r"kind=KLAutoencoder", card) and "without an autoencoder" not in card


def test_a_pipeline_is_not_loaded_from_pickles(folder, tmp_path):
    from diffussm.pipeline import DiffuSSMPipeline

    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "vae" / WEIGHTS_FILE
    torch.save(load_file(weights), weights.with_name(PICKLE_FILE))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        DiffuSSMPipeline.from_pretrained(tmp_path / "copy")


def public_weights(channels: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "input_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2}
    return DiT(in_channels=channels, **sizes).state_dict()


def test_imported_weights_of_four_channels_draw_images_once_the_vae_is_there(place, in_tmp, capsys):
    save_file(public_weights(), "dit.safetensors")
    assert main(["import", "dit.safetensors"]) == 0  # with no VAE in sight
    assert "autoencoder=sd_vae_ft_ema, as for DiT's own weights" in capsys.readouterr().err
    checkpoint = find_checkpoint(Path("runs/dit"))
    assert checkpoint.document("train_state")["data"] == {"image_shape": [3, 32, 32]}
    sample = ["sample", "checkpoint=runs/dit", "num_images=1", "sampler.num_steps=2", "sampling.batch_size=1"]
    assert "no such directory: put" in refused(capsys, [*sample, "autoencoder.pretrained=no-where"], 65)
    assert main([*sample, f"autoencoder.pretrained={place / 'vae'}", "out=drawn"]) == 0
    with Image.open("drawn/000000.png") as image:
        assert image.size == (32, 32)
    assert "import it anew with this one" in refused(capsys, [*sample, "autoencoder=dc_ae"], 2)


def test_import_asks_for_an_autoencoder_that_fits(in_tmp, capsys):
    save_file(public_weights(16), "dit16.safetensors")
    assert main(["import", "dit16.safetensors"]) == 0
    assert "such as autoencoder=sd3_vae" in capsys.readouterr().err
    assert main(["import", "dit16.safetensors", "autoencoder=flux_vae", "name=flux"]) == 0
    assert capsys.readouterr().err == ""
    said = refused(capsys, ["import", "dit16.safetensors", "autoencoder=sdxl_vae", "name=sdxl"], 2)
    assert "model.in_channels=16: the data gives 4 channel(s)" in said


def test_a_run_on_dc_ae_trains_draws_and_exports(place, tmp_path):
    from diffussm.pipeline import DiffuSSMPipeline

    dc = ["autoencoder=dc_ae", f"autoencoder.pretrained={make_tiny_dc(tmp_path / 'dc')}"]
    dc += [
        "autoencoder.latent_channels=8",
        "autoencoder.factor=4",
        "model.in_channels=8",
        "trainer.total_images=32",
    ]
    arguments = [argument for argument in train(place) if not argument.startswith("autoencoder")]
    assert main([*arguments, *dc, f"run_dir={tmp_path / 'run'}"]) == 0
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'out'}"]) == 0
    pipe = DiffuSSMPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=2).images[0].size == (32, 32)
    shifted = DCAutoencoder(tmp_path / "dc", shift=0.5)
    with pytest.raises(ConfigError, match=r"autoencoder.shift=0.5: AutoencoderDC of diffusers has none"):
        shifted.written_out()
