"""Everything that `diffussm train` runs in a process."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffussm.build.costs import training_flops_of
from diffussm.build.evaluating import build_evaluation
from diffussm.build.instantiation import construct
from diffussm.build.system import System, forget_spectra
from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.data.images import ImageSource
from diffussm.data.loader import BatchLoader, LatentSource, is_latent_set
from diffussm.evaluation.generate import Generator
from diffussm.evaluation.streams import GeneratedStream
from diffussm.report.grid import save_grid
from diffussm.runtime.distributed import Interrupted, Processes, Undertaking
from diffussm.runtime.errors import ConfigError, DataError, StorageError
from diffussm.runtime.hashing import hash_tensors, hash_text
from diffussm.runtime.run_dir import RunDirectory
from diffussm.runtime.work_list import RANGE_SIZE, WorkList
from diffussm.training import posthoc
from diffussm.training.best import BestCheckpoint
from diffussm.training.checkpoint import CheckpointStore
from diffussm.training.logging import MetricsLog
from diffussm.training.parallel import Replicas
from diffussm.training.precision import Precision
from diffussm.training.profiling import Profile
from diffussm.training.protocols import Batches, Periodic
from diffussm.training.relay import Relay
from diffussm.training.throughput import Throughput, device_peak
from diffussm.training.trainer import Trainer

MAX_GRID_ROWS = GRID_COLUMNS = 10


class EncodedBatches:
    """Batches whose fingerprint names also the autoencoder that makes latents of them."""

    def __init__(self, batches: Batches, autoencoder: Mapping[str, Any]) -> None:
        self.batches, self.autoencoder = batches, autoencoder
        self.starting_at = batches.starting_at

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the data and the autoencoder."""
        return {**self.batches.fingerprint, "autoencoder": dict(self.autoencoder)}


def build_trainer(
    system: System,
    source: ImageSource | LatentSource,
    run: RunDirectory,
    processes: Processes,
    stop: Callable[[], object],
    warn: Callable[[str], None],
) -> Trainer:
    """Everything that `diffussm train` runs in this process, nothing of it started."""
    config, autoencoder = system.config, system.autoencoder
    if is_latent_set(source):
        _check_latent_set(source, system)
    settings = dict(config.trainer)
    for launching in ("num_processes", "max_restarts", "timeout_seconds", "dry_run"):
        del settings[launching]
    sample_every_images = settings.pop("sample_every_images")
    parallel = Replicas(processes)
    del settings["parallel"]
    if is_in_parts(config, processes):  # before the optimiser takes its parameters
        from diffussm.training.sharding import Shards  # slow, and not needed otherwise

        parallel = Shards(processes, system.model, system.device)
    precision = Precision(settings.pop("precision"), system.device, settings.pop("tf32"))
    store = CheckpointStore(run.checkpoints, settings.pop("keep_checkpoints"), warn)
    best = BestCheckpoint(run.checkpoints, warn) if settings.pop("keep_best") else None

    batches: Batches = _load(system, source, run, processes, settings.pop("num_workers"), stop, warn)

    def to_latents(images: Tensor, noise: Tensor | None) -> Tensor:
        """x_0, which a latent set gives as it is."""
        return images if images.is_floating_point() else autoencoder.to_latents(images, noise)

    if not isinstance(system.autoencoder, IdentityAutoencoder):
        batches = EncodedBatches(batches, system.autoencoder.fingerprint)  # missing weights end it here
    for averages in ("ema_decays", "ema_power"):
        settings[averages] = list(settings[averages])
    log = MetricsLog(run.path / "metrics.jsonl", build_relays(config, run, warn))
    profile = None
    if settings.pop("profile") and processes.is_first:
        profile = Profile(run.path / "profile", system.device, _describe_work(config, processes, system.device))

    return Trainer(
        model=system.model,
        objective=system.objective,
        batches=batches,
        to_latents=to_latents,
        optimizer=construct(config.optimizer, "optimizer", named_parameters=system.model.named_parameters()),
        checkpoints=store,
        snapshots=CheckpointStore(run.path / posthoc.DIRECTORY, None, warn),
        best=best,
        log=log,
        precision=precision,
        config=OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
        seed=config.seed,
        periodic=_periodic(
            system, run, processes, log, sample_every_images, getattr(source, "preprocessing", None)
        ),
        processes=processes,
        parallel=parallel,
        throughput=Throughput(
            functools.partial(training_flops_of, config.model, system.latent_shape),
            device_peak(system.device, precision.name, precision.tf32),
            processes.world_size,
        ),
        profile=profile,
        report=_reporter(run, processes, warn),
        stop=stop,
        **settings,
    )


def is_in_parts(config: DictConfig, processes: Processes) -> bool:
    """Whether no process is to have the whole model; a single one always has."""
    return config.trainer.parallel == "fsdp" and processes.world_size > 1


def _check_latent_set(source: LatentSource, system: System) -> None:
    """Refuse latents that are not what the autoencoder would make of the images."""
    source.check_autoencoder(system.autoencoder.fingerprint)
    if source.latent_shape != system.latent_shape:
        raise DataError(
            f"data.path={system.config.data.path}: holds latents of {source.latent_shape}, the autoencoder makes "
            f"{system.latent_shape} of images of {source.image_shape}: encode the images again"
        )
    source.check_spread()


def _load(
    system: System,
    source: ImageSource | LatentSource,
    run: RunDirectory,
    processes: Processes,
    num_workers: int,
    stop: Callable[[], object],
    warn: Callable[[str], None],
) -> BatchLoader:
    """This process's share of every batch."""

    def give_up_waiting() -> None:
        """Of several processes, the others may wait for this one already, and need its batch to end well."""
        if stop() and processes.world_size == 1:
            raise Interrupted

    config = system.config
    return BatchLoader(
        source,
        config.trainer.batch_size,
        config.seed,
        with_labels=config.model.num_classes is not None,
        num_workers=num_workers,
        pin_memory=system.device.type == "cuda",
        samples=processes.share(config.trainer.batch_size),
        noise_shape=system.latent_shape if system.autoencoder.is_stochastic else None,
        # Each process finds every bad image sooner or later, and counts for itself.
        bad_files=run.path / ("bad_files.jsonl" if processes.is_first else f"bad_files_{processes.rank}.jsonl"),
        warn=warn,
        poll=give_up_waiting,
    )


def _reporter(
    run: RunDirectory, processes: Processes, warn: Callable[[str], None]
) -> Callable[[Mapping[str, Any]], None]:
    """What writes status.json while a run goes on; that it cannot is said once."""
    is_told = False

    def report(facts: Mapping[str, Any]) -> None:
        nonlocal is_told
        try:
            run.write_status("running", processes=processes.world_size, **facts)
            is_told = False
        except (OSError, StorageError) as error:  # who looks from outside sees less; training need not end for it
            if not is_told:
                warn(str(error))
            is_told = True

    return report


def build_relays(config: DictConfig, run: RunDirectory, warn: Callable[[str], None]) -> list[Relay]:
    """The configured loggers, none of them started. ConfigError for one whose package is missing."""
    content: Mapping[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return [
        Relay(str(name), construct(node, f"logger.{name}"), run.path, config.name, content, warn)
        for name, node in config.logger.items()
    ]


def _describe_work(config: DictConfig, processes: Processes, device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    model, settings = config.model._target_.rpartition(".")[2], config.trainer
    return {
        "run": config.name,
        "model": f"{model}, {settings.precision}",
        "batch": f"{settings.batch_size} images; processes: {processes.world_size}",
        "device": f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def _periodic(
    system: System,
    run: RunDirectory,
    processes: Processes,
    log: MetricsLog,
    sample_every_images: int | None,
    preprocessing: str | None,
) -> list[Periodic]:
    config = system.config
    evaluation = build_evaluation(config, system.image_shape, preprocessing)
    if not config.sampler:
        if evaluation is not None and evaluation.every_images:
            every = evaluation.every_images
            raise ConfigError(
                f"evaluation.every_images={every}: needs samples: choose a sampler, or set it to null"
            )
        return []
    system.generator(system.model, config)  # fails now rather than hours later

    def draw_grid(model: nn.Module, images: int, undertaking: Undertaking) -> Mapping[str, Any]:
        generator = system.generator(model, config, undertaking.check)
        picture = run.samples / f"images-{images:012d}.png"
        draw_samples(generator, system.image_shape, picture, processes, undertaking)
        if processes.is_first:
            log.show(images, "samples", picture)
        forget_spectra(model)
        return {}

    periodic = [Periodic("samples", sample_every_images, draw_grid)]
    if evaluation is not None and evaluation.every_images:

        def evaluate(model: nn.Module, images: int, undertaking: Undertaking) -> Mapping[str, Any]:
            stream = GeneratedStream(system.generator(model, config, undertaking.check), evaluation.num_samples)
            work = WorkList(run.path / "evaluation", len(stream), RANGE_SIZE, ".safetensors", "run_dir")
            # What was generated with other weights, before the run was continued otherwise, is of no use.
            identity = hash_tensors(model.state_dict()) if processes.is_first else ""
            work.open(f"images {images}, weights {identity}, {_describe_sampling(config)}", processes)
            try:
                metrics = evaluation.run(stream, work, undertaking, system.device)
                work.remove()
                processes.undertake().finish()  # the first compares meanwhile, which may take long
            finally:
                work.close()
            forget_spectra(model)
            return metrics

        periodic.append(Periodic("evaluation", evaluation.every_images, evaluate, is_judged=True))
    return periodic


def _describe_sampling(config: DictConfig) -> str:
    """All that, besides weights, decides samples and their features."""
    groups = OmegaConf.masked_copy(config, ["sampler", "guidance", "sampling", "evaluation"])
    return hash_text(OmegaConf.to_yaml(groups, resolve=True))


def draw_samples(
    generator: Generator,
    image_shape: tuple[int, ...],
    path: Path,
    processes: Processes,
    undertaking: Undertaking,
) -> None:
    """Save a grid of samples, a row per class (at most ten), or 8 x 8 from an unconditional model."""
    columns, names, labels = 8, None, None
    indices = range(64)
    if generator.num_classes is not None:
        classes = range(min(generator.num_classes, MAX_GRID_ROWS))
        columns, names = GRID_COLUMNS, [str(label) for label in classes]
        labels = torch.tensor(classes).repeat_interleave(GRID_COLUMNS)
        indices = range(len(labels))
    share = processes.share(len(indices))
    mine = slice(share.start, share.stop)
    parts = [batch.images for batch in generator.generate(indices[mine], None if labels is None else labels[mine])]
    undertaking.finish()
    images = torch.zeros(len(indices), *image_shape, dtype=torch.uint8)
    images[mine] = torch.cat([images[:0], *parts])
    processes.sum(images)
    if processes.is_first:
        save_grid(images, columns, path, names)
