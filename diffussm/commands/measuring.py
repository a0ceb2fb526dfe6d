"""What `evaluate` measures, a checkpoint or stored samples, and where it keeps the answers."""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffussm.build import System, build_evaluation, build_source, construct, load_weights
from diffussm.commands import note
from diffussm.commands.from_checkpoint import (
    build_system,
    digest,
    make_request,
    open_checkpoint,
    read_answer,
    read_history,
    run_path,
)
from diffussm.commands.gate import Gate, measured_names
from diffussm.commands.in_processes import Job
from diffussm.commands.stored_reference import use_stored_reference
from diffussm.compose import compose
from diffussm.config import SAMPLE_METRICS
from diffussm.data.images import ImageSource
from diffussm.data.loader import is_latent_set
from diffussm.data.samples import open_samples
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.likelihood import chosen_images, measure_images
from diffussm.evaluation.metrics import SPLIT_SIZE
from diffussm.evaluation.streams import GeneratedStream, ImageStream, StoredStream
from diffussm.runtime.errors import ConfigError, Preempted
from diffussm.runtime.run_dir import append_line, refuse_unwritable, write_json
from diffussm.runtime.work_list import WorkList
from diffussm.training.checkpoint import Checkpoint
from diffussm.training.logging import Progress

GROUPS = ("autoencoder", "sampler", "guidance", "sampling", "evaluation", "data")


@dataclass(frozen=True)
class Answer:
    """What was measured of one thing, as it is in results.json.

    Attributes:
        title: what was measured, in a few words.
        run: the run directory of a checkpoint, and the images that it had seen.
    """

    results: Mapping[str, Any]
    out: Path
    title: str
    gate: Gate
    run: Path | None = None
    images: int = 0


def measure_samples(options: argparse.Namespace, job: Job) -> Answer:
    """The metrics of images that are stored."""
    processes = job.processes

    def open_all() -> tuple[DictConfig, Any, Path]:
        config = compose("evaluate", options.overrides, options.config_dir, {name: {} for name in GROUPS})
        path = Path(config.samples).expanduser()
        _refuse_idle_keys(config, options.overrides)
        channels = construct(config.evaluation.extractor, "evaluation.extractor").image_shape[0]
        samples = open_samples(path, channels)
        if len(samples) < 2:
            raise ConfigError(f"samples={path}: one image is no distribution: give at least 2")
        config.evaluation.num_samples = len(samples)
        beside = path.parent / f"{path.name.removesuffix('.npz').removesuffix('.tar')}.results.json"
        return config, samples, _check_out(config.out or beside)

    config, samples, out = processes.on_all(open_all)
    sha256 = processes.on_first(lambda: samples.sha256)
    use_stored_reference(config, samples.image_shape, out, job)

    def build() -> tuple[Evaluation, dict[str, Any], Gate]:
        evaluation = build_evaluation(config, samples.image_shape)
        assert evaluation is not None
        _refuse_unavailable(evaluation, config.metrics or ())
        settings = OmegaConf.to_container(OmegaConf.masked_copy(config, ["metrics", "evaluation"]), resolve=True)
        facts = {"path": str(samples.path), "sha256": sha256, "num_images": len(samples)}
        request = {"samples": facts, **settings, **evaluation.record(), "pixels": "as stored"}  # type: ignore[dict-item]
        names = measured_names(evaluation, config.metrics or SAMPLE_METRICS)
        return evaluation, request, Gate(config.gate, request, names)

    evaluation, request, gate = processes.on_all(build)
    results = processes.on_first(lambda: _find(out, request))
    scored = {*evaluation.comparison.available} & {*(config.metrics or SAMPLE_METRICS)}
    if processes.is_first and "is" in scored and _is_sorted(samples.labels):
        note(
            f"{samples.path}: IS is of chunks of {SPLIT_SIZE:,} images, and these are in the order of their "
            "classes, which makes it small: mix them"
        )
    if results is None:
        stream = StoredStream(samples, config.sampling.batch_size)
        with _features(stream, config, request, out, job) as work:
            metrics = _measure(evaluation, stream, work, job, config.metrics or SAMPLE_METRICS)
            results = {"request": request, **metrics}
            processes.on_first(lambda: _store(results, out))
    return Answer(results, out, str(config.samples), gate)


def measure_checkpoint(options: argparse.Namespace, job: Job) -> Answer:
    """The metrics of samples of a checkpoint, and of the model itself on real images."""
    processes = job.processes

    def open_all() -> tuple[Checkpoint, DictConfig, DictConfig, Path]:
        checkpoint, trained, config = open_checkpoint(options)
        out = _check_out(config.out or run_path(checkpoint) / "results.json")
        if _of_samples(config) and not config.evaluation:
            raise ConfigError("evaluation=none: nothing to compare samples with: choose an evaluation")
        return checkpoint, trained, config, out

    checkpoint, trained, config, out = processes.on_all(open_all)
    wanted, of_samples = config.metrics or SAMPLE_METRICS, _of_samples(config)
    of_images = [name for name in wanted if name not in SAMPLE_METRICS]
    train_state = checkpoint.document("train_state")
    if of_samples:
        use_stored_reference(config, train_state["data"]["image_shape"], out, job)

    def build() -> tuple[System, Evaluation | None, Any, dict[str, Any], ImageSource | None, dict[str, Any]]:
        evaluation = generator = source = None
        if of_samples:
            evaluation = build_evaluation(config, train_state["data"]["image_shape"])
            assert evaluation is not None
            if of_samples == ["class_agreement"] and not evaluation.class_agreement:
                raise ConfigError("metrics=[class_agreement]: evaluation.class_agreement=false leaves it out")
            _refuse_unavailable(evaluation, config.metrics or ())
        system = build_system(checkpoint, trained, str(job.device))
        decisive = [
            *(["evaluation"] if of_samples else []),
            *(["sampler", "guidance"] if {*wanted} - {"vlb", "loss"} else []),
        ]
        request = make_request(checkpoint, config, ("metrics", *decisive))
        if config.labels != "balanced":  # there are requests older than this choice
            request["labels"] = config.labels
        if evaluation is not None:
            request |= evaluation.record()
            generator = system.generator(system.model, config)
        measures: dict[str, Any] = {}
        if of_images:
            measures = system.image_measures(system.model, config, of_images)
            source = _images(config, trained, system, of_images)
            num_images = min(config.likelihood_images or len(source), len(source))
            request["data"] = {**source.fingerprint, "measured": num_images}
        return system, evaluation, generator, request, source, measures

    system, evaluation, generator, request, source, measures = processes.on_all(build)
    gate = processes.on_all(lambda: Gate(config.gate, request, measured_names(evaluation, wanted)))
    results = processes.on_first(lambda: _find(out, request))
    if results is None:
        load = lambda: load_weights(checkpoint, system.model, config.sampling.weights)  # noqa: E731
        results = {"weights": processes.on_all(load), "request": request}
        with contextlib.ExitStack() as until_stored:
            if evaluation is not None:
                stream = GeneratedStream(generator, evaluation.num_samples, config.labels)
                work = until_stored.enter_context(_features(stream, config, request, out, job))
                results |= _measure(evaluation, stream, work, job, of_samples)
            if source is not None:
                images, count = source, request["data"]["measured"]
                results["image_metrics"] = processes.on_first(
                    lambda: _measure_model(images, measures, system, trained, config, count, job)
                )
            processes.on_first(lambda: _store(results, out))
    drawn = f", {_describe(config)}" if of_samples else ""
    return Answer(results, out, f"{results['weights']}{drawn}", gate, run_path(checkpoint), train_state["images"])


def _is_sorted(labels: Sequence[int] | None) -> bool:
    """Whether there are more of them than a chunk of the Inception Score has, one class after the other."""
    if labels is None or len(labels) <= SPLIT_SIZE:
        return False
    return 1 < len({*labels}) == sum(1 for _ in groupby(labels))


def _of_samples(config: DictConfig) -> list[str]:
    return [name for name in config.metrics or SAMPLE_METRICS if name in SAMPLE_METRICS]


@contextlib.contextmanager
def _features(
    stream: ImageStream, config: DictConfig, request: Mapping[str, Any], out: Path, job: Job
) -> Iterator[WorkList]:
    """Where the features of a stream wait beside the answer, until that is stored at the end of the block."""
    identity = digest(request)
    path = out.with_name(f"{out.stem}.features-{identity}")
    work = WorkList(path, len(stream), config.range_size, ".safetensors")
    work.open(identity, job.processes)
    try:
        yield work
        if not config.keep_features:
            work.remove()
    finally:
        work.close()


def _measure(
    evaluation: Evaluation, stream: ImageStream, work: WorkList, job: Job, wanted: Sequence[str]
) -> dict[str, Any]:
    """`metrics` and `real_against_real`, in the first process."""
    with job.undertake(work) as (undertaking, show):
        metrics = evaluation.run(stream, work, undertaking, job.device, show, wanted)
    real = evaluation.real_against_real(job.device, wanted) if job.processes.is_first else None
    return {"metrics": metrics, "real_against_real": real}


def _measure_model(
    source: ImageSource,
    measures: Mapping[str, Any],
    system: System,
    trained: DictConfig,
    config: DictConfig,
    num_images: int,
    job: Job,
) -> dict[str, Any]:
    """In the first process alone."""
    progress = Progress(num_images, 0, "img")

    def advance(done: int) -> None:
        progress.advance(done)
        if job.stop():
            raise Preempted("stopped by signal, before all images were measured: run it again")

    try:
        return measure_images(
            source,
            measures,
            system.autoencoder.to_latents,
            indices=chosen_images(len(source), num_images, config.sampling.seed),
            with_labels=trained.model.num_classes is not None,
            seed=config.sampling.seed,
            batch_size=config.sampling.batch_size,
            device=system.device,
            advance=advance,
        )
    finally:
        progress.close()


def _check_out(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix != ".json":
        raise ConfigError(f"out={path}: must end in .json")
    refuse_unwritable(path.parent, f"out={path}", "file")
    return path


def _refuse_idle_keys(config: DictConfig, overrides: Sequence[str]) -> None:
    """What says nothing about stored samples is not ignored."""
    if not config.evaluation:
        raise ConfigError("evaluation: not set: add evaluation=NAME, such as fid50k or digits")
    if others := [name for name in config.metrics or () if name not in SAMPLE_METRICS]:
        raise ConfigError(f"metrics=[{others[0]}]: is of a model: give checkpoint= instead of samples=")
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        group = key.partition(".")[0]
        if group in ("sampler", "guidance", "autoencoder", "data", "labels", "evaluation.num_samples") or key in (
            "evaluation.num_samples", "likelihood_images", "trust_checkpoint",
        ):  # fmt: skip
            raise ConfigError(f"{key}: decides nothing of stored samples, all of which are measured: leave it out")


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


def _find(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of this very request, from results.json or from all that was measured before."""
    for answer in [read_answer(out), *read_history(out.with_suffix(".jsonl"))]:
        if answer is not None and digest(answer["request"]) == digest(request):
            return answer
    return None


def _store(results: Mapping[str, Any], out: Path) -> None:
    """As the latest result, and as one more of all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    append_line(out.with_suffix(".jsonl"), json.dumps(results))
    write_json(out, results)


def _describe(config: DictConfig) -> str:
    sampler, guidance = config.sampler, config.guidance
    name = sampler.get("scheduler") or sampler._target_.rpartition(".")[2]
    way = guidance._target_.rpartition(".")[2]
    guided = "guidance" if way == "ClassifierFree" else f"{way.lower()} guidance"
    return f"{name} {sampler.get('num_steps')} steps, {guided} {guidance.scale:g}"
