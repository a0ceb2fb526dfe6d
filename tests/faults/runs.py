"""What tests of faults know about a run by its directory, and the command of the smallest one."""

import hashlib
import json
from pathlib import Path

from conftest import SMALL_RUN

TIMES = {"images_per_second", "data_wait", "tflops_per_second", "mfu", "memory_gib"}


def command(path: Path, *overrides: str, pictures: bool = False) -> list[str]:
    """A small run in this directory, with or without pictures; later overrides win."""
    sampler = "sampler=ddpm" if pictures else "sampler=none"
    return ["train", *SMALL_RUN, sampler, f"run_dir={path}", "name=run", *overrides]


def checkpoints(path: Path) -> list[Path]:
    """Those that are published, oldest first."""
    return sorted((path / "checkpoints").glob("step-*"))


def fingerprint(path: Path) -> str:
    """SHA-256 over model, every EMA, optimiser tensors and step of the newest checkpoint."""
    newest = checkpoints(path)[-1]
    digest = hashlib.sha256()
    for file in sorted(newest.glob("*.safetensors")):
        digest.update(file.read_bytes())
    digest.update(str(train_state(path)["step"]).encode())
    return digest.hexdigest()


def train_state(path: Path) -> dict:
    """Where the newest checkpoint stands."""
    return json.loads((checkpoints(path)[-1] / "train_state.json").read_text())


def images(path: Path) -> int | None:
    """Seen up to the newest checkpoint; None without one."""
    return train_state(path)["images"] if checkpoints(path) else None


def status(path: Path) -> dict:
    return json.loads((path / "status.json").read_text())


def records(path: Path) -> list[dict]:
    """What metrics.jsonl says about the training, but for what tells the time."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found if "event" not in record]
