"""Run directories as training leaves them, made without training."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conftest import SMALL_RUN
from omegaconf import OmegaConf

from diffussm.compose import compose
from diffussm.runtime.run_dir import RunDirectory

RESULTS = {"FID-digits": 5.5, "sFID-digits": 50.0, "IS": 9.5, "precision": 0.8, "recall": 0.7}


def record(images: int, **facts: Any) -> dict[str, Any]:
    """What a run logs: a loss that falls, at 100 images a second."""
    return {
        "images": images,
        "step": images // 16,
        "loss": 1.0 + 1000.0 / images,
        "loss_q0": 2.0,
        "loss_q3": 0.1,
        "images_per_second": 100.0,
        "memory_gib": 1.5,
        "learning_rate": 0.001,
        **facts,
    }


def make_run(
    path: Path,
    records: Iterable[Mapping[str, Any]] = (),
    overrides: Iterable[str] = (),
    has_shape: bool = True,
    **status: Any,
) -> Path:
    """A run of digits with these records, whose checkpoint tells the shape of its images and nothing else."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(_config(tuple(overrides)))
    lines = list(records)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = lines[-1]["images"] if lines else 0
    RunDirectory(path).write_status(
        **{"state": "finished", "images": images, "total_images": 128, "exit_code": 0, **status}
    )
    if has_shape:
        checkpoint = path / "checkpoints" / "step-000000000008"
        checkpoint.mkdir(parents=True)
        (checkpoint / "train_state.json").write_text(json.dumps({"data": {"image_shape": [1, 8, 8]}}))
    return path


@functools.cache
def _config(overrides: tuple[str, ...]) -> str:
    return OmegaConf.to_yaml(compose("train", [*SMALL_RUN, *overrides]), resolve=True)


def add_result(path: Path, step: int, metrics: Mapping[str, Any], num_steps: int = 25, **parts: Any) -> None:
    """What `diffussm evaluate` has measured of a checkpoint."""
    request = {
        "checkpoint": {"path": f"runs/x/checkpoints/step-{step:012d}", "sha256": "0"},
        "sampling": {"weights": "ema"},
        "sampler": {"_target_": "diffussm.diffusion.samplers.ddim", "num_steps": num_steps},
        "guidance": {"_target_": "diffussm.diffusion.guidance.ClassifierFree", "scale": 1.25},
    }
    with (path / "results.jsonl").open("a") as file:
        answer = {"weights": "ema_0.9", "request": request, "metrics": {**metrics, "num_samples": 64}, **parts}
        file.write(json.dumps(answer) + "\n")
