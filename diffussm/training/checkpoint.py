"""Checkpoints: directories of safetensors and JSON with a SHA-256 manifest, published by one rename.

    step-000000001234/
      model.safetensors  ema_0.9999.safetensors  optimizer.safetensors
      train_state.json   config.json             manifest.json (written last)

Nothing is unpickled on any path. Safetensors, like every format, loads flipped bits without a word, so
every file is checked against the manifest before it is parsed. See `CheckpointStore` for the life cycle.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from diffussm.runtime.errors import RunDirectoryError, StorageError
from diffussm.runtime.hashing import hash_file, hash_text
from diffussm.runtime.run_dir import sync_directory, write_and_sync

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
BEST = "best"  # beside `checkpoints`: the one with the best evaluation
_PUBLISHED = re.compile(r"step-\d{12}")
_FILE = re.compile(r"[A-Za-z0-9_.\-]+\.(safetensors|json)")


class Checkpoint:
    """A published checkpoint whose every file has been found to match the manifest."""

    def __init__(self, path: Path) -> None:
        """Verify the directory; RunDirectoryError names the first file that is missing or damaged."""
        self.path = path
        self.manifest = _read_manifest(path)
        for name, entry in self.files.items():
            _verify(path / name, entry)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name to size and SHA-256."""
        return self.manifest["files"]

    @property
    def sha256(self) -> str:
        """A hash that stands for the whole checkpoint."""
        return hash_text(json.dumps(self.files, sort_keys=True))

    @property
    def ema_names(self) -> list[str]:
        """The averaged weights it holds, `ema_<decay>`, in the order of the run's configuration."""
        return [name.removesuffix(".safetensors") for name in self.files if name.startswith("ema_")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of NAME.safetensors."""
        path = self._known(f"{name}.safetensors")
        try:
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise _not_ours(path, error) from None
        if (name == "model" or name in self.ema_names) and _describe(tensors) != self.manifest["model"]:
            raise _not_ours(path, "other tensors than its manifest says")
        return tensors

    def document(self, name: str) -> dict[str, Any]:
        """The content of NAME.json."""
        path = self._known(f"{name}.json")
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict):
                raise ValueError(f"holds a {type(document).__name__}")
        except (ValueError, RecursionError) as error:
            raise _not_ours(path, error) from None
        return document

    def check_model(self, state: Mapping[str, Tensor]) -> None:
        """Refuse, naming both sides, unless this is a checkpoint of a model with these tensors."""
        ours, theirs = _describe(state), self.manifest["model"]
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise RunDirectoryError(
                    f"{self.path}: a checkpoint of another model: {name} is {theirs.get(name, 'absent')} there "
                    f"and {ours.get(name, 'absent')} in the model: use its configuration or another run_dir"
                )

    def _known(self, file: str) -> Path:
        if file not in self.files:
            raise RunDirectoryError(f"{self.path}: holds no {file}: it has {', '.join(self.files)}")
        return self.path / file


class CheckpointStore:
    """The checkpoints of one run: the newest valid one is where it continues.

    Args:
        root: the directory of step-... directories.
        keep: how many are kept; older ones go only after a newer one is published. None: all.
        warn: told, in one line, of each damaged checkpoint that is passed over.
    """

    def __init__(self, root: Path, keep: int | None = 2, warn: Callable[[str], None] = print) -> None:
        self.root, self.keep, self.warn = root, keep, warn
        self._foreseen: Checkpoint | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> Path:
        """Publish a checkpoint, whose first group of `tensors` tells the model's. StorageError if it cannot."""
        path = self.root / f"step-{step:012d}"
        temporary = self.root / f".tmp-{path.name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".tmp-*"):  # of a save that was killed
                shutil.rmtree(leftover)
            temporary.mkdir()
            files = {}
            for name, group in tensors.items():
                content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in group.items()})
                files[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", content)
            for name, document in documents.items():
                content = json.dumps(document, indent=2, allow_nan=False).encode()
                files[f"{name}.json"] = _write(temporary / f"{name}.json", content)
            manifest = {
                "format_version": FORMAT_VERSION,
                "model": _describe(next(iter(tensors.values()))),
                "files": files,
            }
            write_and_sync(temporary / MANIFEST, json.dumps(seal(manifest), indent=2).encode())
            sync_directory(temporary)
            if path.exists():  # a damaged one that was passed over, or the same step saved twice
                shutil.rmtree(path)
            temporary.rename(path)
            sync_directory(self.root)
            # Newer ones have been passed over as damaged: they replace none.
            published = [found for found in self.paths() if found.name <= path.name]
            for old in published[: -self.keep] if self.keep else []:
                shutil.rmtree(old)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"{path}: {error.strerror or error}: the checkpoints before it are intact; free some space"
            ) from error
        return path

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there is none at all.

        RunDirectoryError if there are checkpoints and all are damaged: a run never restarts silently.
        """
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None:
            return foreseen
        paths = self.paths()
        for path in reversed(paths):
            try:
                return Checkpoint(path)
            except RunDirectoryError as error:
                self.warn(f"passing over a damaged checkpoint: {error}")
        if paths:
            raise RunDirectoryError(
                f"{self.root}: {len(paths)} checkpoint(s), none valid: restore one, or move the run directory "
                "away to start anew"
            )
        return None

    def foresee(self) -> Checkpoint | None:
        """What the next `newest_valid` returns, which then need not read all of it again."""
        self._foreseen = self.newest_valid()
        return self._foreseen

    def paths(self) -> list[Path]:
        """All published checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if _PUBLISHED.fullmatch(path.name))


def find_checkpoint(path: Path, warn: Callable[[str], None] = print, key: str = "checkpoint") -> Checkpoint:
    """A checkpoint from its own directory, or the newest valid one of a run directory; errors name `key`."""
    if (path / MANIFEST).exists() or _PUBLISHED.fullmatch(path.name):
        return Checkpoint(path)
    root = path if path.name in ("checkpoints", BEST) else path / "checkpoints"
    checkpoint = CheckpointStore(root, warn=warn).newest_valid()
    if checkpoint is None:
        raise RunDirectoryError(
            f"{key}={path}: no checkpoint there: give a run directory or one of its checkpoints/step-..."
        )
    return checkpoint


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of all that it says beside it, by which its own damage is found."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**content, "sha256": hash_text(json.dumps(content, sort_keys=True))}


def _not_ours(path: Path, error: object) -> RunDirectoryError:
    """For a file that is what its manifest says, and yet not what a checkpoint holds."""
    return RunDirectoryError(f"{path}: not written by diffussm ({error}): use another checkpoint")


def _describe(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in sorted(state.items())}


def _write(path: Path, content: bytes) -> dict[str, Any]:
    write_and_sync(path, content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        version, names, model = manifest["format_version"], list(manifest["files"]), manifest["model"]
        entries = [(entry["size"], entry["sha256"]) for entry in manifest["files"].values()]
        whole = (
            all(_FILE.fullmatch(name) for name in names)
            and all(isinstance(size, int) and isinstance(sha256, str) for size, sha256 in entries)
            and isinstance(model, dict)
            and manifest.keys() <= {"format_version", "model", "files", "sha256"}
        )
    except FileNotFoundError:
        raise RunDirectoryError(f"{file}: missing: not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunDirectoryError(f"{file}: damaged ({type(error).__name__}): use another checkpoint") from None
    if not whole or not any(name.endswith(".safetensors") for name in names):
        raise RunDirectoryError(f"{file}: damaged or hostile: file names or contents that no checkpoint has")
    if version != FORMAT_VERSION:
        raise RunDirectoryError(f"{file}: format_version {version}, this diffussm reads {FORMAT_VERSION}")
    if "sha256" in manifest and seal(manifest) != manifest:  # earlier ones have none
        raise RunDirectoryError(f"{file}: damaged: not what its own SHA-256 says: use another checkpoint")
    return manifest


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    digest = ""
    try:
        is_file, size = path.is_file(), path.stat().st_size  # a device or a pipe may never end
        if is_file and size == entry["size"]:
            digest = hash_file(path)
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror}: use another checkpoint") from None
    if not is_file:
        raise RunDirectoryError(f"{path}: no file: use another checkpoint")
    if size != entry["size"]:
        raise RunDirectoryError(f"{path}: truncated: expected {entry['size']} bytes, found {size}")
    if digest != entry["sha256"]:
        expected, found = entry["sha256"][:12], digest[:12]
        raise RunDirectoryError(f"{path}: damaged: expected SHA-256 {expected}..., found {found}...")
