"""A model in parts is the model: the same losses, weights, files, pictures and skips, in less memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.runs import checkpoints, command, fingerprint, records, train_state
from PIL import Image
from safetensors.torch import load_file
from test_trainer import make_trainer

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.launch import Place
from diffussm.training.parallel import Replicas
from diffussm.training.sharding import Shards

# Clipped in every step, in several passes, at a learning rate that does not blow up rounding within 20 steps.
STEADY = (
    "model.depth=2",
    "model.activation_checkpointing=true",
    "optimizer.lr=1e-4",
    "optimizer.ssm_lr=1e-4",
    "trainer.max_grad_norm=1",
    "trainer.device_batch_size=3",
    "trainer.log_every_images=16",
    "trainer.save_every_images=160",
    "trainer.sample_every_images=160",
)
WHOLE, HALF = "trainer.total_images=320", "trainer.total_images=160"
REPLICAS = ("trainer.num_processes=2",)
SHARDS = (*REPLICAS, "trainer.parallel=fsdp")


def run(jobs, path: Path, *overrides: str, **options):
    return jobs.run(*command(path, *STEADY, *overrides, pictures=True), **options)


@pytest.fixture(scope="module")
def one(nursery, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharding") / "one"
    run(nursery, path, WHOLE)
    return path


@pytest.fixture(scope="module")
def shards(nursery, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    """A run in two parts, and for each of its processes the bytes of weights, moments and averages."""
    path = tmp_path_factory.mktemp("sharding") / "shards"
    job = run(nursery, path, WHOLE, *SHARDS, faults=[("tell_bytes",)])
    return path, {rank: [int(size) for size in sizes] for rank, *sizes in job.lines("BYTES")}


@pytest.fixture(scope="module")
def half(nursery, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharding") / "half"
    run(nursery, path, HALF, *SHARDS)
    return path


def files(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(checkpoints(path)[-1].glob("*.safetensors"))}


def assert_same(ours: Path, theirs: Path) -> None:
    """The same files of the same size, and in them the same tensors but for rounding."""
    sizes = [
        {file.name: file.stat().st_size for file in checkpoints(path)[-1].glob("*.safetensors")}
        for path in (ours, theirs)
    ]
    assert sizes[0] == sizes[1]
    mine, other = files(ours), files(theirs)
    for file in mine:
        assert list(mine[file]) == list(other[file])
        for name, tensor in mine[file].items():
            torch.testing.assert_close(tensor, other[file][name], rtol=0, atol=1e-6, msg=f"{file}: {name}")


def test_losses_weights_and_pictures_are_those_of_replicas_and_of_one_process(jobs, tmp_path, one, shards):
    run(jobs, tmp_path, WHOLE, *REPLICAS)
    ours = shards[0]
    for theirs in (one, tmp_path):
        assert len(records(ours)) == len(records(theirs)) == 20
        for mine, other in zip(records(ours), records(theirs), strict=True):
            assert mine.keys() == other.keys() and mine["images"] == other["images"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4) and mine["grad_norm"] > 1
        assert_same(ours, theirs)
        drawn = [sorted((path / "samples").iterdir()) for path in (ours, theirs)]
        assert [path.name for path in drawn[0]] == [path.name for path in drawn[1]] and len(drawn[0]) == 2
        for pair in zip(*drawn, strict=True):
            mine, other = (np.asarray(Image.open(path), int) for path in pair)
            assert mine.std() > 0 and abs(mine - other).max() <= 1


def test_a_process_has_its_part_of_weights_moments_and_averages(shards, figure):
    path, sizes = shards
    found = files(path)
    averages = [name for name in found if name.startswith("ema_")]
    groups = (["model.safetensors"], ["optimizer.safetensors"], averages)
    whole = [sum(t.nbytes for file in group for t in found[file].values() if t.ndim) for group in groups]
    assert len(sizes) == 2
    for mine in sizes.values():
        for size, total in zip(mine, whole, strict=True):
            assert size == pytest.approx(total / 2, rel=0.01)  # odd numbers of rows cannot be halved


def test_a_resume_is_bit_exact(jobs, tmp_path, half, shards):
    path = tmp_path / "run"
    shutil.copytree(half, path)
    run(jobs, path, WHOLE, *SHARDS)
    assert fingerprint(path) == fingerprint(shards[0])
    assert records(path) == records(shards[0])


def test_a_checkpoint_continues_in_other_processes_and_in_parts_again(jobs, tmp_path, half, one):
    path = tmp_path / "run"
    shutil.copytree(half, path)
    run(jobs, path, "trainer.total_images=208", *REPLICAS)
    run(jobs, path, "trainer.total_images=256", "trainer.num_processes=3", "trainer.parallel=fsdp")
    run(jobs, path, WHOLE, "trainer.parallel=fsdp")  # in one process, which has all of it
    assert_same(path, one)
    for mine, other in zip(records(path), records(one), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_other_weights_begin_and_what_is_not_finite_in_one_process_is_skipped_in_all(jobs, tmp_path, one):
    """As by replicas, with the scale of fp16 losses, power averages and their snapshots."""
    options = (
        "trainer.precision=fp16",
        "trainer.ema_power=[0.1]",
        "trainer.ema_snapshot_every_images=64",
        f"init_from={one}",
        "sampler=none",
    )
    for name, parallel in (("replicas", REPLICAS), ("shards", SHARDS)):
        run(jobs, tmp_path / name, *options, *parallel, faults=[("poison", 1, 3, 4)])
    ours, theirs = tmp_path / "shards", tmp_path / "replicas"
    state = train_state(ours)
    assert state["skipped_steps"] == train_state(theirs)["skipped_steps"] >= 2
    assert state["loss_scale"] == train_state(theirs)["loss_scale"]
    assert state["loss_scale"]["scale"] == 65536 / 2 ** state["skipped_steps"]
    assert state["imported"] == train_state(theirs)["imported"] is not None
    assert_same(ours, theirs)
    snapshots = [sorted(path.glob("ema_snapshots/*/*.safetensors")) for path in (ours, theirs)]
    assert len(snapshots[0]) == 2
    for mine, other in zip(*(map(load_file, found) for found in snapshots), strict=True):
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tolerance", "overrides"),
    [
        (2e-3, ("model=diffussm_tiny", "model.d_state=4", "trainer.precision=bf16", "trainer.compile=true")),
        (1e-6, ("model=dit_tiny", "model.num_heads=2", "trainer.precision=fp32")),
    ],
    ids=["compiled, in bf16", "DiT"],
)
def test_losses_in_a_single_pass_are_those_of_one_process(jobs, tmp_path, tolerance, overrides):
    def options(path: Path) -> list[str]:
        small = [option for option in command(path, overrides[0]) if option != "model.d_state=4"]
        return [*small, *overrides[1:], "trainer.log_every_images=16", "optimizer.lr=1e-4", "model.depth=2"]

    jobs.run(*options(tmp_path / "one"), "trainer.precision=fp32", "trainer.compile=false")
    jobs.run(*options(tmp_path / "shards"), *SHARDS, faults=[("compile_with", "aot_eager")])
    assert len(records(tmp_path / "shards")) == 8
    for mine, other in zip(records(tmp_path / "shards"), records(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance)


def test_one_process_has_all_of_the_model(tmp_path):
    assert type(make_trainer(tmp_path, "trainer.parallel=fsdp").parallel) is Replicas


def test_processes_that_have_not_met_are_refused():
    with pytest.raises(ConfigError, match=r"trainer\.parallel=fsdp: needs processes that have met: start them"):
        Shards(Processes(Place(0, 2)), torch.nn.Linear(2, 2), torch.device("cpu"))
