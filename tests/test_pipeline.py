"""The exported pipeline: it loads and samples as diffusers' do, and its samples are ours."""

import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import SMALL_RUN
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from diffussm.cli import main
from diffussm.commands import export
from diffussm.compose import compose
from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.diffusion.guidance import classifier_free_guidance
from diffussm.diffusion.process import predictor
from diffussm.diffusion.samplers import ddim, ddpm
from diffussm.diffusion.schedule import cosine_schedule, linear_schedule
from diffussm.models import DiT
from diffussm.pipeline import DiffuSSMModel, DiffuSSMPipeline, DiTModel, ddpm_scheduler, flow_scheduler
from diffussm.report.model_card import _describe, guidance_scale
from diffussm.training.checkpoint import find_checkpoint

SIZES = {"in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 1}
LABELS = [3, 0, 9]


def network(kind=DiffuSSMModel, **arguments):
    """A small network whose every parameter counts."""
    own = {"d_state": 4} if kind is DiffuSSMModel else {"input_size": 8, "num_heads": 2}
    torch.manual_seed(0)
    model = kind(**{**SIZES, **own, **arguments}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pipeline(model=None, scheduler=None, flow=False, **options) -> DiffuSSMPipeline:
    scheduler = scheduler or ddpm_scheduler(linear_schedule(), clip_x_0=True, **options)
    made = DiffuSSMPipeline(network() if model is None else model, scheduler, image_size=[8, 8], flow=flow)
    made.set_progress_bar_config(disable=True)
    return made


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def stream(count: int, channels: int = 1):
    """The numbers that such generators give, draw by draw, as our samplers ask for them."""
    sources = generators(count)
    return lambda: torch.cat([torch.randn(1, channels, 8, 8, generator=source) for source in sources])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small finished run that was measured."""
    path = tmp_path_factory.mktemp("pipeline") / "run"
    assert main(["train", *SMALL_RUN, f"run_dir={path}"]) == 0
    assert main(["evaluate", f"checkpoint={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def folder(run) -> Path:
    """What `diffussm export` makes of it."""
    path = run.parent / "exported"
    assert main(["export", f"checkpoint={run}", f"to={path}"]) == 0
    return path


def copied(folder: Path, tmp_path: Path, file: str, **changes) -> Path:
    """The folder with other entries in one of its JSON files."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "copy"


def test_the_folder_loads_and_samples_with_the_ordinary_call(folder):
    pipe = DiffuSSMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3, 8], guidance_scale=1.5, num_inference_steps=3).images
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler) and not pipe.transformer.training
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_the_network_is_that_of_the_checkpoint_and_the_file_says_which(run, folder):
    checkpoint = find_checkpoint(run)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    ours, written = checkpoint.tensors("ema_0.998"), load_file(file)
    loaded = DiffuSSMModel.from_pretrained(folder, subfolder="transformer").state_dict()
    assert ours.keys() == written.keys() == loaded.keys()
    assert all(torch.equal(ours[name], written[name]) and torch.equal(ours[name], loaded[name]) for name in ours)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert {name: metadata[name] for name in ("format", "weights", "images", "steps", "checkpoint_sha256")} == {
        "format": "pt", "weights": "ema_0.998", "images": "128", "steps": "8",
        "checkpoint_sha256": checkpoint.sha256,
    }  # fmt: skip
    assert metadata["diffussm_version"]


def test_other_weights_can_be_chosen_and_what_was_measured_with_the_average_is_not_claimed_for_them(run, tmp_path):
    assert main(["export", f"checkpoint={run}", "weights=model", f"to={tmp_path / 'raw'}"]) == 0
    written = load_file(tmp_path / "raw" / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = find_checkpoint(run).tensors("model")
    assert all(torch.equal(ours[name], written[name]) for name in ours)
    card = (tmp_path / "raw" / "README.md").read_text()
    assert "Nothing was measured" in card and "not averaged" in card


def test_the_index_names_our_network_diffusers_scheduler_and_no_autoencoder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffussm.pipeline", "DiffuSSMModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["vae"] == [None, None] and index["image_size"] == [8, 8]


def test_loading_and_changing_the_scheduler_say_nothing(folder):
    code = (
        "import diffusers; diffusers.utils.logging.disable_progress_bar()\n"
        "from diffussm.pipeline import DiffuSSMModel, DiffuSSMPipeline\n"
        f"pipe = DiffuSSMPipeline.from_pretrained({str(folder)!r})\n"
        f"DiffuSSMModel.from_pretrained({str(folder)!r}, subfolder='transformer')\n"
        "pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)\n"
        "pipe.set_progress_bar_config(disable=True); pipe(class_labels=1, num_inference_steps=2)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == result.stderr == ""


def test_saving_and_loading_are_inverses(tmp_path):
    first = pipeline(network(DiTModel))
    first.save_pretrained(tmp_path)
    second = DiffuSSMPipeline.from_pretrained(tmp_path)
    second.set_progress_bar_config(disable=True)
    assert isinstance(second.transformer, DiT)
    drawn = [pipe(LABELS, 1.5, 4, generators(3), output_type="latent").images for pipe in (first, second)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("num_steps", [10, 27])
@pytest.mark.parametrize("scale", [1.0, 1.5, 0.0])
@pytest.mark.parametrize(("kind", "make"), [(DiffuSSMModel, linear_schedule), (DiTModel, cosine_schedule)])
def test_its_samples_are_those_of_our_ddpm(kind, make, scale, num_steps):
    model, noise = network(kind), stream(3)
    denoiser = model if scale == 1.0 else classifier_free_guidance(model, scale, model.null_label)
    predict = predictor(denoiser, make())
    ours = ddpm(predict, make(), noise(), torch.tensor(LABELS), noise, num_steps=num_steps, clip_x_0=True)
    pipe = pipeline(model, ddpm_scheduler(make(), clip_x_0=True))
    theirs = pipe(LABELS, scale, num_steps, generators(3), output_type="latent").images
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("ours", "theirs"), [("beta", "fixed_large"), ("beta_tilde", "fixed_small")])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_fixed_variances_and_unclipped_samples_are_ours_too(ours, theirs, learn_sigma):
    model, noise = network(learn_sigma=learn_sigma), stream(3)
    predict = predictor(model, linear_schedule())
    x = ddpm(predict, linear_schedule(), noise(), torch.tensor(LABELS), noise, num_steps=10, variance=ours)
    pipe = pipeline(model, ddpm_scheduler(linear_schedule(), variance_type=theirs))
    images = pipe(LABELS, num_inference_steps=10, generator=generators(3), output_type="latent").images
    assert (x - images).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_rectified_flow_is_integrated_in_equal_steps(scale):
    model, x = network(learn_sigma=False), stream(3)()
    velocity = model if scale == 1.0 else classifier_free_guidance(model, scale, model.null_label)
    pipe = pipeline(model, flow_scheduler(), flow=True)
    images = pipe(LABELS, scale, 5, latents=x, output_type="latent").images
    for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        x = x - velocity(x, torch.full((3,), 1000 * t), torch.tensor(LABELS)) / 5
    assert (x - images).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_of_its_own_generator_does_not_depend_on_the_batch(guidance):
    pipe = pipeline()
    whole = pipe(LABELS, guidance, 6, generators(3), output_type="latent").images
    for index, label in enumerate(LABELS):
        alone = pipe(label, guidance, 6, generators(1, first=index), output_type="latent").images
        assert (alone[0] - whole[index]).abs().max() < 1e-5


def test_given_latents_are_where_sampling_begins():
    pipe, x = pipeline(), stream(3)()
    drawn = pipe(LABELS, 1.0, 4, generators(3), output_type="latent").images
    rest = generators(3)
    for generator in rest:
        torch.randn(1, 1, 8, 8, generator=generator)
    assert torch.equal(pipe(LABELS, 1.0, 4, rest, latents=x, output_type="latent").images, drawn)


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_another_scheduler_is_given_the_prediction_alone(name, channels):
    pipe = pipeline(network(in_channels=channels))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = [pipe(LABELS, 1.5, 5, generators(3), output_type="pt").images for _ in range(2)]
    assert images[0].shape == (3, channels, 8, 8) and torch.equal(*images)


def test_ddim_needs_the_trailing_timesteps_that_the_card_recommends():
    model, x = network(), stream(3)()
    predict = predictor(model, linear_schedule())
    ours = ddim(predict, linear_schedule(), x, torch.tensor(LABELS), lambda: x, num_steps=10, spacing="trailing")
    pipe = pipeline(model, ddpm_scheduler(linear_schedule()))
    errors = []
    for spacing in ("trailing", "linspace"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
        theirs = pipe(LABELS, num_inference_steps=10, latents=x, output_type="latent").images
        errors.append((ours - theirs).abs().max() / ours.abs().max())
    assert errors[0] < 1e-4 < 1e-2 < errors[1]


def test_a_scheduler_that_scales_noise_and_input_finds_our_samples():
    """Euler's method in x / sqrt(alphabar) is DDIM."""
    model, x = network(), stream(3)()
    predict = predictor(model, linear_schedule())
    ours = ddim(predict, linear_schedule(), x, torch.tensor(LABELS), lambda: x, num_steps=10, spacing="trailing")
    config = {**ddpm_scheduler(linear_schedule()).config, "timestep_spacing": "trailing"}
    pipe = pipeline(model, diffusers.EulerDiscreteScheduler.from_config(config))
    theirs = pipe(LABELS, num_inference_steps=10, latents=x, output_type="latent").images
    assert (ours - theirs).abs().max() < 1e-2 * ours.abs().max()


def test_pictures_are_quantised_as_ours_and_the_other_outputs_lie_in_0_to_1():
    pipe = pipeline(network(in_channels=3))
    drawn = {kind: pipe(LABELS, 1.0, 4, generators(3), output_type=kind).images for kind in ("latent", "pt", "np")}
    pictures = pipe(LABELS, 1.0, 4, generators(3), return_dict=False)[0]
    expected = IdentityAutoencoder().to_pixels(drawn["latent"])
    for picture, pixels in zip(pictures, expected, strict=True):
        assert picture.mode == "RGB" and picture.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()
    assert drawn["pt"].shape == (3, 3, 8, 8) and drawn["np"].shape == (3, 8, 8, 3)
    assert torch.equal(drawn["pt"], torch.from_numpy(drawn["np"]).permute(0, 3, 1, 2))
    assert drawn["pt"].min() >= 0 and drawn["pt"].max() <= 1


def test_an_unconditional_network_takes_a_number_of_images():
    pipe = pipeline(network(num_classes=None))
    assert len(pipe(num_images=3, num_inference_steps=2).images) == 3
    assert len(pipe(num_inference_steps=2).images) == 1
    for call, says in (
        ({"class_labels": [1]}, "class_labels=.*unconditional"),
        ({"num_images": 0}, "num_images=0"),
        ({"guidance_scale": 2.0}, r"guidance_scale=2\.0: .*no null label"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(**call)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, r"class_labels=None: give a class per image, each in 0\.\.9"),
        ({"class_labels": [10]}, r"class_labels=\[10\]: each must lie in 0\.\.9"),
        ({"class_labels": []}, "class_labels="),
        ({"class_labels": [0.5]}, "class_labels="),
        ({"class_labels": 1, "num_images": 2}, "num_images=2: follows from class_labels"),
        ({"class_labels": 1, "output_type": "jpeg"}, "output_type=jpeg: choose pil, np, pt, latent"),
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"class_labels": 1, "num_inference_steps": 1}, "num_inference_steps=1: would begin at timestep 0"),
        ({"class_labels": 1, "guidance_scale": -1.0}, "guidance_scale=-1.0: must be at least 0"),
        ({"class_labels": "3"}, "class_labels='3': give numbers"),
        ({"class_labels": LABELS, "generator": generators(2)}, "2 generators for 3 images"),
        (
            {"class_labels": 1, "latents": torch.zeros(1, 1, 4, 4)},
            r"latents: \(1, 1, 4, 4\) must be \(1, 1, 8, 8\)",
        ),
        ({"class_labels": 1, "latents": torch.full((1, 1, 8, 8), torch.nan)}, "not finite"),
    ],
)
def test_calls_that_cannot_work_say_why(call, says):
    with pytest.raises(ValueError, match=says):
        pipeline()(**{"num_inference_steps": 2, **call})


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"transformer": ["os", "system"]}, r"transformer=\['os', 'system'\]: not built here"),
        ("model_index.json", {"transformer": ["diffusers", "DiTTransformer2DModel"]}, "not built here"),
        ("model_index.json", {"scheduler": ["antigravity", "DDPMScheduler"]}, "not built here"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "not built here"),
        ("model_index.json", {"_class_name": ["evil", "DiffuSSMPipeline"]}, "no folder of DiffuSSMPipeline"),
        ("transformer/config.json", {"_class_name": "subprocess.Popen"}, "no arguments of DiffuSSMModel"),
        ("transformer/config.json", {"_class_name": "DiTModel"}, "no arguments of DiffuSSMModel"),
    ],
)
def test_a_folder_that_names_foreign_classes_is_refused(folder, tmp_path, file, changes, says):
    with pytest.raises(ValueError, match=says):
        DiffuSSMPipeline.from_pretrained(copied(folder, tmp_path, file, **changes))
    assert "antigravity" not in sys.modules


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    copy = copied(folder, tmp_path, "model_index.json")
    (copy / "transformer" / "diffussm.pipeline.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"diffussm\.pipeline\.py: weights need no code"):
        DiffuSSMPipeline.from_pretrained(copy)


def test_what_diffusers_cannot_do_with_our_networks_is_said(folder):
    with pytest.raises(ValueError, match="low_cpu_mem_usage=True"):
        DiffuSSMPipeline.from_pretrained(folder, low_cpu_mem_usage=True)
    for wrong in (pipeline(scheduler=flow_scheduler()), pipeline(flow=True)):
        with pytest.raises(ValueError, match="scheduler: the network was trained by"):
            wrong([1])
    with pytest.raises(ValueError, match="image_size=None"):
        DiffuSSMPipeline(network(), ddpm_scheduler(linear_schedule()))
    with pytest.raises(ValueError, match="vae: "):
        DiffuSSMPipeline(network(), ddpm_scheduler(linear_schedule()), vae=object(), image_size=[8, 8])


def test_the_card_tells_what_the_checkpoint_knows(run, folder):
    card = (folder / "README.md").read_text()
    checkpoint = find_checkpoint(run)
    head = card.split("---")[1]
    assert "library_name: diffusers" in head and "- state-space-model" in head and "license" not in head
    results = json.loads((run / "results.json").read_text())
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors("ema_0.998").values())
    for fact in (
        f"DiffuSSM, {parameters:,} parameters", "hidden_size=16", "grey images of 8x8 pixels, of 10 classes",
        "source=digits, split=train", "num_images=1437", "| images seen | 128 |", "| steps | 8 |",
        "| batch size | 16 |", "adamw (lr=0.008, ssm_lr=0.001", "decay 0.998", "DDPMObjective (loss=hybrid",
        "linear_schedule (num_timesteps=1000, beta_start=0.0001", "| precision | fp32 |", checkpoint.sha256,
        f"torch {torch.__version__.partition('+')[0]}", "diffussm 0.", "ddim (num_steps=2",
        "ClassifierFree (scale=1.25",
        f"{results['metrics']['FID-digits']:.4g}", "| these weights | 64 |", "| real against real | 360 |",
        results["request"]["reference"]["sha256"], "not comparable with FID", "arxiv.org/abs/2311.18257",
    ):  # fmt: skip
        assert fact in card, fact
    assert str(run) not in card and str(Path.cwd()) not in card


def test_the_code_on_the_card_runs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code[1], names)
    assert len(names["images"]) == 4


def test_the_card_prefers_what_the_runs_own_sampler_drew_and_tells_the_bound(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = f"checkpoint={tmp_path / 'run'}"
    assert main(["evaluate", checkpoint, "sampler.num_steps=3"]) == 0
    assert main(["evaluate", checkpoint, "metrics=[vlb]", "likelihood_images=2"]) == 0
    bound = json.loads((tmp_path / "run" / "results.json").read_text())["image_metrics"]["vlb"]
    assert main(["export", checkpoint, f"to={tmp_path / 'out'}"]) == 0
    results = (tmp_path / "out" / "README.md").read_text().partition("## Results")[2]
    assert "ddim (num_steps=2" in results and "num_steps=3" not in results
    assert f"Variational bound: {bound:.4g} bits per dimension on 2 images (source=digits" in results


def test_results_of_another_checkpoint_are_not_claimed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # results.json is about it
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured" in card and "FID" not in card


def test_a_card_of_imported_weights_claims_no_training(in_tmp):
    torch.save(network(DiTModel).state_dict(), "dit.pt")
    arguments = ["import", "dit.pt", "model.num_heads=2", "experiment=digits_dit", "name=dit"]
    assert main(arguments) == 0
    assert main(["export", "checkpoint=runs/dit", "to=dit"]) == 0
    card = Path("dit/README.md").read_text()
    assert "imported weights: dit.pt" in card and "not recorded here" in card and "2212.09748" in card
    assert "adamw" not in card and "batch size" not in card
    pipe = DiffuSSMPipeline.from_pretrained("dit")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe([1], num_inference_steps=2).images) == 1


def test_guidance_of_the_run_is_read_in_one_place():
    assert guidance_scale(OmegaConf.to_container(compose("train", ["experiment=digits"]))) == 1.25


def test_a_card_does_not_tell_where_a_companion_lies():
    guidance = {"_target_": "diffussm.diffusion.guidance.Classifier", "scale": 2.0}
    configured = _describe({**guidance, "checkpoint": "somewhere/classifier"})
    measured = _describe({**guidance, "checkpoint": {"path": "somewhere/else", "sha256": "abc"}})
    assert configured == "Classifier (scale=2.0, checkpoint=another run)"
    assert measured == "Classifier (scale=2.0, checkpoint=SHA-256 abc)"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"variance_type": "learned_range", "clip_sample": True, "prediction_type": "epsilon"}),
        (["sampler.clip_x_0=false"], {"clip_sample": False, "timestep_spacing": "linspace"}),
        (["model.learn_sigma=false"], {"variance_type": "fixed_small"}),
        (["model.learn_sigma=false", "sampler=ddpm", "sampler.variance=beta"], {"variance_type": "fixed_large"}),
        (["objective.prediction=x_0"], {"prediction_type": "sample"}),
        (["objective.prediction=v"], {"prediction_type": "v_prediction"}),
        (["diffusion=cosine", "diffusion.num_timesteps=500"], {"num_train_timesteps": 500}),
        (
            ["objective=flow", "sampler=flow_heun"],
            {"num_train_timesteps": 1000, "shift": 1.0},
        ),
        (
            ["objective=flow", "sampler=flow_heun", "diffusion.reference_pixels=16"],
            {"num_train_timesteps": 1000, "shift": 2.0},
        ),
    ],
)
def test_the_scheduler_follows_from_the_run(overrides, expected):
    clip = [] if any("sampler" in override for override in overrides) else ["sampler.clip_x_0=true"]
    scheduler = export._make_scheduler(compose("train", ["experiment=digits", *overrides, *clip]), (1, 8, 8))
    assert expected.items() <= dict(scheduler.config).items()
    flows = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert flows == ("objective=flow" in overrides)


def test_a_failed_write_leaves_nothing_and_a_killed_one_is_no_obstacle(run, tmp_path, monkeypatch, capsys):
    write, calls = export.write_and_sync, itertools.count(1)

    def full(path, content):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(export, "write_and_sync", full)
    arguments = ["export", f"checkpoint={run}", f"to={tmp_path / 'out'}"]
    assert main(arguments) == 74
    assert f"to={tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "write_and_sync", write)
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").touch()
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == [
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"prediction": "score"}}, "diffusers knows no objective.prediction=score"),
        ({"model": {"_target_": "torch.nn.Linear", "in_features": 1}}, "knows DiT and DiffuSSM, not Linear"),
    ],
)
def test_models_that_are_no_pipeline_are_refused(run, tmp_path, monkeypatch, capsys, changes, says):
    opened = export.open_checkpoint

    def forged(options):
        checkpoint, trained, config = opened(options)
        if "model" in changes:
            trained.model = {"out_features": 1}
        return checkpoint, OmegaConf.merge(trained, changes), config

    monkeypatch.setattr(export, "open_checkpoint", forged)
    assert main(["export", f"checkpoint={run}", f"to={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"layout=pipeline: {says}" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_an_index_of_other_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipe")
    (tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: weights are in one file each: remove it"):
        DiffuSSMPipeline.from_pretrained(tmp_path / "pipe")
