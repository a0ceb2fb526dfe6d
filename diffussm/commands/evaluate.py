"""`diffussm evaluate`: the metrics of a checkpoint, with everything that decides them."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffussm.build import build_evaluation, load_weights
from diffussm.commands import print_config
from diffussm.commands.from_checkpoint import (
    build_system,
    digest,
    make_request,
    open_checkpoint,
    read_answer,
    run_path,
)
from diffussm.evaluation.evaluator import table
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.run_dir import write_json
from diffussm.training.logging import Progress


def run(options: argparse.Namespace) -> int:
    """Measure, unless it was measured already; print the table either way.

    results.json is the latest measurement, results.jsonl beside it keeps every one.
    """
    keep_freed_memory()
    checkpoint, trained, config = open_checkpoint(options)
    if options.print_config:
        return print_config(config)
    evaluation = build_evaluation(config, checkpoint.document("train_state")["data"]["image_shape"])
    if evaluation is None:
        raise ConfigError("evaluation=none: nothing to measure: choose an evaluation")
    request = {**make_request(checkpoint, config, ("evaluation",)), **evaluation.record()}
    out = Path(config.out or run_path(checkpoint) / "results.json")
    history = out.with_suffix(".jsonl")
    results = _find(out, history, request)
    if results is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        system = build_system(checkpoint, trained, config.device)
        weights = load_weights(checkpoint, system.model, config.sampling.weights)
        generator = system.generator(system.model, config.sampler, config.sampling)
        progress = Progress(evaluation.num_samples, 0, "img")
        metrics = evaluation.run(generator, progress.advance)
        progress.close()
        real = evaluation.real_against_real(system.device)
        results = {"metrics": metrics, "real_against_real": real, "weights": weights, "request": request}
        with history.open("a") as file:
            file.write(json.dumps(results) + "\n")
        write_json(out, results)
    rows = {f"{results['weights']}, {_describe(config)}": results["metrics"]}
    if results["real_against_real"]:
        rows["real against real"] = results["real_against_real"]
    print(table(rows))
    print(f"results      {out}")
    return 0


def _find(out: Path, history: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of this very request, from results.json or from all that was measured before."""
    latest = read_answer(out)
    earlier = history.read_text().splitlines() if history.exists() else []
    for answer in [latest, *map(json.loads, earlier)]:
        if answer is not None and digest(answer["request"]) == digest(request):
            return answer
    return None


def _describe(config: DictConfig) -> str:
    sampler = config.sampler._target_.rpartition(".")[2]
    return f"{sampler} {config.sampler.get('num_steps')} steps, guidance {config.sampling.guidance_scale:g}"
