"""`diffussm evaluate`: the metrics of a checkpoint, with everything that decides them."""

import argparse
import json
from pathlib import Path

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
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.run_dir import write_json
from diffussm.training.logging import Progress


def run(options: argparse.Namespace) -> int:
    """Measure, unless results.json holds this very measurement already; print the table either way.

    results.jsonl beside it keeps every measurement that was made.
    """
    checkpoint, trained, config = open_checkpoint(options)
    if options.print_config:
        return print_config(config)
    evaluation = build_evaluation(config)
    if evaluation is None:
        raise ConfigError("evaluation=none: nothing to measure: choose an evaluation")
    request = {**make_request(checkpoint, config, ("evaluation",)), **evaluation.record()}
    out = Path(config.out or run_path(checkpoint) / "results.json")
    results = read_answer(out)
    if results is None or digest(results["request"]) != digest(request):
        system = build_system(checkpoint, trained, config.device)
        weights = load_weights(checkpoint, system.model, config.sampling.weights)
        generator = system.generator(system.model, config.sampler, config.sampling)
        progress = Progress(evaluation.num_samples, 0, "img")
        metrics = evaluation.run(generator, progress.advance)
        progress.close()
        real = evaluation.real_against_real(system.device)
        results = {"metrics": metrics, "real_against_real": real, "weights": weights, "request": request}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".jsonl").open("a") as history:
            history.write(json.dumps(results) + "\n")
        write_json(out, results)
    rows = {f"{results['weights']}, {_describe(config)}": results["metrics"]}
    if results["real_against_real"]:
        rows["real against real"] = results["real_against_real"]
    print(table(rows))
    print(f"results      {out}")
    return 0


def _describe(config: DictConfig) -> str:
    sampler = config.sampler._target_.rpartition(".")[2]
    return f"{sampler} {config.sampler.get('num_steps')} steps, guidance {config.sampling.guidance_scale:g}"
