"""`diffussm evaluate`: the metrics of a checkpoint, with everything that decides them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffussm.build import System, build_evaluation, build_source, load_weights
from diffussm.commands import print_config
from diffussm.commands.from_checkpoint import (
    build_system,
    digest,
    make_request,
    open_checkpoint,
    read_answer,
    read_history,
    run_path,
)
from diffussm.config import SAMPLE_METRICS
from diffussm.data.images import ImageSource
from diffussm.data.loader import is_latent_set
from diffussm.evaluation.evaluator import Evaluation, table
from diffussm.evaluation.likelihood import chosen_images, measure_images
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
    out = Path(config.out or run_path(checkpoint) / "results.json")
    if out.suffix != ".json":
        raise ConfigError(f"out={out}: must end in .json")
    wanted = config.metrics or SAMPLE_METRICS
    of_samples = [name for name in wanted if name in SAMPLE_METRICS]
    of_images = [name for name in wanted if name not in SAMPLE_METRICS]
    evaluation = None
    if of_samples:
        evaluation = build_evaluation(config, checkpoint.document("train_state")["data"]["image_shape"])
        if evaluation is None:
            raise ConfigError("evaluation=none: nothing to compare samples with: choose an evaluation")
        if of_samples == ["class_agreement"] and not evaluation.class_agreement:
            raise ConfigError("metrics=[class_agreement]: evaluation.class_agreement=false leaves it out")
        _refuse_unavailable(evaluation, config.metrics or ())
    system = build_system(checkpoint, trained, config.device)
    decisive = [
        *(["evaluation"] if of_samples else []),
        *(["sampler", "guidance"] if {*wanted} - {"vlb", "loss"} else []),
    ]
    request = make_request(checkpoint, config, ("metrics", *decisive))
    if evaluation is not None:
        request |= evaluation.record()
        generator = system.generator(system.model, config)
    measures, source = {}, None
    if of_images:
        measures = system.image_measures(system.model, config, of_images)
        source = _images(config, trained, system, of_images)
        num_images = min(config.likelihood_images or len(source), len(source))
        request["data"] = {**source.fingerprint, "measured": num_images}
    history = out.with_suffix(".jsonl")
    results = _find(out, history, request)
    if results is None:
        results = {"weights": load_weights(checkpoint, system.model, config.sampling.weights), "request": request}
        if evaluation is not None:
            progress = Progress(evaluation.num_samples, 0, "img")
            results["metrics"] = evaluation.run(generator, progress.advance, of_samples)
            results["real_against_real"] = evaluation.real_against_real(system.device, of_samples)
            progress.close()
        if source is not None:
            progress = Progress(num_images, 0, "img")
            results["image_metrics"] = measure_images(
                source,
                measures,
                system.autoencoder.to_latents,
                indices=chosen_images(len(source), num_images, config.sampling.seed),
                with_labels=trained.model.num_classes is not None,
                seed=config.sampling.seed,
                batch_size=config.sampling.batch_size,
                device=system.device,
                advance=progress.advance,
            )
            progress.close()
        out.parent.mkdir(parents=True, exist_ok=True)
        with history.open("a") as file:
            file.write(json.dumps(results) + "\n")
        write_json(out, results)
    print(table(_rows(results, config)))
    print(f"results      {out}")
    return 0


def _refuse_unavailable(evaluation: Evaluation, metrics: Sequence[str]) -> None:
    """What was asked for by name is not left out in silence."""
    has = evaluation.comparison.available
    for name in metrics:
        if name in SAMPLE_METRICS and name not in has and name != "class_agreement":
            raise ConfigError(
                f"metrics=[{name}]: {evaluation.reference.path.name} and evaluation.extractor do not allow it: "
                f"choose from {', '.join(has)}"
            )


def _images(config: DictConfig, trained: DictConfig, system: System, metrics: Sequence[str]) -> ImageSource:
    """The images that metrics of the model itself look at."""
    if missing := OmegaConf.missing_keys(config.data):
        raise ConfigError(f"{missing.pop()}: not set: the run does not tell where images are: add it")
    source = build_source(config.data, trained.model)
    if is_latent_set(source):
        raise ConfigError(
            f"metrics=[{', '.join(metrics)}]: look at images, and data=latents has none: choose data="
        )
    if tuple(source.image_shape) != system.image_shape:
        raise ConfigError(f"data: gives images of {source.image_shape}, the model knows {system.image_shape}")
    return source


def _rows(results: Mapping[str, Any], config: DictConfig) -> dict[str, Mapping[str, Any]]:
    drawn = f"{results['weights']}, {_describe(config)}" if "metrics" in results else ""
    rows = {
        drawn: results.get("metrics"),
        "real against real": results.get("real_against_real"),
        f"{results['weights']}, on images": results.get("image_metrics"),
    }
    return {name: row for name, row in rows.items() if row}


def _find(out: Path, history: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of this very request, from results.json or from all that was measured before."""
    for answer in [read_answer(out), *read_history(history)]:
        if answer is not None and digest(answer["request"]) == digest(request):
            return answer
    return None


def _describe(config: DictConfig) -> str:
    sampler, guidance = config.sampler, config.guidance
    name = sampler.get("scheduler") or sampler._target_.rpartition(".")[2]
    way = guidance._target_.rpartition(".")[2]
    guided = "guidance" if way == "ClassifierFree" else f"{way.lower()} guidance"
    return f"{name} {sampler.get('num_steps')} steps, {guided} {guidance.scale:g}"
