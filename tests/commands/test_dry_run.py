"""`trainer.dry_run=true`: what a run would be, told without its data, weights or GPU, and without a trace."""

import re
import shutil

import pytest
from conftest import SMALL_RUN
from data.tiny_vae import make_tiny_vae
from PIL import Image

from diffussm.cli import main
from diffussm.compose import group_options

DRY = "trainer.dry_run=true"
# What the papers and their arithmetic say: parameters, GMAC, tokens, batch on 8 GPUs, steps.
FACTS = {
    "imagenet256_diffussm_xl": (
        "673,141,256",
        "276.00 GMAC",
        "1,024 tokens",
        "1 pass x 32 images",
        "2,578,125 steps",
    ),
    "imagenet512_diffussm_xl": (
        "673,141,256",
        "1,103.65 GMAC",
        "4,096 tokens",
        "4 passes x 8 images",
        "1,179,688 steps",
    ),
    "lsun_church_diffussm_xl": (
        "671,988,104",
        "276.00 GMAC",
        "1,024 tokens",
        "1 pass x 32 images",
        "400,000 steps",
    ),
    "imagenet256_diffussm_s": ("35,526,152", "13.75 GMAC", "1,024 tokens", "1 pass x 32 images", "400,000 steps"),
    "imagenet256_dit_xl_2": ("674,834,720", "118.62 GMAC", "256 tokens", "1 pass x 32 images", "7,000,000 steps"),
    "imagenet512_dit_xl_2": (
        "674,834,720",
        "524.54 GMAC",
        "1,024 tokens",
        "1 pass x 32 images",
        "3,000,000 steps",
    ),
}


def told(capsys, *overrides: str) -> dict[str, str]:
    """The lines of a dry run, by their first word."""
    assert main(["train", *overrides, DRY]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name: " ".join(line[13:] for line in lines if line[:13].strip() == name) for name in (
        "run", "model", "data", "batch", "length", "optimizer", "cost", "memory", "autoencoder", "dry run"
    )}  # fmt: skip


# Of those that differ in the size alone, the greatest is enough for every day.
SMALLER = re.compile(r"imagenet256_(diffussm_[sl]|dit_[sbl]_2)")


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow) if SMALLER.fullmatch(name) else name
        for name in group_options("experiment")
    ],
)
def test_every_experiment_is_sound_and_leaves_no_trace(experiment, in_tmp, capsys):
    lines = told(capsys, f"experiment={experiment}", "trainer.num_processes=8")
    assert list(in_tmp.iterdir()) == []
    assert lines["run"] == f"runs/{experiment} (new)" and "nothing was created" in lines["dry run"]
    everything = " ".join(lines.values())
    assert all(fact in everything for fact in FACTS.get(experiment, ()))
    if experiment.startswith(("imagenet", "lsun")):
        assert lines["data"].startswith(f"not there: data.path=latents/{experiment.partition('_diffussm')[0][:8]}")
        assert lines["autoencoder"] == "stabilityai/sd-vae-ft-ema: not on this machine yet"
        needed = re.match(r"about ([\d.]+) GiB", lines["memory"])
        assert needed and 1 < float(needed[1]) < 75, (
            "on an A100 of 80 GB, with some left for fragments and buffers"
        )


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (("model.in_channels=8",), 2, "model.in_channels=8: the data gives 4 channel(s)"),
        (("trainer.num_processes=7", "trainer.device_batch_size=1"), 2, "cannot be shared by 7 processes"),
        (("optimizer.lr=-1",), 2, "optimizer.lr=-1"),
        (("device=gpu",), 2, "device=gpu: choose auto, cpu, cuda"),
        (("sampler.num_steps=2000",), 2, "sampler.num_steps=2000"),
        (("objective.loss=simple",), 2, "objective.loss=simple: leaves a learned variance untrained"),
        (("data.resolution=null",), 2, "data.resolution=null: the data is not there to tell"),
        (("data.resolution=250",), 2, "data.resolution=250: must be a multiple of 8"),
        (("run_dir=/dev/null",), 73, "/dev/null is a file"),
    ],
)
def test_what_would_not_run_is_refused(overrides, code, says, in_tmp, capsys):
    assert main(["train", "experiment=imagenet256_diffussm_s", DRY, *overrides]) == code
    said = capsys.readouterr()
    assert said.out == "" and says in said.err and said.err.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


def test_the_size_of_missing_images_may_follow_from_the_model(in_tmp, capsys):
    lines = told(capsys, "experiment=imagenet256_dit_s_2", "data.resolution=null", "device=cuda:7")
    assert "256 tokens" in lines["cost"] and lines["model"].endswith("bf16 on device=cuda:7")


def test_fewer_bytes_in_less_precision(in_tmp, capsys):
    needed = {}
    for name in ("fp32", "bf16", "fp16"):
        small = ("experiment=imagenet256_dit_s_2", "model.depth=2", f"trainer.precision={name}")
        memory = told(capsys, *small)["memory"]
        needed[name] = float(re.search(r"activations of 256 images ([\d.,]+) GiB", memory)[1])
    assert 0.5 < needed["bf16"] / needed["fp32"] < 0.75  # normalisation and residual stream stay fp32
    assert needed["fp16"] == needed["bf16"]


def test_a_model_in_parts_takes_a_share_of_the_memory(in_tmp, capsys):
    small = ("experiment=imagenet256_dit_s_2", "model.depth=2", "trainer.num_processes=8")

    def sizes(*overrides: str) -> dict[str, float]:
        lines = told(capsys, *small, *overrides)
        assert ("1/8 of weights, moments and averages on each" in lines["model"]) == bool(overrides)
        found = re.findall(r"(weights|gradients|optimizer|averages|blocks at work) ([\d.]+) MiB", lines["memory"])
        return {name: float(size) for name, size in found}

    whole = sizes()
    parts, accumulating = (
        sizes("trainer.parallel=fsdp", *more) for more in ((), ("trainer.device_batch_size=16",))
    )
    assert "blocks at work" not in whole and 0 < parts["blocks at work"] <= 2 * whole["weights"]
    for name in ("weights", "optimizer", "averages"):
        assert parts[name] == accumulating[name] == pytest.approx(whole[name] / 8, abs=0.1)
    assert parts["gradients"] == parts["weights"] and accumulating["gradients"] == whole["gradients"]


def test_a_run_that_is_there_is_looked_at_and_left_alone(in_tmp, capsys):
    assert main(["train", *SMALL_RUN]) == 0
    before = {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*")}
    capsys.readouterr()
    longer = told(capsys, *SMALL_RUN, "trainer.total_images=160")
    assert longer["run"] == "runs/digits (would continue from step-000000000008)"
    assert longer["data"] == "1,437 images (1, 8, 8), 10 classes"
    assert main(["train", *SMALL_RUN, DRY]) == 0
    assert "finished at 128 images; nothing to do" in capsys.readouterr().out
    assert main(["train", *SMALL_RUN, DRY, "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr: 0.008 -> 0.5" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*")} == before


def test_data_and_autoencoder_that_are_there_are_found_to_fit(in_tmp, capsys):
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(in_tmp / f"{index}.png")
    make_tiny_vae(in_tmp / "vae")
    make_tiny_vae(in_tmp / "other", seed=1)
    vae = "autoencoder.pretrained=vae"
    assert main(["encode", "data.path=.", "data.resolution=32", vae, "to=set", "autoencoder.scale=1.0"]) == 0
    capsys.readouterr()
    lsun = (
        "experiment=lsun_church_diffussm_xl",
        "model=diffussm_tiny",
        "model.num_classes=null",
        "model.in_channels=4",
    )
    given = (*lsun, "data.path=set", "data.resolution=32", vae, "autoencoder.scale=1.0")
    lines = told(capsys, *given)
    assert lines["data"] == "4 images (3, 32, 32), no classes" and lines["autoencoder"] == "vae: there"
    for change, code, says in (
        ("autoencoder.pretrained=other", 65, "latents of another autoencoder"),
        ("data.resolution=64", 2, "data.resolution=64: the latents in set are of images of 32x32"),
        ("model.num_classes=7", 2, "model.num_classes=7: the data has no class labels"),
    ):
        assert main(["train", *given, DRY, change]) == code
        assert says in capsys.readouterr().err
    shutil.rmtree(in_tmp / "vae")
    assert told(capsys, *given)["autoencoder"] == "vae: not on this machine yet"
