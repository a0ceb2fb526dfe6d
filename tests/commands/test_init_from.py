"""`init_from=`: fine-tuning begins with the weights of another run or file, and with nothing else of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN
from safetensors.torch import save_file

from diffussm.build import System, build_source, build_trainer
from diffussm.cli import main
from diffussm.commands.init_from import read_initial_weights
from diffussm.compose import compose
from diffussm.models import DiT
from diffussm.models.layouts import to_diffusers
from diffussm.runtime.distributed import Processes
from diffussm.runtime.run_dir import RunDirectory
from diffussm.training.checkpoint import find_checkpoint
from diffussm.training.trainer import Trainer

TABLE = "y_embedder.embedding_table.weight"
TINY_DIT = (
    *(override for override in SMALL_RUN if override != "model.d_state=4"),
    "model=dit_tiny", "model.input_size=8", "model.patch_size=2", "model.num_heads=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small finished run."""
    path = tmp_path_factory.mktemp("init") / "base"
    assert main(["train", *SMALL_RUN, f"run_dir={path}", "name=base"]) == 0
    return path


def begin(path: Path, init_from: Path, *overrides: str, small=SMALL_RUN) -> tuple[Trainer, list[str]]:
    """A trainer before its first step, and what was said."""
    config = compose("train", [*small, f"run_dir={path}", f"init_from={init_from}", "seed=5", *overrides])
    source = build_source(config.data, config.model)
    system = System(config, source.image_shape, torch.device("cpu"))
    trainer = build_trainer(system, source, RunDirectory(path), Processes(), lambda: False, print)
    notes: list[str] = []
    trainer.initial = read_initial_weights(config, trainer.model, notes.append)
    trainer.restore()
    return trainer, notes


@pytest.mark.parametrize(("asked", "name"), [("ema", "ema_0.998"), ("model", "model"), ("ema_0.998", "ema_0.998")])
def test_only_the_weights_that_are_asked_for_are_taken(base, tmp_path, asked, name):
    trainer, notes = begin(tmp_path, base, f"init_weights={asked}")
    expected = find_checkpoint(base).tensors(name)
    for state in (trainer.model.state_dict(), trainer.averages.first.state_dict()):
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert (trainer.step, trainer.averages.num_updates, len(trainer.optimizer.state)) == (0, 0, 0)
    assert notes == [f"init_from: {len(expected)} tensors of {name} of base/step-000000000008"]


def test_a_class_table_of_another_size_is_made_anew_from_the_seed(base, tmp_path):
    trainer, notes = begin(tmp_path, base, "model.num_classes=12")
    again, _ = begin(tmp_path, base, "model.num_classes=12")
    config = compose("train", [*SMALL_RUN, "seed=5", "model.num_classes=12"])
    fresh = System(config, (1, 8, 8), torch.device("cpu")).model.state_dict()
    state, theirs = trainer.model.state_dict(), find_checkpoint(base).tensors("ema_0.998")
    assert torch.equal(state[TABLE], fresh[TABLE]) and torch.equal(state[TABLE], again.model.state_dict()[TABLE])
    assert all(torch.equal(state[key], theirs[key]) for key in state if key != TABLE)
    assert notes[1:] == [f"init_from: made anew: {TABLE} ([11, 16] there, [13, 16] here)"]
    assert trainer.imported["remade"] == [f"{TABLE} ([11, 16] there, [13, 16] here)"]


def test_an_unconditional_model_leaves_the_table_out(base, tmp_path):
    _, notes = begin(tmp_path, base, "model.num_classes=null", "guidance.scale=1", "objective.prediction=v")
    assert notes[1:] == [
        f"init_from: left out: {TABLE} ([11, 16] there, absent here)",
        "init_from: was trained otherwise: objective.prediction: eps there, v here",
    ]


def test_it_is_read_once_and_its_origin_is_kept(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    tuned = ["train", *SMALL_RUN, "name=tuned", f"run_dir={tmp_path / 'tuned'}", "trainer.save_every_images=16"]
    given = [*tuned, f"init_from={tmp_path / 'base'}"]
    assert main([*given, "trainer.total_images=32"]) == 0
    shutil.rmtree(tmp_path / "base")
    capsys.readouterr()
    assert main(given) == 0  # its own checkpoint wins
    assert "init_from" not in capsys.readouterr().err
    imported = find_checkpoint(tmp_path / "tuned").document("train_state")["imported"]
    assert (imported["file"], imported["weights"]) == ("base/step-000000000008", "ema_0.998")
    assert imported["sha256"] == find_checkpoint(base).sha256 and str(tmp_path) not in json.dumps(imported)
    assert main([*tuned, "trainer.total_images=144"]) == 2
    assert "init_from" in capsys.readouterr().err
    further, _ = begin(tmp_path / "further", tmp_path / "tuned")
    assert further.imported["imported"] == imported


def test_several_processes_begin_alike(base, tmp_path):
    losses = []
    for count in (1, 2):
        path = tmp_path / str(count)
        overrides = (f"run_dir={path}", f"init_from={base}", "seed=5", "optimizer.lr=1e-4", "model.num_classes=12")
        command = [
            sys.executable,
            "-m",
            "diffussm",
            "train",
            *SMALL_RUN,
            *overrides,
            "trainer.log_every_images=16",
        ]
        result = subprocess.run(
            [*command, f"trainer.num_processes={count}"], capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0 and result.stderr.count("init_from: made anew") == 1, result.stderr
        losses.append([json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 8


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (("model=dit_tiny",), 2, "model._target_: diffussm.models.DiffuSSM there, diffussm.models.DiT here"),
        (("model.hidden_size=32",), 2, "model.hidden_size: 16 there, 32 here"),
        (("model.token_order=serpentine",), 2, "model.token_order: raster there, serpentine here"),
        (("init_weights=ema_0.5",), 2, "init_weights=ema_0.5: "),
        (("init_weights=best",), 2, "init_weights=best: choose ema, ema_<decay>"),
        (("init_from=null", "init_weights=model"), 2, "init_weights=model: of what? set init_from too"),
        (("init_from=nowhere",), 73, "init_from=nowhere: no checkpoint there"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(base, overrides, code, says, in_tmp, capsys):
    small = TINY_DIT if "model=dit_tiny" in overrides else SMALL_RUN
    for dry in ("false", "true"):
        given = [*small, f"init_from={base}", *overrides, f"trainer.dry_run={dry}"]
        if code == 73 and dry == "true":
            assert main(["train", *given]) == 0 and f"not there: {says}" in capsys.readouterr().out
            continue
        assert main(["train", *given]) == code
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert list(in_tmp.iterdir()) == []


def test_import_has_its_own_weights(in_tmp, capsys):
    assert main(["import", "a.pt", "init_from=b"]) == 2
    assert "init_from: the run begins with the imported weights" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_files_of_others_serve_too(layout, tmp_path, in_tmp, capsys):
    model = DiT(1, 10, input_size=16, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    if layout == "official":
        path = tmp_path / "dit.pt"
        torch.save(model.state_dict(), path)
    else:
        path = tmp_path / "dit"
        path.mkdir()
        save_file(to_diffusers(model.state_dict()), path / "diffusion_pytorch_model.safetensors")
        (path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "sample_size": 16}))
    trainer, notes = begin(tmp_path / "run", path, small=TINY_DIT)
    state, theirs = trainer.model.state_dict(), model.state_dict()
    assert all(torch.equal(state[key], theirs[key]) for key in state if key != "pos_embed")
    assert f"({layout} layout)" in notes[0]
    assert notes[1:] == ["init_from: made anew: pos_embed ([1, 64, 16] there, [1, 16, 16] here)"]
    for overrides, says in (
        ((*TINY_DIT, "init_weights=model"), "holds one kind of weights"),
        ((*TINY_DIT, "model.depth=2"), "does not fit DiT: blocks.1."),
        (SMALL_RUN, "does not fit DiffuSSM"),
    ):
        assert main(["train", *overrides, f"init_from={path}"]) == 2
        assert says in capsys.readouterr().err
    if layout == "diffusers":  # which tells what shapes do not
        assert main(["train", *TINY_DIT, f"init_from={path}", "model.num_heads=4"]) == 2
        assert "model.num_heads: 2 there, 4 here" in capsys.readouterr().err
