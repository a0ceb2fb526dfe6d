"""Checkpoints: published whole, verified before parsed, damaged ones named and passed over."""

import errno
import json
import os
import random
import re

import pytest
import torch

from diffussm.runtime.errors import RunDirectoryError, StorageError
from diffussm.training.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, seal


def save(store: CheckpointStore, step: int) -> None:
    torch.manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(4, 3)},
        "ema_0.9": {"w": torch.randn(4, 3)},
        "optimizer": {"w/m": torch.ones(2)},
    }
    store.save(step, tensors, {"train_state": {"step": step}, "config": {"name": "x"}})


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    notes = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, warn=notes.append)
    store.notes = notes
    for step in (1, 2, 3):
        save(store, step)
    return store


def test_what_is_saved_is_loaded(store):
    checkpoint = store.newest_valid()
    torch.manual_seed(3)
    assert torch.equal(checkpoint.tensors("model")["w"], torch.randn(4, 3))
    assert torch.equal(checkpoint.tensors("ema_0.9")["w"], torch.randn(4, 3))
    assert checkpoint.document("train_state") == {"step": 3}
    assert checkpoint.ema_names == ["ema_0.9"]


def test_only_the_newest_are_kept_and_no_temporary_is_left(store):
    names = sorted(path.name for path in store.root.iterdir())
    assert names == ["step-000000000002", "step-000000000003"]


def test_the_hash_stands_for_the_content(store):
    newer, older = (Checkpoint(path) for path in reversed(store.paths()))
    assert newer.sha256 != older.sha256
    assert newer.sha256 == Checkpoint(newer.path).sha256


FILES = ["model.safetensors", "ema_0.9.safetensors", "optimizer.safetensors", "train_state.json", "config.json"]


@pytest.mark.fault("G5")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_is_named_and_the_one_before_is_used(store, name, damage):
    file = store.paths()[-1] / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[random.Random(0).randrange(len(content))] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert store.newest_valid().document("train_state") == {"step": 2}
    assert len(store.notes) == 1 and str(file) in store.notes[0]


def test_every_single_flipped_bit_of_every_file_is_found(store):
    path = store.paths()[-1]
    generator = random.Random(1)
    for name in [*FILES, "manifest.json"]:
        original = (path / name).read_bytes()
        for _ in range(20):
            content = bytearray(original)
            position = generator.randrange(len(content))
            content[position] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(content)
            with pytest.raises(RunDirectoryError, match=re.escape(str(path / name))):
                Checkpoint(path)
        (path / name).write_bytes(original)


def test_damaged_newer_checkpoints_take_no_valid_ones_place(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for step in (100, 300):
        save(store, step)
        (store.paths()[-1] / "manifest.json").write_text("{")
    save(store, 200)
    assert store.newest_valid().path.name == "step-000000000200"


@pytest.mark.fault("G5")
def test_with_only_damaged_checkpoints_a_run_never_starts_anew(store):
    for path in store.paths():
        (path / "manifest.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="none valid"):
        store.newest_valid()


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").newest_valid() is None


@pytest.mark.fault("G6")
@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd.json", "a/b.safetensors", "model.pkl"])
def test_hostile_file_names_are_refused(store, name):
    manifest_file = store.paths()[-1] / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(RunDirectoryError, match="hostile"):
        Checkpoint(store.paths()[-1])


def test_another_format_version_is_refused(store):
    manifest_file = store.paths()[-1] / "manifest.json"
    manifest_file.write_text(manifest_file.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(RunDirectoryError, match="format_version 99"):
        Checkpoint(store.paths()[-1])


@pytest.mark.fault("G15")
@pytest.mark.parametrize(
    "state", [{"w": torch.zeros(4, 4)}, {"v": torch.zeros(4, 3)}, {"w": torch.zeros(4, 3).half()}]
)
def test_another_model_is_refused_with_both_sides(store, state):
    with pytest.raises(RunDirectoryError, match=r"float32\[4, 3\].*(in the model)"):
        store.newest_valid().check_model(state)


def test_a_failed_save_keeps_everything_and_leaves_nothing(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(store.root.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save(store, 4)
    monkeypatch.undo()
    assert sorted(store.root.iterdir()) == before
    assert store.newest_valid().document("train_state") == {"step": 3}


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(store):
    (store.paths()[-1] / "model.safetensors").unlink()
    save(store, 3)
    assert store.newest_valid().document("train_state") == {"step": 3}


def test_is_found_by_run_directory_or_by_its_own(store):
    newest = store.paths()[-1]
    for path in (store.root.parent, store.root, newest):
        assert find_checkpoint(path).path == newest
    assert find_checkpoint(store.paths()[0]).document("train_state") == {"step": 2}
    with pytest.raises(RunDirectoryError, match="no checkpoint there"):
        find_checkpoint(store.root.parent / "nowhere")


def test_asking_for_an_absent_file_names_what_there_is(store):
    with pytest.raises(RunDirectoryError, match=r"holds no ema_0.5.safetensors: it has model"):
        store.newest_valid().tensors("ema_0.5")


@pytest.mark.fault("G6")
def test_loading_runs_no_code(store):
    """A pickle under any of our names is refused by its hash, and by the parser even where the hash fits."""
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(store.root / "pwned"),))

    path = store.paths()[-1]
    content = pickle.dumps(Evil())
    (path / "model.safetensors").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(RunDirectoryError, match=r"model\.safetensors: not written by diffussm"):
        Checkpoint(path).tensors("model")
    assert not (store.root / "pwned").exists()
