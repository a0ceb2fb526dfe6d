"""What a notebook draws is what the command draws."""

import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from PIL import Image

import diffussm
from diffussm import load_checkpoint, sample
from diffussm.cli import main
from diffussm.runtime.errors import ConfigError, RunDirectoryError

README = Path(__file__).resolve().parents[1] / "README.md"
DRAWN = ["classes=[3,8]", "num_images=5", "sampler=ddpm", "sampler.num_steps=3", "guidance.scale=1.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a space and a quote in its path."""
    path = tmp_path_factory.mktemp("a notebook's") / "runs" / "digits"
    assert main(["train", *SMALL_RUN, f'run_dir="{path}"']) == 0
    return path


@pytest.fixture
def loaded(run) -> diffussm.notebook.Loaded:
    return load_checkpoint(run)


def drawn(directory: Path) -> torch.Tensor:
    files = sorted(directory.glob("0*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])[:, None]


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_images_are_those_of_the_command_bit_for_bit(run, weights, tmp_path):
    out = tmp_path / "drawn"
    command = ["sample", f'checkpoint="{run}"', f"out={out}", *DRAWN, "sampling.seed=7", "sampling.batch_size=2"]
    assert main([*command, f"sampling.weights={weights}"]) == 0
    images = sample(
        load_checkpoint(run, weights=weights), 5, labels=[3, 8], sampler="ddpm", num_steps=3, guidance=1.5, seed=7,
        overrides=["sampling.batch_size=2"],
    )  # fmt: skip
    assert images.dtype == torch.uint8 and torch.equal(images, drawn(out))


def test_what_is_not_said_is_as_the_run_and_the_command_have_it(run, loaded, tmp_path):
    out = tmp_path / "drawn"
    assert main(["sample", f'checkpoint="{run}"', f"out={out}", "num_images=10"]) == 0
    assert torch.equal(sample(loaded), drawn(out))


def test_an_image_is_for_every_label_and_for_one_that_comes_twice(loaded):
    images = sample(loaded, labels=[3, 3, 8])
    assert images.shape == (3, 1, 8, 8) and not torch.equal(images[0], images[1])
    assert torch.equal(sample(loaded, 2, labels=[3])[1], images[1])


def test_the_seed_decides_and_drawing_leaves_no_trace(loaded):
    first = sample(loaded, 2, seed=1)
    assert not torch.equal(sample(loaded, 2, seed=2), first)
    assert torch.equal(sample(loaded, 2, seed=1), first)


def test_the_network_is_frozen_and_named(loaded):
    assert loaded.weights == "ema_0.998" and not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"labels": [12]}, "labels=[12]: each must lie in 0..9"),
        ({"labels": []}, "num_images=0: must be at least 1"),
        ({"sampler": "dim"}, "sampler=dim: choose ddim"),
        ({"num_steps": 0}, "sampler.num_steps=0"),
        ({"guidance": -1.0}, "guidance.scale=-1.0"),
        ({"seed": -1}, "sampling.seed=-1: must be at least 0"),
        ({"overrides": ["device=cuda"]}, "device=cuda: not a setting of sampling"),
        ({"overrides": ["sampling.weights=model"]}, "sampling.weights=model: not a setting of sampling"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_told_with_its_name(loaded, arguments, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        sample(loaded, **arguments)


def test_what_cannot_be_loaded_is_told_with_its_name(run, tmp_path):
    with pytest.raises(RunDirectoryError, match="no checkpoint there"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=re.escape("weights=ema_0.5: ")):
        load_checkpoint(run, weights="ema_0.5")
    with pytest.raises(ConfigError, match="device=gpu: choose auto"):
        load_checkpoint(run, device="gpu")


@pytest.mark.parametrize("where", ["package", "README"])
def test_the_example_runs(run, where, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    if where == "package":
        example = inspect.getdoc(diffussm).partition("):\n\n")[2]
    else:
        blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        (example,) = (block for block in blocks if "load_checkpoint" in block)
    names: dict = {}
    exec(textwrap.dedent(example), names)
    assert names["images"].shape == (2, 1, 8, 8) and names["images"].dtype == torch.uint8
