"""The parts of the ablations: enlarged digits, their evaluator, the held-out loss, and crops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN

from diffussm.build import complexity_of
from diffussm.cli import main
from diffussm.compose import compose
from diffussm.data.images import Digits
from diffussm.diffusion.likelihood import mean_loss
from diffussm.diffusion.loss import DDPMObjective
from diffussm.diffusion.schedule import linear_schedule
from diffussm.evaluation.features import DigitsCNN

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Remembers what it is asked for, and leaves what the script looks at.
DIFFUSSM = """#!/bin/sh
echo "$@" >> asked
case $1 in
    train) mkdir -p runs/digits16_ablation/model-x__seed-0 runs/photographs_ablation/model-x__seed-0 ;;
    stats) touch runs/digits16_reference.npz ;;
    compare) mkdir -p "$2/compare" ;;
esac
"""
PYTHON = """#!/bin/sh
[ "$1" != scripts/photograph_crops.py ] || mkdir -p "$2/train" "$2/held_out"
"""


def test_enlarged_digits_are_the_digits():
    small, large = Digits("held_out"), Digits("held_out", resolution=16)
    assert large[0][0].shape == large.image_shape == (1, 16, 16) and torch.equal(small.labels, large.labels)
    means = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert (means - small.images).abs().mean() < 12  # of 255
    assert small.fingerprint != large.fingerprint and small.preprocessing != large.preprocessing
    with pytest.raises(ValueError, match="resolution=12: must be a multiple of 8"):
        Digits(resolution=12)


def test_the_evaluator_knows_enlarged_digits():
    large = Digits("held_out", resolution=16)
    network = DigitsCNN.pretrained(reduction=2)
    assert network.image_shape == large.image_shape and network.settings == {"reduction": 2}
    assert (network(large.images).logits.argmax(dim=1) == large.labels).float().mean() > 0.93


def test_squares_of_equal_pixels_are_measured_as_one():
    images = Digits("held_out").images[:5]
    doubled = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(DigitsCNN.pretrained(reduction=2)(doubled).pool, DigitsCNN.pretrained()(images).pool)


def test_the_mean_loss_is_that_of_training_at_its_timesteps():
    objective, asked = DDPMObjective(linear_schedule(100), loss="simple"), []

    def model(x_t, t, y, drop_uniform):
        asked.append(t.unique().item())
        return torch.zeros_like(x_t)

    noise = torch.randn(3, 1, 4, 4)
    terms = mean_loss(objective, model, torch.zeros_like(noise), None, lambda: noise, num_times=4)
    assert asked == [12, 37, 62, 87]
    assert torch.allclose(terms["loss"], noise.square().flatten(1).mean(dim=1))
    assert set(terms) == {"loss", "loss_mse"}


@pytest.mark.parametrize("recipe", [(), ("objective=flow", "sampler=flow_heun", "sampler.num_steps=2")])
def test_evaluate_measures_the_loss_on_held_out_images(recipe, in_tmp):
    """The trained model's is below that of a prediction of 0, and the same in batches of any size."""
    run = (*SMALL_RUN, *recipe, "trainer.total_images=640", "trainer.ema_decays=[0.5]")
    assert main(["train", *(key for key in run if recipe == () or key != "sampler.clip_x_0=true")]) == 0
    found = []
    for batch_size in (7, 250):
        arguments = ["metrics=[loss]", "data.split=held_out", "likelihood_images=20", f"out=of_{batch_size}.json"]
        assert main(["evaluate", "checkpoint=runs/digits", *arguments, f"sampling.batch_size={batch_size}"]) == 0
        found.append(json.loads(Path(f"of_{batch_size}.json").read_text())["image_metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0]["num_samples"] == 20
    assert 0 < found[0].get("loss_mse", found[0]["loss"]) < 1.2


@pytest.mark.parametrize(
    ("experiment", "side", "dit"),
    [
        ("digits16", 16, "model.hidden_size=88 model.depth=3 model.input_size=16"),
        ("photographs", 32, "model.hidden_size=48 model.input_size=32"),
    ],
)
def test_dit_computes_as_much(experiment, side, dit):
    """Operations of dense layers, attention and state-space models together, to a tenth."""
    assert dit in (SCRIPTS / "ablations.sh").read_text()
    ours = compose("train", [f"experiment={experiment}"]).model
    theirs = compose(
        "train", [f"experiment={experiment}", "model=dit_tiny", "model.patch_size=2", *dit.split()]
    ).model
    costs = [complexity_of(model, (ours.in_channels, side, side)) for model in (ours, theirs)]
    operations = [2 * cost.macs + cost.ssm_flops for cost in costs]
    assert operations[1] == pytest.approx(operations[0], rel=0.1)


def test_no_held_out_crop_shows_what_is_trained_on(tmp_path):
    pytest.importorskip("skimage")
    subprocess.run([sys.executable, SCRIPTS / "photograph_crops.py", tmp_path], check=True, capture_output=True)
    places = {}
    for split in ("train", "held_out"):
        for path in (tmp_path / split).iterdir():
            stem, _, left = path.stem.rsplit("_", 2)
            places.setdefault(split, {}).setdefault(stem, set()).add(int(left))
    assert len(places["train"]) == 7 and places["train"].keys() == places["held_out"].keys()
    for stem, lefts in places["train"].items():
        assert max(lefts) + 32 <= min(places["held_out"][stem])


@pytest.fixture
def ablations(tmp_path):
    """Run the script with stand-ins for its environment; gives its result and what was asked of diffussm."""
    (tmp_path / "scripts").mkdir()
    for name in ("ablations.sh", "environment.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, content in (("diffussm", DIFFUSSM), ("python", PYTHON)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    for path in ("pyproject.toml", ".venv/.installed-digits,photographs,sweep"):
        (tmp_path / path).touch()
    (tmp_path / "runs").mkdir()

    def run(*words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        asked = tmp_path / "asked"
        asked.write_text("")
        command = ["bash", "scripts/ablations.sh", *words]
        result = subprocess.run(
            command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=60
        )
        return result, asked.read_text().splitlines()

    return run


def test_the_script_run_again_asks_for_the_same(ablations):
    """What it has made in between, such as a comparison, is no run to be measured."""
    (first, asked), (second, again) = ablations(), ablations()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert again == [line for line in asked if not line.startswith("stats")] != asked
    assert [line.split()[0] for line in again] == ["train", "train", "train", "evaluate", "compare"] * 2
    assert [word for line in again for word in line.split() if word.startswith("checkpoint=")] == [
        f"checkpoint=runs/{name}_ablation/model-x__seed-0" for name in ("digits16", "photographs")
    ]


def test_the_script_knows_its_parts_and_leaves_no_half_of_the_crops(ablations, tmp_path):
    result, asked = ablations("photograph")
    assert result.returncode == 1 and "photograph: choose digits16 or photographs" in result.stderr and not asked
    half = tmp_path / "runs" / "photograph_crops.part" / "train" / "old.png"
    half.parent.mkdir(parents=True)
    half.touch()
    result, asked = ablations("photographs")
    assert result.returncode == 0 and len(asked) == 5, result.stderr
    names = {str(path.relative_to(tmp_path)) for path in (tmp_path / "runs").rglob("*")}
    assert names >= {"runs/photograph_crops/train", "runs/photograph_crops/held_out"} and not any(
        "part" in n for n in names
    )
