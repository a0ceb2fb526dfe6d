"""Checkpoints that rot, that a stranger made, or that belong to something else: named, and never loaded."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.runs import checkpoints, command
from safetensors.torch import save

from diffussm.cli import main
from diffussm.training.checkpoint import CheckpointStore, seal


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with two checkpoints."""
    path = tmp_path_factory.mktemp("checkpoints") / "run"
    assert main(command(path, "trainer.total_images=64")) == 0
    assert len(checkpoints(path)) == 2
    return path


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def continued(path: Path, *overrides: str) -> list[str]:
    """The command that continues the run."""
    return command(path, "trainer.total_images=96", *overrides)


@pytest.mark.fault("G5")
@pytest.mark.parametrize(("flips", "truncations"), [(30, 12), pytest.param(100, 40, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_found_named_and_fallen_back_from(run, tmp_path, figure, flips, truncations):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    notes: list[str] = []
    store = CheckpointStore(path / "checkpoints", warn=notes.append)
    older, newest = store.paths()
    files, draws = sorted(newest.iterdir()), random.Random(0)
    assert len(files) == 6
    found = {"flips": 0, "truncations": 0, "missing": 0}
    for kind, count in (("flips", flips), ("truncations", truncations), ("missing", len(files))):
        for number in range(count):
            file = files[number % len(files)]
            whole = file.read_bytes()
            damaged = bytearray(whole)
            damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
            if kind == "flips":
                file.write_bytes(damaged)
            elif kind == "truncations":
                file.write_bytes(whole[: draws.randrange(len(whole))])
            else:
                file.unlink()
            notes.clear()
            found[kind] += store.newest_valid().path == older and len(notes) == 1 and str(file) in notes[0]
            file.write_bytes(whole)
    assert store.newest_valid().path == newest
    figure(f"{found['flips']}/{flips} flips, {found['truncations']}/{truncations} truncations, "
           f"{found['missing']}/6 missing files")  # fmt: skip
    assert found == {"flips": flips, "truncations": truncations, "missing": 6}


@pytest.mark.fault("G5")
def test_a_run_without_a_valid_checkpoint_never_starts_anew(copy, capsys, figure):
    fresh = 0
    for number, file in enumerate(sorted(checkpoints(copy)[-1].iterdir())):
        whole = {found / file.name: (found / file.name).read_bytes() for found in checkpoints(copy)}
        for path, content in whole.items():
            path.write_bytes(content[:-1] if number % 2 else content[:-1] + b"?")
        before = sorted((copy / "checkpoints").rglob("*"))
        assert main(continued(copy)) == 73
        said = capsys.readouterr().err
        assert "none valid: restore one" in said and said.count(file.name) >= 2
        fresh += sorted((copy / "checkpoints").rglob("*")) != before
        for path, content in whole.items():
            path.write_bytes(content)
    figure(f"{fresh} silent fresh starts")
    assert not fresh


class Trap:
    """A pickle that would leave a trace."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def forge(path: Path, name: str, content: bytes) -> None:
    """Put this into a checkpoint, with a manifest that fits."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))


def pickled_checkpoint(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        forge(found, "model.safetensors", pickle.dumps(Trap()))
    return continued(copy)


def huge_header(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        forge(found, "model.safetensors", struct.pack("<Q", 2**62) + b"{}")
    return continued(copy)


def offsets_outside(copy: Path) -> list[str]:
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    for found in checkpoints(copy):
        forge(found, "optimizer.safetensors", struct.pack("<Q", len(header)) + header + bytes(4))
    return continued(copy)


def other_tensors(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        forge(found, "model.safetensors", save({"x": torch.zeros(3)}))
    return continued(copy)


def other_moments(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        forge(found, "optimizer.safetensors", save({"../x/exp_avg": torch.zeros(3)}))
    return continued(copy)


def nested_manifest(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        (found / "manifest.json").write_text("[" * 100_000)
    return continued(copy)


def nested_config(copy: Path) -> list[str]:
    forge(checkpoints(copy)[-1], "config.json", b"[" * 100_000)
    return ["sample", f"checkpoint={checkpoints(copy)[-1]}"]


def foreign_target(copy: Path) -> list[str]:
    newest = checkpoints(copy)[-1]
    config = json.loads((newest / "config.json").read_text())
    config["autoencoder"] = {"_target_": "os.system", "command": "touch pwned"}
    forge(newest, "config.json", json.dumps(config).encode())
    return ["sample", f"checkpoint={newest}", "sampler=ddim"]


def interpolation(copy: Path) -> list[str]:
    newest = checkpoints(copy)[-1]
    config = json.loads((newest / "config.json").read_text())
    config["name"] = "${oc.env:HOME}/${oc.create:{a: 1}}"
    config["model"]["_target_"] = "${name}"
    forge(newest, "config.json", json.dumps(config).encode())
    return ["sample", f"checkpoint={newest}", "sampler=ddim"]


def traversal(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        manifest = json.loads((found / "manifest.json").read_text())
        manifest["files"]["../../../../escaped.json"] = {"size": 0, "sha256": ""}
        (found / "manifest.json").write_text(json.dumps(seal(manifest)))
    return continued(copy)


def link_outside(copy: Path) -> list[str]:
    """To a device that never ends."""
    for found in checkpoints(copy):
        (found / "model.safetensors").unlink()
        (found / "model.safetensors").symlink_to("/dev/zero")
    return continued(copy)


def strange_numbers(copy: Path) -> list[str]:
    for found in checkpoints(copy):
        state = json.loads((found / "train_state.json").read_text())
        forge(found, "train_state.json", json.dumps({**state, "images": "many", "evil": 1}).encode())
    return continued(copy)


def yaml_object(copy: Path) -> list[str]:
    (copy / "config.yaml").write_text("!!python/object/apply:os.system ['touch pwned']")
    return continued(copy)


def pickled_weights(copy: Path) -> list[str]:
    torch.save({"model": Trap()}, copy / "hostile.pt")
    return ["import", str(copy / "hostile.pt")]


def bare_pickle(copy: Path) -> list[str]:
    (copy / "hostile.pth").write_bytes(pickle.dumps(Trap(), protocol=0))
    return ["import", str(copy / "hostile.pth")]


def endless_tensor(copy: Path) -> list[str]:
    """A file of a few bytes that says it is petabytes."""
    header = json.dumps({"x": {"dtype": "F64", "shape": [2**50], "data_offsets": [0, 2**53]}}).encode()
    (copy / "hostile.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return ["import", str(copy / "hostile.safetensors")]


def pickled_reference(copy: Path) -> list[str]:
    array = np.array([Trap()], dtype=object)
    np.savez(copy / "hostile.npz", **dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s", "arr_0"), array))
    return command(copy.parent / "new", f"evaluation.reference={copy / 'hostile.npz'}")


def huge_reference(copy: Path) -> list[str]:
    """An archive whose array says that it has exabytes."""
    header = io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**17)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(copy / "hostile.npz", "w") as archive:
        for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0", "../../escaped"):
            archive.writestr(f"{name}.npy", header.getvalue())
    return command(copy.parent / "new", f"evaluation.reference={copy / 'hostile.npz'}")


def pickled_latents(copy: Path) -> list[str]:
    path = copy.parent / "latents"
    (path / "shards").mkdir(parents=True)
    np.save(path / "shards" / "000000.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.save(path / "labels.npy", np.array([Trap()], dtype=object), allow_pickle=True)

    def entry(file: str) -> dict:
        content = (path / file).read_bytes()
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    manifest = {
        "format_version": 1, "source": {}, "autoencoder": {"kind": "identity"}, "scale": 1.0, "shift": 0.0,
        "dtype": "fp16", "image_shape": [1, 8, 8], "latent_shape": [1, 8, 8], "posterior": False,
        "spread": {"std": 1.0}, "num_classes": 10, "class_names": [],
        "shards": [{"count": 16, **entry("shards/000000.npy")}], "labels": entry("labels.npy"),
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    keys = [key for key in command(copy.parent / "new") if not key.startswith("evaluation")]
    return [*keys, "data=latents", f"data.path={path}", "evaluation=none"]


HOSTILE = [
    other_tensors, other_moments, pickled_checkpoint, huge_header, offsets_outside, nested_manifest,
    nested_config, foreign_target, interpolation, traversal, link_outside, strange_numbers, yaml_object,
    pickled_weights, bare_pickle, endless_tensor, pickled_reference, huge_reference, pickled_latents,
]  # fmt: skip


@pytest.mark.fault("G6")
@pytest.mark.parametrize("craft", HOSTILE, ids=lambda craft: craft.__name__)
def test_hostile_files_are_refused_and_do_nothing(
    copy, tmp_path, monkeypatch, capsys, craft: Callable[[Path], list[str]]
):
    monkeypatch.chdir(tmp_path)
    arguments = craft(copy)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments) in (2, 65, 73)
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("diffussm: ")]
    expected = ("passing over", "configuration changed", "autoencoder=")
    assert said[-1] == told[-1] and len(told[-1]) < 1000, said
    assert all(any(word in line for word in expected) for line in told[:-1]), said
    after = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    written = {path.name for path in after if before.get(path) != after[path]}
    assert written <= {"config.yaml", "status.json", ".lock"} and not list(tmp_path.rglob("pwned"))
