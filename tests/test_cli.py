"""The command line: help, refusals in one line with nothing created, and the verbs in a real process."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from diffussm.cli import main
from diffussm.commands.sample import choose_classes
from diffussm.compose import group_options
from diffussm.config import TrainConfig
from diffussm.evaluation.features import DIGITS_WEIGHTS
from diffussm.evaluation.generate import choose_labels
from diffussm.models import DiT
from diffussm.models.layouts import to_diffusers
from diffussm.training.checkpoint import seal

DIGITS = ("train", "experiment=digits")
NO_WEIGHTS, WITH_WIDTH = "evaluation.extractor.weights=nowhere.pth", "evaluation.extractor.precision=fp8"
DIGITS_DIT = ("train", "experiment=digits_dit")
BAD_INPUT = [
    # arguments, exit code, what the line says
    ((*DIGITS, "trainer.batch_sise=8"), 2, r"trainer.batch_sise: no such key (did you mean batch_size?)"),
    ((*DIGITS, "trainer.batch_size=abc"), 2, "trainer.batch_size: Value 'abc'"),
    ((*DIGITS, "trainer.batch_size=0"), 2, "trainer.batch_size=0: must be at least 1"),
    ((*DIGITS, "trainer.total_images=many"), 2, "trainer.total_images=many: must be a whole number"),
    ((*DIGITS, "trainer.save_every_images=0"), 2, "trainer.save_every_images=0"),
    ((*DIGITS, "trainer.log_every_images=1.5"), 2, "trainer.log_every_images"),
    ((*DIGITS, "trainer.sample_every_images=0"), 2, "trainer.sample_every_images=0"),
    ((*DIGITS, "trainer.device_batch_size=0"), 2, "trainer.device_batch_size=0"),
    ((*DIGITS, "trainer.keep_checkpoints=0"), 2, "trainer.keep_checkpoints=0"),
    ((*DIGITS, "trainer.num_workers=-1"), 2, "trainer.num_workers=-1"),
    ((*DIGITS, "trainer.max_grad_norm=-1"), 2, "trainer.max_grad_norm=-1"),
    ((*DIGITS, "trainer.ema_decays=[1.5]"), 2, "trainer.ema_decays=[1.5]"),
    ((*DIGITS, "trainer.ema_decays=[]"), 2, "trainer.ema_decays=[]"),
    ((*DIGITS, "trainer.parallel=fdsp"), 2, "trainer.parallel=fdsp: choose ddp, fsdp (did you mean fsdp?)"),
    ((*DIGITS, "trainer.precision=fp23"), 2, "choose bf16, fp16, fp32 (did you mean fp"),
    ((*DIGITS, "optimizer.lr=nan"), 2, "optimizer.lr=nan: must be a finite number"),
    ((*DIGITS, "optimizer.lr=-1"), 2, "optimizer.lr=-1"),
    ((*DIGITS, "optimizer.lr=fast"), 2, "optimizer.lr=fast: must be a number"),
    ((*DIGITS, "optimizer.lrr=1"), 2, "optimizer.lrr: no such key (did you mean lr?)"),
    ((*DIGITS, "optimizer.ssm_lr=inf"), 2, "optimizer.ssm_lr=inf"),
    (
        (*DIGITS, "model=nonsense"),
        2,
        "model=nonsense: choose classifier_tiny, diffussm_l, diffussm_s, diffussm_tiny, diffussm_xl, dit_b_2",
    ),
    ((*DIGITS, "modle=diffussm_s"), 2, "modle: no such key (did you mean model?)"),
    ((*DIGITS, "model.hidden_size=65"), 2, "model.hidden_size=65: must be divisible by hourglass_ratio=2"),
    ((*DIGITS, "model.hourglass_ratio=0"), 2, "model.hourglass_ratio=0"),
    ((*DIGITS, "model.hidden_size=63", "model.hourglass_ratio=3"), 2, "model.hourglass_ratio=3: does not divide"),
    ((*DIGITS, "model.init=random"), 2, "model.init=random: must be one of lin, inv, legs"),
    ((*DIGITS, "model.d_state=7"), 2, "model.d_state=7"),
    ((*DIGITS, "model.num_classes=5"), 2, "model.num_classes=5: the data has 10 classes"),
    ((*DIGITS, "model.in_channels=4"), 2, "model.in_channels=4: the data gives 1 channel"),
    ((*DIGITS_DIT, "model.input_size=32"), 2, "model.input_size=32: the data gives 8x8 latents: set it to 8"),
    ((*DIGITS_DIT, "model.patch_size=3"), 2, "model.patch_size=3: does not divide the data's 8x8"),
    ((*DIGITS_DIT, "model.num_heads=5"), 2, "model.hidden_size=64: must be divisible by num_heads=5"),
    ((*DIGITS_DIT, "model.conditioning=film"), 2, "model.conditioning=film: must be one of adaln_zero, adaln,"),
    ((*DIGITS, "+model.colour=red"), 2, "model.colour: no such key"),
    ((*DIGITS, "model._target_=nowhere.Model"), 2, "model._target_=nowhere.Model"),
    ((*DIGITS, "data=imagnet"), 2, "data=imagnet: choose digits, digits16, fake, huggingface, "),
    ((*DIGITS, "data=fake", "data.num_classes=0"), 2, "data.num_classes=0: must be at least 1, or null"),
    ((*DIGITS, "data=fake"), 2, "model.num_classes=10: the data has 1000 classes: set it to 1000"),
    (
        (*DIGITS, "data=imagenet", "data.path=/", "data.split=test"),
        2,
        "data.split=test: must be one of train, val",
    ),
    ((*DIGITS, "data=imagenet", "data.path=/", "data.check=1"), 2, "data.check=1: must be true or false"),
    (
        (*DIGITS, "data=image_folder", "data.path=/", "data.max_bad_fraction=2"),
        2,
        "data.max_bad_fraction=2.0: must",
    ),
    ((*DIGITS, "data=lsun", "data.path=/does/not/exist"), 65, "data.path=/does/not/exist: no data.mdb there"),
    ((*DIGITS, "data=lsun", "data.path=[]"), 2, "data.path=[]: needs at least one directory"),
    ((*DIGITS, "data.split=validation"), 2, "data.split=validation: must be one of train, held_out"),
    ((*DIGITS, "data=image_folder"), 2, "data.path"),
    (
        (*DIGITS, "data=image_folder", "data.path=/does/not/exist"),
        65,
        "data.path=/does/not/exist: no such directory",
    ),
    ((*DIGITS, "diffusion.beta_end=2"), 2, "diffusion.beta_start=0.0001, beta_end=2"),
    ((*DIGITS, "sampler.num_steps=2000"), 2, "sampler.num_steps=2000: must lie in 1..1000"),
    ((*DIGITS, "sampler=ddpm", "model.learn_sigma=false"), 2, "sampler.variance=learned: needs"),
    ((*DIGITS, "guidance.scale=-1"), 2, "guidance.scale=-1"),
    ((*DIGITS, "model.class_dropout_prob=0"), 2, "guidance.scale=1.25: needs a conditional model"),
    ((*DIGITS, "objective.vb_weight=-1"), 2, "objective.vb_weight=-1"),
    ((*DIGITS, "evaluation.reference=nowhere.npz"), 65, "nowhere.npz"),
    ((*DIGITS, "evaluation.num_samples=2"), 2, "evaluation.k=3: must be at least 1 and below 2"),
    ((*DIGITS, "seed=-1"), 2, "seed=-1"),
    ((*DIGITS, "name=a/b"), 2, "name=a/b"),
    ((*DIGITS, "device=cuda:99"), 2, "device=cuda:99"),
    ((*DIGITS, "trainer"), 2, "trainer: not an override"),
    ((*DIGITS, "a=[b"), 2, "a=[b"),
    ((*DIGITS, "logger=tensorbord"), 2, "logger=tensorbord: choose none, tensorboard, wandb (did you mean"),
    ((*DIGITS, "logger=[tensorboard,foo]"), 2, "logger=foo: choose none, tensorboard, wandb"),
    ((*DIGITS, "logger.wandb.mode=offline"), 2, "logger.wandb: no logger is chosen: add logger=NAME"),
    ((*DIGITS, "trainer.profile=3.5"), 2, "trainer.profile: Value '3.5'"),
    (("status", "nowhere"), 73, "nowhere: no such directory: give run directories"),
    (("status", "."), 73, ".: holds no run: give run directories"),
    (("train", "experiment=digit"), 2, "experiment=digit: choose digits, digits16, digits_"),
    (("train",), 2, "data.path, name: not set: add data.path=... name=..."),
    (
        (*DIGITS, "trainer.batch_size=999999999"),
        2,
        "trainer.batch_size=999999999: exceeds trainer.total_images=96000",
    ),
    ((*DIGITS, "model=null"), 2, "model=null: choose one of classifier_tiny, diffussm_l"),
    ((*DIGITS, "sampler=null"), 2, "sampler=null: choose one of ddim, ddpm"),
    ((*DIGITS, "optimizer.betas=[0.9]"), 2, "optimizer.betas=[0.9]: must be a list of a number, a number"),
    ((*DIGITS, "optimizer.eps=-1"), 2, "optimizer.eps=-1"),
    ((*DIGITS, "objective=flow", "sampler=flow_heun", "model.learn_sigma=true"), 2, "model.learn_sigma=false"),
    ((*DIGITS, "objective.prediction=w"), 2, "objective.prediction=w: must be one of eps, x_0, v"),
    ((*DIGITS, "diffusion.zero_terminal_snr=true"), 2, "objective.prediction=eps: tells nothing about x_0"),
    ((*DIGITS, "objective.loss=simple"), 2, "objective.loss=simple: leaves a learned variance untrained"),
    ((*DIGITS, "sampler.num_steps=abc"), 2, "sampler.num_steps=abc: must be an integer or a list"),
    ((*DIGITS, "guidance.interval=[5]"), 2, "guidance.interval=[5]: must be two timesteps"),
    ((*DIGITS, "guidance=autoguidance"), 2, "guidance.checkpoint: not set"),
    ((*DIGITS, "device=meta"), 2, "device=meta: choose auto, cpu, cuda"),
    ((*DIGITS, "name=" + 300 * "x"), 2, "use at most 100 letters"),
    ((*DIGITS, "name=.."), 2, "name=.."),
    ((*DIGITS, "evaluation.k=0"), 2, "evaluation.k=0"),
    ((*DIGITS, "evaluation.k=400"), 2, "evaluation.k=400"),
    ((*DIGITS, "evaluation.every_images=-1000"), 2, "evaluation.every_images=-1000"),
    (("encode",), 2, "data.path, to: not set: add data.path=... to=..."),
    (
        ("encode", "data=digits", "autoencoder=identity", "to=a"),
        2,
        "autoencoder: IdentityAutoencoder has nothing to encode",
    ),
    (("encode", "data=digits", "to=a", "dtype=fp8"), 2, "dtype=fp8: choose fp16, fp32"),
    (("encode", "data=digits", "to=a", "shard_size=0"), 2, "shard_size=0: must be at least 1"),
    (("encode", "data=digits", "to=a", "batch_size=0"), 2, "batch_size=0: must be at least 1"),
    (("encode", "data=digits", "to=a", "num_workers=-1"), 2, "num_workers=-1: must be at least 0"),
    (("encode", "data=digits", "to=/dev/null"), 73, "to=/dev/null: /dev/null is a file"),
    (("encode", "data=latents", "data.path=nowhere", "to=a"), 65, "data.path=nowhere: no latent set"),
    (("sample",), 2, "checkpoint: not set"),
    (("sample", "checkpoint=nowhere"), 73, "checkpoint=nowhere: no checkpoint there"),
    (("evaluate", "checkpoint=nowhere"), 73, "checkpoint=nowhere: no checkpoint there"),
    (("sample", "num_processes=0"), 2, "num_processes=0: must be at least 1, or null"),
    (("evaluate", "num_processes=many"), 2, "num_processes=many: must be at least 1, or null"),
    (("evaluate",), 2, "checkpoint: not set: add checkpoint=RUN_DIRECTORY, checkpoints='RUN_DIRECTORY/"),
    (("evaluate", "samples=a", "checkpoint=b"), 2, "checkpoint= and samples=: measure one thing at a time"),
    (("evaluate", "checkpoints=nowhere/*"), 2, "checkpoints=nowhere/*: no checkpoint there"),
    (("evaluate", "samples=nowhere"), 2, "evaluation: not set: add evaluation=NAME, such as fid50k or digits"),
    (("evaluate", "samples=nowhere", "evaluation=digits"), 65, "samples=nowhere: not there: give a folder of"),
    (("evaluate", "samples=x", "evaluation=digits", "metrics=[vlb]"), 2, "metrics=[vlb]: is of a model: give"),
    (
        ("evaluate", "samples=x", "evaluation=digits", "evaluation.num_samples=5"),
        2,
        "evaluation.num_samples: decides nothing of stored samples",
    ),
    (("evaluate", "samples=x", "evaluation=digits", "sampler=ddim"), 2, "sampler: decides nothing of stored"),
    (("evaluate", "samples=x", "evaluation=digits", "range_size=0"), 2, "range_size=0: must be at least 1"),
    (
        ("evaluate", "samples=x", "evaluation=digits", "labels=some"),
        2,
        "labels=some: choose cyclic, balanced, drawn",
    ),
    (("stats",), 2, "data.path, to: not set: add data.path=... to=..."),
    (("stats", "data=digits"), 2, "to: not set: add to=..."),
    (("stats", "data=digits", "to=x"), 2, "to=x: must end in .npz"),
    (
        ("stats", "data=digits", "to=/dev/null/x.npz"),
        73,
        "to=/dev/null/x.npz: /dev/null is a file: choose another",
    ),
    (("stats", "data=digits", "to=x.npz", "num_images=0"), 2, "num_images=0: must be at least 1"),
    (("stats", "data=digits", "to=x.npz", "batch_size=0"), 2, "batch_size=0: must be at least 1"),
    (("stats", "data=digits", "to=x.npz", "num_workers=-1"), 2, "num_workers=-1: must be at least 0"),
    (("stats", "data=digits", "to=x.npz", "seed=-1"), 2, "seed=-1: must be at least 0"),
    (("stats", "data=digits", "to=x.npz", "device=gpu"), 2, "device=gpu: choose auto, cpu, cuda"),
    (("stats", "data=digits", "to=x.npz", "evaluation=none"), 2, "evaluation=none: has no network"),
    (("stats", "data=digits", "to=x.npz", "evaluation.k=5"), 2, "evaluation.k: decides nothing of a reference"),
    (("stats", "data=digits", "to=x.npz", "+evaluation.extractor.weights=no"), 65, "evaluation weights no"),
    (("stats", "data=fake", "to=x.npz"), 2, "evaluation.extractor: measures images of shape (1, 8, 8), the data"),
    (
        ("stats", "data=fake", "to=x.npz", "evaluation=fid5k", NO_WEIGHTS),
        2,
        f"{NO_WEIGHTS}: no such file: put http",
    ),
    (
        ("stats", "data=fake", "to=x.npz", "evaluation=fid5k", WITH_WIDTH),
        2,
        "precision=fp8: must be one of fp32, bf",
    ),
    (
        ("stats", "data=fake", "to=x.npz", "evaluation=dinov2_50k", NO_WEIGHTS),
        2,
        f"{NO_WEIGHTS}: no such file: give",
    ),
    ((*DIGITS, "evaluation=fid50k"), 2, "evaluation.reference: not set: add evaluation.reference=..."),
    (
        (*DIGITS, "evaluation=fid5k", "evaluation.reference=x.npz", NO_WEIGHTS),
        2,
        f"{NO_WEIGHTS}: no such file: put",
    ),
    (("stats", "data.path=nowhere", "to=x.npz"), 65, "data.path=nowhere: no such directory"),
    (("inspect",), 2, "data.path: not set: add data.path=..."),
    (("inspect", "data.path=nowhere"), 65, "data.path=nowhere: no such directory"),
    (("inspect", "data=digits", "examined=0"), 2, "examined=0: must be at least 1"),
    (("inspect", "data=digits", "num_images=0"), 2, "num_images=0: must be at least 1"),
    (("inspect", "data=digits", "seconds=-1"), 2, "seconds=-1.0: must be at least 0"),
    (("inspect", "data=digits", "batch_size=0"), 2, "batch_size=0: must be at least 1"),
    (("inspect", "data=digits", "num_workers=-1"), 2, "num_workers=-1: must be at least 0"),
    (("inspect", "data=digits", "autoencoder=vae"), 2, "autoencoder=vae: choose "),
    (("inspect", "data=digits", "out=/dev/null"), 73, "out=/dev/null: /dev/null is a file: choose another"),
    (("inspect", "data=digits", "exmined=5"), 2, "exmined: no such key (did you mean examined?)"),
    (("import",), 2, "no FILE given: write diffussm import FILE"),
    (("import", "a.pt", "b.pt"), 2, "2 files given"),
    (("import", "a.pt", "nmae=x"), 2, "nmae: no such key (did you mean name?)"),
    (("import", "nowhere.pt"), 65, "nowhere.pt: no such file"),
    (("export",), 2, "checkpoint: not set"),
    (("export", "checkpoint=nowhere"), 73, "checkpoint=nowhere: no checkpoint there"),
    (("complexity", "model=diffusm_s"), 2, "model=diffusm_s: choose"),
    (("complexity", "resolutions=[]"), 2, "resolutions=[]: needs at least one positive multiple of 8"),
    (("complexity", "resolutions=[100]"), 2, "resolutions=[100]: needs at least one positive multiple of 8"),
    (("complexity", "model=diffussm_s", "resolutions=[24]"), 2, "resolutions=[24]: 3x3 latents have 9 tokens"),
    (("complexity", "model=diffussm_s", "model.d_state=7"), 2, "diffussm: model.d_state=7"),
    (("complexity", "model=dit_s_2", "model.input_size=64"), 2, "model.input_size: follows from resolutions"),
    (
        ("complexity", "model=dit_s_8", "resolutions=[72]"),
        2,
        "resolutions=[72]: 9x9 latents: not divisible by patch_size=8",
    ),
    (
        ("complexity", "model.d_state=8"),
        2,
        "model.d_state: no model is chosen: add model=NAME, one of classifier_tiny",
    ),
    (("schedules", "diffusion=cosin"), 2, "diffusion=cosin: choose cosine, linear"),
    (
        ("schedules", "diffusion.num_timesteps=9"),
        2,
        "diffusion.num_timesteps: no diffusion is chosen: add diffusion=",
    ),
    (("schedules", "diffusion=cosine", "diffusion.num_timesteps=0"), 2, "diffusion.num_timesteps=0: must be"),
    (("schedules", "diffusion=cosine", "diffusion.beta_end=1"), 2, "diffusion.beta_end: no such key"),
    (("schedules", "out=plot.jpg"), 2, "out=plot.jpg: must end in .png, .svg or .pdf"),
    (("bench", "suites=[layers]"), 2, "suites=['layers']: choose from layer, convolution"),
    (("bench", "suites=[]"), 2, "suites=[]: choose at least one"),
    (("bench", "suites=[xl]"), 2, "suites=[xl]: its models are for a GPU: add device=cuda"),
    (("bench", "lengths=[1000]"), 2, "lengths=[1000]: needs squares of even numbers"),
    (("bench", "lengths=[]"), 2, "lengths=[]"),
    (("bench", "hidden_size=100"), 2, "hidden_size=100: must be a positive multiple of 64"),
    (("bench", "d_state=5"), 2, "d_state=5: must be even"),
    (("bench", "repetitions=0"), 2, "repetitions=0: must be at least 1"),
    (("bench", "seconds=0"), 2, "seconds=0.0: must be positive"),
    (("bench", "memory_limit_gib=-1"), 2, "memory_limit_gib=-1.0: must be positive"),
    (("bench", "precision=fp8"), 2, "precision=fp8: choose fp32, bf16"),
    (("bench", "device=gpu"), 2, "device=gpu: choose auto, cpu, cuda"),
    (("bench", "length=[256]"), 2, "length: no such key (did you mean lengths?)"),
]


@pytest.mark.fault("G14")
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    BAD_INPUT,
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_creates_nothing(arguments, code, says, in_tmp, capsys):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("diffussm: ") and captured.err.count("\n") == 1
    assert says in captured.err
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("diffusion=rectified_flow", "objective: needs a noise schedule"),
        ("objective=flow", "choose sampler=flow_euler or flow_heun"),
    ],
)
def test_processes_and_what_does_not_fit_them_are_refused(diffussm, in_tmp, override, says):
    result = diffussm(*DIGITS, override)  # a process of its own, in which signatures are not checked at run time
    assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


@pytest.mark.fault("G21")
def test_a_file_in_place_of_the_run_directory_is_named(in_tmp, capsys):
    (in_tmp / "runs").write_text("mine")
    assert main(DIGITS) == 73
    assert "runs is a file" in capsys.readouterr().err


def test_help_names_verbs_groups_and_exit_codes(capsys):
    for arguments, promises in (
        (["--help"], ["train", "sample", "evaluate", "import", "export"]),
        (["import", "--help"], ["diffussm import FILE", "model.num_heads=", "dit_xl_2"]),
        (["export", "--help"], ["DiffuSSMPipeline", "layout=diffusers", "weights=ema", "to=PATH"]),
        (
            ["train", "--help"],
            [
                "experiment=",
                "diffussm_xl",
                "image_folder",
                "75 stopped by a signal",
                "-m sweep=NAME",
                "trainer.num_processes=8",
                "trainer.parallel=fsdp",
            ],
        ),
        (["status", "--help"], ["RUN_DIR ...", "--json", "stalled", "Exit codes: 0 running or finished"]),
        (["encode", "--help"], ["to=DIR", "image_folder", "torchrun"]),
        (["sample", "--help"], ["checkpoint=PATH", "ddim", "flow_heun", "autoguidance"]),
        (["evaluate", "--help"], ["results.json", "digits digits16 dinov2_50k", "fid5k none"]),
        (["stats", "--help"], ["to=FILE.npz", "arr_0", "image_folder", "digits digits16 dinov2_50k"]),
        (["inspect", "--help"], ["examined=1000", "reconstructions.png", "identity", "image_folder"]),
        (["bench", "--help"], ["suites=", "device=cuda", "bench.json"]),
        (["schedules", "--help"], ["out=FILE", "diffusion=NAME", "quadratic rectified_flow scaled_linear"]),
        (["complexity", "--help"], ["resolutions=", "diffussm_xl"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and all(promise in shown for promise in promises)


def test_overrides_may_follow_options(in_tmp, capsys):
    assert main([*DIGITS, "--print-config", "name=later"]) == 0
    assert "name: later" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*DIGITS, "--print-confg"])


@pytest.mark.fault("G21")
def test_a_run_directory_in_use_is_refused_before_any_work(run, capsys):
    with (run / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", *SMALL_RUN, f"run_dir={run}", "trainer.total_images=160"]) == 73
    assert "another process is using it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
def test_damaged_records_are_named(run, tmp_path, capsys, name):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text("{: [")
    assert main(["train", *SMALL_RUN, f"run_dir={tmp_path / 'run'}"]) == 73
    assert f"{name}: damaged" in capsys.readouterr().err


def test_an_evaluation_of_other_images_is_refused_before_training(in_tmp, capsys):
    Image.new("RGB", (8, 8)).save(in_tmp / "image.png")
    overrides = [
        "data=image_folder",
        "data.path=.",
        "data.resolution=8",
        "model.in_channels=3",
        "model.num_classes=null",
    ]
    assert main([*DIGITS, *overrides, "guidance.scale=1"]) == 2
    assert "evaluation.extractor: measures images of shape (1, 8, 8)" in capsys.readouterr().err


def test_an_unwritable_result_is_one_line(run, capsys):
    assert main(["evaluate", f"checkpoint={run}", "out=/proc/nowhere/results.json", "sampling.seed=77"]) == 73
    (said,) = capsys.readouterr().err.splitlines()  # before anything is generated
    assert said.startswith("diffussm: out=/proc/nowhere/")


def test_an_unknown_verb_exits_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2 and "trian" in capsys.readouterr().err


def test_print_config_shows_everything_resolved_and_does_nothing(in_tmp, capsys):
    assert main([*DIGITS, "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "run_dir: runs/digits" in shown and "hidden_size: 64" in shown
    assert list(in_tmp.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run directory of a small finished run."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SMALL_RUN, f"run_dir={path}"]) == 0
    return path


def test_train_writes_the_promised_files(run):
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "status.json", "checkpoints", "samples",
    }  # fmt: skip
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["images"], status["exit_code"]) == ("finished", 128, 0)
    with Image.open(run / "samples" / "images-000000000128.png") as grid:
        assert grid.size == (530, 500)


def test_the_same_command_again_only_reports(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["train", *SMALL_RUN, f"run_dir={run}"]) == 0
    assert "finished at 128 images; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_for_a_finished_run_no_processes_are_started(run, capsys, monkeypatch):
    monkeypatch.setattr("diffussm.commands.train.launch", lambda *arguments: pytest.fail("starts them"))
    assert main(["train", *SMALL_RUN, f"run_dir={run}", "trainer.num_processes=2"]) == 0
    assert capsys.readouterr().out.count("finished at 128 images; nothing to do") == 1


def test_a_changed_configuration_is_refused_with_a_diff(run, capsys):
    assert main(["train", *SMALL_RUN, f"run_dir={run}", "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr: 0.008 -> 0.5" in capsys.readouterr().err


def test_a_longer_run_continues_the_finished_one(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    arguments = ["train", *SMALL_RUN, f"run_dir={tmp_path / 'run'}", "trainer.total_images=160"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "continues from step-000000000008" in said
    assert "configuration changed: trainer.total_images: 128 -> 160" in said
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    resume = next(record for record in log if record.get("event") == "resume")
    assert "trainer.total_images: 128 -> 160" in resume["changed"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["images"] == 160


def test_truncated_checkpoints_are_named_and_end_everything(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    before = sorted((tmp_path / "run").rglob("*"))
    for arguments in (
        ["sample", f"checkpoint={tmp_path / 'run'}"],
        ["evaluate", f"checkpoint={tmp_path / 'run'}"],
        ["train", *SMALL_RUN, f"run_dir={tmp_path / 'run'}", "trainer.total_images=160"],
    ):
        assert main(arguments) == 73
        said = capsys.readouterr().err
        assert "model.safetensors: truncated: expected" in said and "none valid" in said
        assert sorted((tmp_path / "run").rglob("*")) == before
    single = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert main(["sample", f"checkpoint={single}"]) == 73
    assert capsys.readouterr().err.count("\n") == 1


def test_sample_draws_what_is_asked_and_knows_when_it_is_done(run, capsys):
    arguments = ["sample", f"checkpoint={run}", "num_images=7", "classes=[3,8]", "sampling.seed=1"]
    assert main(arguments) == 0
    out = Path(capsys.readouterr().out.partition("/grid.png: 7 images")[0])
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(7)), "grid.png", "samples.json"]
    with Image.open(out / "000000.png") as image:
        assert image.size == (8, 8) and image.mode == "L"
    assert main(arguments) == 0
    assert "these 7 images are there already" in capsys.readouterr().out


def test_samples_of_another_request_are_never_overwritten(run, tmp_path, capsys):
    arguments = ["sample", f"checkpoint={run}", f"out={tmp_path / 'out'}", "num_images=2", "classes=[1]"]
    assert main(arguments) == 0
    manifest = tmp_path / "out" / "samples.json"
    before = manifest.read_text()
    assert main([*arguments, "sampling.seed=3"]) == 73
    assert "holds other samples" in capsys.readouterr().err and manifest.read_text() == before
    manifest.write_text(before.replace('"complete": true', '"complete": false'))  # as if it had been killed
    (tmp_path / "out" / "grid.png").unlink()
    assert main(arguments) == 0
    assert manifest.read_text() == before and (tmp_path / "out" / "grid.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["sample", f"checkpoint={run}", f"out={tmp_path / 'mine'}"]) == 73
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def forge(run: Path, tmp_path: Path, key: str, node: dict) -> Path:
    """A checkpoint whose configuration was replaced and whose manifest was made to fit."""
    shutil.copytree(run, tmp_path / "forged")
    checkpoint = sorted((tmp_path / "forged" / "checkpoints").iterdir())[-1]
    config = json.loads((checkpoint / "config.json").read_text())
    config[key] = node
    content = json.dumps(config).encode()
    (checkpoint / "config.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    return checkpoint


@pytest.mark.fault("G6")
@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
        {"_target_": "os.system", "command": "touch pwned"},
        {"_target_": "diffussm.training.checkpoint.shutil.rmtree", "path": "."},
        {"_target_": "diffussm.runtime.run_dir.write_json", "path": "pwned", "value": {}},
        {"_target_": "diffussm.data.autoencoder.IdentityAutoencoder", "extra": {"_target_": "os.getcwd"}},
    ],
    ids=lambda node: node["_target_"],
)
@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_a_checkpoint_cannot_name_code_to_run(run, tmp_path, in_tmp, capsys, node, verb):
    forged = forge(run, tmp_path, "autoencoder", node)
    before = sorted(in_tmp.rglob("*"))
    assert main([verb, f"checkpoint={forged}"]) == 73
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no part of diffussm" in said
    assert sorted(in_tmp.rglob("*")) == before


def chosen_labels(count: int, classes: list[int] | None = None, labels: str = "cyclic") -> torch.Tensor:
    return choose_labels(labels, 0, range(count), choose_classes(classes, labels, 10))


@pytest.mark.parametrize("way", ["cyclic", "balanced"])
def test_images_are_spread_over_the_classes_as_evenly_as_can_be(way):
    counts = torch.bincount(chosen_labels(11, labels=way), minlength=10)
    assert counts.sum() == 11 and counts.max() - counts.min() == 1


@pytest.mark.parametrize("way", ["cyclic", "balanced", "drawn"])
@pytest.mark.parametrize("chosen", [None, [7, 3, 3]])
def test_the_class_of_an_image_does_not_depend_on_how_many_are_drawn(chosen, way):
    few, many = (chosen_labels(count, chosen, way) for count in (4, 200))
    assert torch.equal(few, many[:4])
    assert set(many.tolist()) == set(chosen or range(10))


def test_a_model_of_a_thousand_classes_shows_ten_rows_and_evaluates_all():
    assert choose_classes(None, "cyclic", 1000) == list(range(10))
    assert len(choose_classes(None, "drawn", 1000)) == 1000


@pytest.mark.fault("G2")
def test_a_signal_to_the_whole_process_group_ends_in_a_checkpoint(in_tmp):
    """As timeout, SLURM and a terminal send it: the loader's workers get it too."""
    arguments = [
        "train", *SMALL_RUN, "run_dir=run", "trainer.total_images=1M", "trainer.save_every_images=1M",
        "trainer.num_workers=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "diffussm", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(in_tmp / "run" / "metrics.jsonl", '"images": 320', process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert len(list((in_tmp / "run" / "checkpoints").iterdir())) == 1


def test_image_i_is_a_function_of_seed_and_i(run, tmp_path):
    def draw(name: str, *overrides: str) -> list[bytes]:
        base = [
            "sample",
            f"checkpoint={run}",
            "classes=[3]",
            "sampler.eta=1",
            f"out={tmp_path / name}",
            *overrides,
        ]
        assert main(base) == 0
        return [Image.open(path).tobytes() for path in sorted((tmp_path / name).glob("0*.png"))]

    whole = draw("whole", "num_images=5")
    assert draw("fewer", "num_images=3") == whole[:3]
    assert draw("other", "num_images=5", "sampling.seed=1") != whole


@pytest.mark.parametrize("classes", ["[10]", "[-1]", "[]"])
def test_classes_that_do_not_exist_are_refused(run, capsys, classes):
    assert main(["sample", f"checkpoint={run}", f"classes={classes}"]) == 2
    assert "classes=" in capsys.readouterr().err


def test_weights_that_do_not_exist_are_refused(run, capsys):
    assert main(["sample", f"checkpoint={run}", "sampling.weights=ema_0.5"]) == 2
    assert "has ema_0.998, model" in capsys.readouterr().err


def test_evaluate_prints_a_table_and_records_everything(run, capsys):
    assert main(["evaluate", f"checkpoint={run}"]) == 0
    shown = capsys.readouterr().out
    assert "FID-digits" in shown and "real against real" in shown and "ddim 2 steps, guidance 1.25" in shown
    results = json.loads((run / "results.json").read_text())
    assert results["metrics"]["num_samples"] == 64 and results["weights"] == "ema_0.998"
    request = results["request"]
    assert request["sampler"]["num_steps"] == 2 and request["sampling"]["seed"] == 0
    assert {"checkpoint", "sampling", "evaluation", "extractor", "reference", "pixels", "versions"} <= set(request)
    before = (run / "results.json").stat().st_mtime_ns
    assert main(["evaluate", f"checkpoint={run}"]) == 0
    assert capsys.readouterr().out == shown
    assert (run / "results.json").stat().st_mtime_ns == before
    assert main(["evaluate", f"checkpoint={run}", "sampling.seed=5", "sampling.batch_size=10"]) == 0
    assert json.loads((run / "results.json").read_text())["request"]["sampling"]["seed"] == 5
    history = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [entry["request"]["sampling"]["seed"] for entry in history] == [0, 5]


def test_metrics_that_the_reference_does_not_allow_are_refused_by_name(run, tmp_path, capsys):
    with np.load(DIGITS_WEIGHTS.with_name("digits_reference.npz")) as whole:
        np.savez(tmp_path / "part.npz", mu=whole["mu"], sigma=whole["sigma"])
    arguments = ["evaluate", f"checkpoint={run}", f"out={tmp_path / 'r.json'}"]
    arguments += [f"evaluation.reference={tmp_path / 'part.npz'}"]
    for metric in ("sfid", "recall", "kid"):
        assert main([*arguments, f"metrics=[fid,{metric}]"]) == 2
        assert f"metrics=[{metric}]: part.npz and evaluation.extractor do not allow it" in capsys.readouterr().err
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert {"FID-digits", "IS"} <= set(metrics) and not {"sFID-digits", "recall", "KID-digits"} & set(metrics)


def test_evaluation_none_measures_nothing(run, capsys):
    assert main(["evaluate", f"checkpoint={run}", "evaluation=none"]) == 2
    assert "choose an evaluation" in capsys.readouterr().err


def test_an_unconditional_model_trains_and_samples_from_an_image_folder(in_tmp, capsys):
    (in_tmp / "images").mkdir()
    for index in range(6):
        Image.new("RGB", (12, 10), (40 * index, 0, 0)).save(in_tmp / "images" / f"{index}.png")
    arguments = [
        "train", *SMALL_RUN, "name=folder", "data=image_folder", "data.path=images", "data.resolution=8",
        "model.num_classes=null", "model.in_channels=3", "evaluation=none", "guidance.scale=1",
    ]  # fmt: skip
    assert main([arg for arg in arguments if arg != "evaluation.num_samples=64"]) == 0
    shutil.rmtree("images")  # a checkpoint is all that sampling needs
    assert main(["sample", "checkpoint=runs/folder", "num_images=5"]) == 0
    assert main(["sample", "checkpoint=runs/folder", "classes=[1]"]) == 2
    assert "unconditional" in capsys.readouterr().err


def test_a_corrupt_image_ends_training_with_its_name_and_status(in_tmp, capsys):
    (in_tmp / "images" / "class").mkdir(parents=True)
    (in_tmp / "images" / "class" / "bad.png").write_text("no image")
    arguments = [
        "train", *SMALL_RUN, "name=folder", "data=image_folder", "data.path=images", "data.resolution=8",
        "model.num_classes=1", "model.in_channels=3", "evaluation=none",
    ]  # fmt: skip
    assert main([arg for arg in arguments if arg != "evaluation.num_samples=64"]) == 65
    assert "bad.png: not a readable image" in capsys.readouterr().err
    status = json.loads(Path("runs/folder/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)


def test_images_that_cannot_be_read_are_listed_and_training_goes_on(in_tmp, capsys):
    (in_tmp / "images" / "class").mkdir(parents=True)
    for index in range(150):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(in_tmp / "images" / "class" / f"{index:03}.png")
    (in_tmp / "images" / "class" / "007.png").write_text("no image")
    arguments = [
        "train", *SMALL_RUN, "run_dir=run", "data=image_folder", "data.path=images", "data.resolution=8",
        "model.num_classes=1", "model.in_channels=3", "evaluation=none", "trainer.total_images=160",
    ]  # fmt: skip
    assert main([arg for arg in arguments if arg != "evaluation.num_samples=64"]) == 0
    said = capsys.readouterr().err
    assert said.count("007.png: not a readable image") == 1
    (line,) = Path("run/bad_files.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("007.png") and json.loads(line)["reason"]


def test_module_and_console_script_are_the_same(diffussm):
    script = Path(sys.executable).with_name("diffussm")
    shown = subprocess.run([script, "train", "--help"], capture_output=True, text=True, check=True)
    assert diffussm("train", "--help").stdout == shown.stdout


def public_weights(**options) -> dict[str, torch.Tensor]:
    """What a public DiT checkpoint holds, of a network that draws digits."""
    sizes = {"in_channels": 1, "num_classes": 10, "input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = DiT(**{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.state_dict()


def weights_of(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / f"{name}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


HEADS = "model.num_heads=4"


def test_public_weights_become_a_run_that_samples_evaluates_and_knows_its_origin(in_tmp, capsys):
    state = public_weights()
    torch.save(state, "DiT-8x8.pt")
    arguments = ["import", "DiT-8x8.pt", HEADS, "experiment=digits", "name=dit", "sampler.num_steps=2"]
    assert main(arguments) == 0
    assert "runs/dit: DiT, 15,016 parameters, from DiT-8x8.pt (official layout)" in capsys.readouterr().out
    assert equal(weights_of(Path("runs/dit")), state) and equal(weights_of(Path("runs/dit"), "ema_0.998"), state)
    checkpoint = Path("runs/dit/checkpoints/step-000000000000")
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config) == {item.name for item in dataclasses.fields(TrainConfig)}
    assert config["model"]["_target_"] == "diffussm.models.DiT" and config["model"]["depth"] == 2
    train_state = json.loads((checkpoint / "train_state.json").read_text())
    sha256 = hashlib.sha256(Path("DiT-8x8.pt").read_bytes()).hexdigest()
    assert train_state["imported"] == {"file": "DiT-8x8.pt", "sha256": sha256, "layout": "official"}
    assert main(["sample", "checkpoint=runs/dit", "num_images=3"]) == 0
    assert main(["evaluate", "checkpoint=runs/dit", "evaluation.num_samples=16"]) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in checkpoint.iterdir())
    assert main(arguments) == 0
    assert "these weights are there already" in capsys.readouterr().out
    assert main([*arguments, "seed=1"]) == 73
    torch.save(public_weights(num_classes=9), "DiT-8x8.pt")
    assert main([*arguments, "model.num_classes=10", "model.class_dropout_prob=0"]) == 73
    torch.save({name: tensor + 1 for name, tensor in state.items()}, "DiT-8x8.pt")
    assert main(arguments) == 73
    assert capsys.readouterr().err.count("runs/dit: holds another run") == 3
    assert sorted((path, path.stat().st_mtime_ns) for path in checkpoint.iterdir()) == before


def test_imported_weights_can_be_trained_on(in_tmp, capsys):
    torch.save(public_weights(hidden_size=32, depth=1, patch_size=1), "dit.pt")
    short = [
        "experiment=digits_dit", "name=fine", "model.hidden_size=32", "model.depth=1", "trainer.batch_size=16",
        "trainer.total_images=64", "evaluation.num_samples=16", "sampler.num_steps=2", "trainer.warmup_images=0",
        "trainer.precision=fp16", "device=cpu",
    ]  # fmt: skip
    assert main(["import", "dit.pt", HEADS, *short]) == 0
    started = weights_of(Path("runs/fine"))
    assert main(["train", *short]) == 0
    assert "configuration changed" not in capsys.readouterr().err
    trained = weights_of(Path("runs/fine"))
    distance = max(float((trained[name] - started[name]).abs().max()) for name in started)
    assert 0 < distance < 0.1  # a few steps away from where it began
    newest = sorted(Path("runs/fine/checkpoints").iterdir())[-1]
    train_state = json.loads((newest / "train_state.json").read_text())
    assert train_state["images"] == 64 and train_state["imported"]["file"] == "dit.pt"


def test_export_and_import_are_inverses_in_both_layouts(run, in_tmp, capsys):
    torch.save(public_weights(), "dit.pth")
    assert main(["import", "dit.pth", HEADS, "name=a"]) == 0
    state = weights_of(Path("runs/a"))
    assert main(["export", "checkpoint=runs/a", "layout=official", "to=a.safetensors"]) == 0
    assert equal(load_file("a.safetensors"), state)
    assert main(["import", "a.safetensors", HEADS, "name=b"]) == 0
    assert (
        main(["export", "checkpoint=runs/b", "layout=diffusers", "weights=model", "to=pipeline/transformer"]) == 0
    )
    theirs = diffusers.DiTTransformer2DModel.from_pretrained("pipeline/transformer", low_cpu_mem_usage=False)
    assert theirs.config.num_embeds_ada_norm == 10 and theirs.config.sample_size == 8
    assert main(["import", "pipeline", "name=c"]) == 0  # its config.json tells the heads
    assert main(["import", "pipeline/transformer", "name=d"]) == 0
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert main(["import", file, HEADS, "model.input_size=8", "name=e"]) == 0
    torch.save(load_file(file), "pipeline/transformer/diffusion_pytorch_model.bin")
    Path(file).unlink()
    assert main(["import", "pipeline", "name=f"]) == 0
    for name in "bcdef":
        assert equal(weights_of(Path("runs") / name), state)
        assert OmegaConf.load(f"runs/{name}/config.yaml").model.num_heads == 4
    assert (
        main(["export", f"checkpoint={run}", "layout=official", "to=run.safetensors", "weights=model"]) == 0
    )  # DiffuSSM's own names
    assert equal(load_file("run.safetensors"), weights_of(run))


def test_published_sizes_need_no_heads_and_latents_that_cannot_be_drawn_are_announced(in_tmp, capsys):
    torch.save(public_weights(in_channels=4, hidden_size=384, depth=12, num_heads=6, patch_size=8), "dit_s_8.pt")
    assert main(["import", "dit_s_8.pt", "autoencoder=identity"]) == 0
    assert "images of 4 channels cannot be drawn" in capsys.readouterr().err
    config = json.loads(Path("runs/dit_s_8/checkpoints/step-000000000000/config.json").read_text())
    assert config["model"]["num_heads"] == 6 and config["trainer"]["ema_decays"] == [0.9999]
    assert main(["sample", "checkpoint=runs/dit_s_8"]) == 2
    assert "images of 4 channels, which cannot be drawn" in capsys.readouterr().err


class Foreign:
    """What a hostile checkpoint would hold."""

    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def misfit(**changes) -> dict:
    return {name: tensor for name, tensor in {**public_weights(), **changes}.items() if tensor is not None}


BAD_WEIGHTS = [
    # what is in the file, overrides, exit code, what the line says
    ({"model": Foreign()}, [], 65, "and reading that could run code"),
    ({"ema": {}}, [], 65, "no state dict"),
    ({"weight": torch.zeros(2)}, [], 65, "neither the official DiT's names nor those of diffusers: weight"),
    (public_weights(), [], 2, "model.num_heads: not told by the file"),
    (public_weights(), ["model.num_heads=3"], 2, "model.hidden_size=16: must be divisible by num_heads=3"),
    (public_weights(), [HEADS, "model.depth=1"], 65, "weights do not fit: 10 unknown: blocks.1.attn.qkv.weight, "),
    (public_weights(), [HEADS, "model=diffussm_tiny"], 2, "no such key"),
    (public_weights(), [HEADS, "image_shape=[1,9,9]"], 2, "model.input_size=8: the data gives 9x9 latents"),
    (misfit(**{"blocks.1.mlp.fc2.bias": None}), [HEADS], 65, "1 missing: blocks.1.mlp.fc2.bias"),
    (misfit(colour=torch.zeros(1)), [HEADS], 65, "1 unknown: colour"),
    (misfit(pos_embed=torch.zeros(1, 16, 8)), [HEADS], 65, "pos_embed: [1, 16, 8] instead of [1, 16, 16]"),
    (misfit(pos_embed=torch.full((1, 16, 16), torch.nan)), [HEADS], 65, "pos_embed: not finite"),
    (to_diffusers(public_weights()), [HEADS], 2, "model.input_size: not told by the file"),
]


@pytest.mark.parametrize(
    ("content", "overrides", "code", "says"),
    BAD_WEIGHTS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_weights_are_one_line_and_create_nothing(content, overrides, code, says, in_tmp, capsys):
    torch.save(content, "bad.pt")
    assert main(["import", "bad.pt", *overrides]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("diffussm: ") and captured.err.count("\n") == 1
    assert says in captured.err
    assert [path.name for path in in_tmp.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors", "bad.txt"])
def test_files_that_are_no_weights_are_one_line(in_tmp, capsys, name):
    for content in (b"", b"PK\x03\x04 not really", b"hello, world" * 100):
        Path(name).write_bytes(content)
        assert main(["import", name]) in (2, 65)
        said = capsys.readouterr().err
        assert said.startswith(f"diffussm: {name}: ") and said.count("\n") == 1


def test_directories_that_are_not_diffusers_are_named(in_tmp, capsys):
    Path("model").mkdir()
    assert main(["import", "model"]) == 65
    assert "no config.json with diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, "model/diffusion_pytorch_model.safetensors")
    for config, says in (
        ("{}", "no configuration of DiTTransformer2DModel (KeyError('num_attention_heads'))"),
        ("{", "no configuration of DiTTransformer2DModel (JSONDecodeError"),
        ('{"num_attention_heads": 4, "sample_size": 8, "activation_fn": "geglu"}', "activation_fn=geglu: DiT has"),
    ):
        Path("model/config.json").write_text(config)
        assert main(["import", "model"]) == 65
        assert says in capsys.readouterr().err


def test_exports_that_cannot_be_are_one_line_and_overwrite_nothing(run, in_tmp, capsys):
    torch.save(public_weights(class_dropout_prob=0.0, num_classes=11), "a.pt")
    torch.save(public_weights(conditioning="in_context"), "b.pt")
    assert main(["import", "a.pt", HEADS, "model.num_classes=11", "model.class_dropout_prob=0"]) == 0
    assert main(["import", "b.pt", HEADS]) == 0
    torch.save(public_weights(in_channels=4), "c.pt")
    assert main(["import", "c.pt", HEADS, "autoencoder=identity"]) == 0
    Path("there").mkdir()
    capsys.readouterr()
    for arguments, code, says in (
        ((f"checkpoint={run}", "layout=diffusers"), 2, "layout=diffusers: diffusers has no DiffuSSM"),
        (("checkpoint=runs/a", "layout=diffusers"), 2, "needs a null label"),
        (("checkpoint=runs/b", "layout=diffusers"), 2, "layout=diffusers: conditioning=in_context: diffusers has"),
        (("checkpoint=runs/b", "layout=onnx"), 2, "layout=onnx: choose pipeline, official, diffusers"),
        (("checkpoint=runs/b", "out=elsewhere"), 2, "out: no such key"),
        (("checkpoint=runs/b", "weights=ema_0.5"), 2, "weights=ema_0.5: runs/b/checkpoints/step-000000000000 has"),
        (("checkpoint=runs/b", "to=b.ckpt", "layout=official"), 2, "to=b.ckpt: must end in .safetensors"),
        (("checkpoint=runs/b", "to=there", "layout=diffusers"), 73, "to=there: exists"),
        (("checkpoint=runs/b", "to=there"), 73, "to=there: exists"),
        (("checkpoint=runs/c",), 2, "layout=pipeline: the model gives images of 4 channels"),
    ):
        assert main(["export", *arguments]) == code
        captured = capsys.readouterr()
        assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(Path("there").iterdir()) == [] and not Path("b.ckpt").exists() and not (run / "export").exists()


def test_a_checkpoint_from_before_imports_still_resumes(run, tmp_path):
    checkpoint = forge(run, tmp_path, "name", "digits")
    path = checkpoint / "train_state.json"
    state = json.loads(path.read_text())
    del state["imported"]
    content = json.dumps(state).encode()
    path.write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["train_state.json"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    arguments = ["train", *SMALL_RUN, f"run_dir={tmp_path / 'forged'}", "trainer.total_images=144"]
    assert main(arguments) == 0


def wait_for(path: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        os.sched_yield()


@pytest.mark.fault("G1")
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGUSR1, 75, "preempted"), (signal.SIGKILL, -9, "running")],
)
def test_a_stopped_or_killed_process_continues_to_the_same_weights(jobs, in_tmp, number, code, state):
    from training.test_trainer import fingerprint

    log = in_tmp / "run" / "metrics.jsonl"
    arguments = ["train", *SMALL_RUN, f"run_dir={in_tmp / 'run'}", "trainer.total_images=4000"]
    job = jobs.start(*arguments)
    job.wait_until(lambda: log.exists() and '"images": 320' in log.read_text())
    job.send(number)
    assert job.wait() == code
    status = json.loads((in_tmp / "run" / "status.json").read_text())
    assert status["state"] == state
    if code == 75:
        assert "stopped by signal" in job.said.splitlines()[-1] and status["images"] >= 320
    # Let both runs end soon: the one that was interrupted, and one that never is.
    reached = max(json.loads(line)["images"] for line in log.read_text().splitlines())
    end = f"trainer.total_images={reached + 160}"
    jobs.run(*arguments[:-1], end)
    jobs.run(*arguments[:-2], f"run_dir={in_tmp / 'whole'}", end)
    assert fingerprint(in_tmp / "run") == fingerprint(in_tmp / "whole")


def test_complexity_prints_a_row_for_each_model_and_resolution(capsys):
    assert main(("complexity", "model=diffussm_s", "model.depth=2", "resolutions=[256,512]")) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert "GMAC" in header and "SSM GFLOP" in header and set(rule) <= set("|-: ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["diffussm_s", "diffussm_s"]
    assert [row[2:4] for row in cells] == [["256", "1,024"], ["512", "4,096"]]
    assert len({len(line) for line in (header, rule, *rows)}) == 1


def test_complexity_without_a_model_covers_every_preset_but_the_tiny_ones(capsys):
    assert main(("complexity", "resolutions=[256]")) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    shown = {row.split("|")[1].strip() for row in rows}
    assert shown == {name for name in group_options("model") if not name.endswith("_tiny")}


def test_a_reader_that_stops_reading_is_no_error(in_tmp):
    command = f"{sys.executable} -m diffussm train experiment=digits --print-config"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(result.stdout) in (0, 128 + 13) and "diffussm:" not in result.stderr
    assert "Traceback" not in result.stderr and "Broken pipe" not in result.stderr
