"""`diffussm plan` from the command line: what it foresees is what happens, and nothing is created."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from safetensors.torch import load_file

from diffussm.cli import main
from diffussm.plan.facts import GPUS

# The recipe of the paper around a network that is traced in a moment.
TINY = ("model.hidden_size=16", "model.depth=1", "model.d_state=4")
IMAGENET = ("experiment=imagenet256_diffussm_xl", *TINY)
QUICK = ("sampler=ddim", "sampler.num_steps=3")


def planned(capsys, *overrides: str) -> dict[tuple[str, str], dict]:
    assert main(["plan", *overrides, "json=true"]) == 0, capsys.readouterr().err
    document = json.loads(capsys.readouterr().out)
    return {(entry["stage"], entry["quantity"]): entry for entry in document["entries"]}


def test_from_raw_archive_to_table_row(in_tmp, capsys):
    entries = planned(capsys, *IMAGENET, *QUICK, "price_per_hour=2")
    stages = list(dict.fromkeys(stage for stage, _ in entries))
    assert stages == ["raw data", "encoding", "training", "memory", "checkpoints", "evaluation", "whole job"]
    assert entries["raw data", "images"]["value"] == 1_281_167
    assert entries["encoding", "latent set on disk"]["value"] == pytest.approx(41.99, rel=1e-3)
    assert entries["encoding", "encoder, per image"]["value"] == pytest.approx(135.8, abs=1)
    assert entries["encoding", "encoder, per image"]["standing"] == "assumed"
    assert entries["training", "images seen"]["value"] == 660_000_000
    assert entries["evaluation", "samples"]["value"] == 50_000
    assert {entry["standing"] for entry in entries.values()} <= {"computed", "published", "given", "assumed"}
    assert not list(in_tmp.iterdir())


def test_the_table_says_what_is_assumed(in_tmp, capsys):
    assert main(["plan", *IMAGENET, *QUICK, "gpu=h100", "gpus=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "imagenet256_diffussm_xl on 16 x H100 SXM, MFU 0.35 (assumed)"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "stage",
        "quantity",
        "value",
        "standing",
        "how",
    ]
    assert main(["plan", *IMAGENET, *QUICK, "mfu=0.7"]) == 0
    assert "MFU 0.7 (given)" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "half"), [("v100", "fp16"), ("a100", "bf16")])
def test_half_precision_is_the_one_that_the_gpu_has(gpu, half, in_tmp, capsys):
    entries = planned(capsys, *IMAGENET, *QUICK, f"gpu={gpu}", "trainer.precision=fp16")
    assert entries["evaluation", "... in half precision"]["how"] == f"sampling.precision={half}"


def test_twice_the_mfu_is_half_the_time(in_tmp, capsys):
    slow, fast = (planned(capsys, *IMAGENET, *QUICK, f"mfu={mfu}")["training", "time"] for mfu in (0.2, 0.4))
    assert slow["value"] == pytest.approx(2 * fast["value"]) and slow["standing"] == "given"


def test_a_run_leaves_the_checkpoint_that_was_foreseen(in_tmp, capsys):
    overrides = (*SMALL_RUN, "trainer.ema_decays=[0.99,0.9]", "trainer.ema_power=[0.1]")
    foreseen = planned(capsys, *overrides, "gpu=cpu", "gpus=1")["checkpoints", "one"]["value"] * 1e9
    assert main(["train", *overrides]) == 0
    files = sorted(Path("runs/digits/checkpoints").iterdir())[-1].glob("*.safetensors")
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert sum(4 * tensor.numel() for tensor in tensors if tensor.ndim) == pytest.approx(foreseen, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("sampler=ddpm", "sampler.num_steps=4", "guidance.scale=1.5"), 8),
        (("sampler=ddpm", "sampler.num_steps=[2,3]", "guidance.scale=1"), 5),
        (("sampler=heun", "sampler.num_steps=4", "guidance.scale=1"), 7),
        (("sampler=ddim", "sampler.num_steps=10", "guidance.scale=1.5", "guidance.interval=[0,499]"), 15),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_passes_of_the_network_are_counted(in_tmp, capsys, overrides, passes):
    entries = planned(capsys, *SMALL_RUN, *overrides, "gpus=1")
    assert entries["evaluation", "passes of the network, per sample"]["value"] == passes


def test_images_that_are_encoded_in_training_are_encoded_in_training(in_tmp, capsys):
    common = (*IMAGENET, *QUICK, "num_images=1000")
    folder = planned(capsys, *common, "data=image_folder", "data.horizontal_flip=true")
    assert ("encoding", "time") not in folder and folder["raw data", "images"]["standing"] == "given"
    assert "encodes in every step" in folder["training", "time"]["how"]
    assert folder["training", "time"]["value"] > 2 * planned(capsys, *common)["training", "time"]["value"]


def test_pixels_need_no_autoencoder_and_a_cpu_is_measured(in_tmp, capsys):
    entries = planned(capsys, *SMALL_RUN, "gpu=cpu", "gpus=1", "mfu=1")
    assert not any(stage == "encoding" for stage, _ in entries)
    assert entries["training", "time"]["standing"] == "measured"
    assert entries["raw data", "images"]["value"] == 1437
    assert ("whole job", "energy") not in entries and ("whole job", "price") not in entries


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("experiment=imagenet",), "experiment=imagenet: choose"),
        (("gpu=a10O",), "gpu=a10O: choose a100, a100_40, "),
        (("gpu=A100",), f"gpu=A100: choose {', '.join(GPUS)}, cpu (did you mean a100?)"),
        (("gpus=0",), "gpus=0: must be at least 1"),
        (("mfu=35",), "mfu=35.0: must be above 0 and at most 1"),
        (("price_per_hour=-1",), "price_per_hour=-1.0: must be at least 0"),
        (("archive=imagnet",), "archive=imagnet: choose imagenet, lsun_bedroom, lsun_church (did you"),
        (("data.path=latents/mine",), "num_images=null: the data is not there to be counted"),
        (("num_images=0",), "num_images=0: must be at least 1"),
        (("dtype=bf16",), "dtype=bf16: choose fp16, fp32"),
        (("gpu=v100",), "trainer.precision=bf16: gpu=v100 has none: set it to fp16 or fp32"),
        (("model.input_size=3",), "model.input_size: no such key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_planned_is_told_in_one_line(in_tmp, capsys, overrides, told):
    assert main(["plan", *IMAGENET, *QUICK, *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"diffussm: {told}") and captured.err.count("\n") == 1 and not captured.out
