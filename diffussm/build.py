"""From configuration to objects: the only place that instantiates, and the last before expensive work.

Every group is checked against the signature of what it builds, so that a wrong key or type is one line
with the key in it, whether it came from the command line, a file or Python.
"""

import contextlib
import functools
import inspect
import logging
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffussm.compose import compose_group
from diffussm.config import leaves, nearest
from diffussm.data.autoencoder import Autoencoder, IdentityAutoencoder
from diffussm.data.images import ImageSource
from diffussm.data.loader import BatchLoader, LatentSource, is_latent_set
from diffussm.diffusion.classification import ClassifierObjective
from diffussm.diffusion.guidance import Guidance, Guided
from diffussm.diffusion.likelihood import variational_bound
from diffussm.diffusion.objective import Objective
from diffussm.diffusion.process import Prediction
from diffussm.diffusion.samplers import Noise, Sampler, ddim, ddim_inversion
from diffussm.diffusion.schedule import Schedule
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.features import FeatureExtractor
from diffussm.evaluation.generate import Generator
from diffussm.evaluation.likelihood import ImageMeasure
from diffussm.models import S4D, NoisyClassifier
from diffussm.models.complexity import Complexity, measure_complexity
from diffussm.models.layers import Denoiser
from diffussm.report.grid import save_grid
from diffussm.runtime.distributed import Interrupted, Processes, Undertaking
from diffussm.runtime.errors import ConfigError, DataError, RunDirectoryError, StorageError, UserError, note
from diffussm.runtime.run_dir import RunDirectory
from diffussm.runtime.seeding import derive_seed
from diffussm.training import posthoc
from diffussm.training.checkpoint import Checkpoint, CheckpointStore, find_checkpoint
from diffussm.training.logging import MetricsLog
from diffussm.training.precision import Precision
from diffussm.training.profiling import Profile
from diffussm.training.relay import Relay
from diffussm.training.throughput import Throughput, device_peak, training_flops
from diffussm.training.trainer import Batches, Periodic, Trainer

PACKAGE_PREFIX = "diffussm:"  # marks a path inside the installed package
MAX_GRID_ROWS = GRID_COLUMNS = 10
TRUSTED_MODULES = tuple(
    f"diffussm.{name}"
    for name in ("models", "diffusion", "data", "evaluation", "training.optim", "training.loggers")
)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A model by the name of its configuration, such as "diffussm_xl", with constructor arguments replaced."""
    return construct(compose_group("model", name, overrides), "model")


def build_source(data: DictConfig, model: DictConfig) -> ImageSource | LatentSource:
    """The data set, found to have labels that the model knows."""
    source: ImageSource | LatentSource = construct(data, "data")
    known, given = model.num_classes, source.num_classes
    if known is not None and (given is None or given > known):
        has = "no class labels" if given is None else f"{given} classes"
        fix = "null" if given is None else given
        raise ConfigError(f"model.num_classes={known}: the data has {has}: set it to {fix}")
    if known is not None and is_latent_set(source):
        labels = source.labels(torch.arange(len(source)))
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= known:
            raise DataError(
                f"data.path={data.path}: its labels run from {low} to {high}, those of model.num_classes={known} "
                f"from 0 to {known - 1}: encode the images again"
            )
    return source


class EncodedBatches:
    """Batches whose fingerprint names also the autoencoder that makes latents of them."""

    def __init__(self, batches: Batches, autoencoder: Mapping[str, Any]) -> None:
        self.batches, self.autoencoder = batches, autoencoder
        self.starting_at = batches.starting_at

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the data and the autoencoder."""
        return {**self.batches.fingerprint, "autoencoder": dict(self.autoencoder)}


class System:
    """The parts that training, sampling and evaluation share, built from a training configuration.

    They need the shape of the images (C, H, W), but not the data.

    Args:
        making: a context in which the model is made, such as one in which tensors have shapes only.
    """

    def __init__(
        self,
        config: DictConfig,
        image_shape: Sequence[int],
        device: torch.device,
        making: AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
    ) -> None:
        self.config, self.image_shape, self.device = config, tuple(image_shape), device
        autoencoder: Autoencoder = construct(config.autoencoder, "autoencoder")
        self.autoencoder = autoencoder.to(device)
        process = construct(config.diffusion, "diffusion").to(device)
        channels, height, width = image_shape
        try:
            self.latent_shape = self.autoencoder.latent_shape((channels, height, width))
            check_latents(config.model, self.latent_shape)
        except ConfigError:
            # Of latents that are ready the shape is given, and if nothing fits the autoencoder is to blame.
            check_encoder(config.data, self.autoencoder)
            raise
        with torch.random.fork_rng(devices=[]), making:
            torch.manual_seed(derive_seed(config.seed, "model"))
            model = construct(config.model, "model")
        # One of shapes alone cannot be moved, not even to where it is.
        self.model = model if device.type == "cpu" else model.to(device)
        self.process = process
        self.objective: Objective = construct(config.objective, "objective", schedule=process)
        check_objective(self.model, self.objective)

    def generator(
        self, model: nn.Module, config: DictConfig, check: Callable[[], object] = lambda: None
    ) -> Generator:
        """Generation with these weights and the sampler, guidance and sampling of `config`.

        Args:
            check: called before every evaluation of the network, and free to raise.
        """
        sampling = config.sampling
        self._refuse_classifier()
        if not config.sampler:
            raise ConfigError("sampler=none: draws nothing: choose a sampler, such as sampler=ddim")
        sampler = bound(config.sampler, "sampler")
        self._try_out(sampler)
        precision = Precision(sampling.precision, self.device, sampling.tf32)
        guided, num_classes = self._guided(model, config)

        def predict(x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
            check()
            return guided(x_t, t, y)

        @torch.no_grad()
        def sample(x_T: Tensor, y: Tensor | None, noise: Noise) -> Tensor:
            with precision.products(), precision.autocast():
                return sampler(predict, self.process, x_T, y, noise)

        return Generator(
            sample=sample,
            to_pixels=self.autoencoder.to_pixels,
            latent_shape=self.latent_shape,
            num_classes=num_classes,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            device=self.device,
        )

    def image_measures(
        self, model: nn.Module, config: DictConfig, names: Collection[str]
    ) -> dict[str, ImageMeasure]:
        """Measures of real images: vlb, of the model itself, and inversion, of its guided deterministic DDIM."""
        measures: dict[str, ImageMeasure] = {}
        self._refuse_classifier()
        if not isinstance(self.process, Schedule):
            raise ConfigError(f"metrics=[{', '.join(names)}]: rectified flow has no such measure: leave it out")
        sampling, schedule = config.sampling, self.process
        precision = Precision(sampling.precision, self.device, sampling.tf32)
        if "vlb" in names:
            if not isinstance(self.autoencoder, IdentityAutoencoder):
                raise ConfigError("metrics=[vlb]: bits per dimension are of pixels, and this model sees latents")
            predict = self.objective.predictor(model)
            fixed_variance = self.config.objective.fixed_variance

            def vlb(x_0: Tensor, y: Tensor | None, noise: Noise) -> Mapping[str, Tensor]:
                with precision.products(), precision.autocast():
                    return variational_bound(predict, schedule, x_0, y, noise, fixed_variance, clip_x_0=True)

            measures["vlb"] = vlb
        if "inversion" in names:
            if not config.sampler or not config.sampler._target_.endswith(".ddim") or config.sampler.eta != 0:
                raise ConfigError("metrics=[inversion]: inverts sampler=ddim with sampler.eta=0: choose these")
            if schedule.has_zero_terminal_snr:
                raise ConfigError("metrics=[inversion]: the last step of zero_terminal_snr=true has no inverse")
            guided = self._guided(model, config).predict
            steps = {"num_steps": config.sampler.num_steps, "spacing": config.sampler.spacing}

            def inversion(x_0: Tensor, y: Tensor | None, noise: Noise) -> Mapping[str, Tensor]:
                with precision.products(), precision.autocast():
                    x_T = ddim_inversion(guided, schedule, x_0, y, **steps)
                    back = ddim(guided, schedule, x_T, y, noise, **steps)
                return {"inversion_rmse": (back - x_0).square().flatten(1).mean(dim=1).sqrt()}

            measures["inversion"] = inversion
        return measures

    def _refuse_classifier(self) -> None:
        if isinstance(self.model, NoisyClassifier):
            raise ConfigError(
                "a classifier draws nothing: name the checkpoint of a denoiser, or train it with sampler=none"
            )

    def _guided(self, model: nn.Module, config: DictConfig) -> Guided:
        guidance: Guidance = construct(config.guidance, "guidance")
        channels, known = config.guidance.get("channels"), self.latent_shape[0]
        if channels is not None and channels > known:
            raise ConfigError(f"guidance.channels={channels}: the latents have {known}: set it to null for all")
        interval, last = config.guidance.get("interval"), self.objective.num_timesteps
        if interval is not None and not (interval[0] <= last and interval[1] >= 0 and interval[1] > 1):
            raise ConfigError(
                f"guidance.interval={interval}: holds no noise to speak of: timesteps run from 0 to {last}"
            )
        try:
            return guidance(model, self.objective.predictor, self._load_companion)
        except ValueError as error:
            raise ConfigError(_with_key("guidance", error)) from error

    def _try_out(self, sampler: Sampler) -> None:
        """Run the sampler on one number, so that options that cannot work fail here and now."""
        channels = 2 if self.config.model.get("learn_sigma") else 1
        one = torch.zeros(1, 1, 1, 1, device=self.device)
        try:
            predict = self.objective.predictor(lambda x, t, y: x.repeat(1, channels, 1, 1))
            sampler(predict, self.process, one, None, lambda: one)
        except ValueError as error:
            raise ConfigError(_with_key("sampler", error)) from error

    def _load_companion(self, path: str, weights: str) -> nn.Module:
        """The frozen network of another checkpoint, which has seen the same latents noised in the same way."""
        checkpoint = find_checkpoint(Path(path), note, "guidance.checkpoint")
        theirs = OmegaConf.create(checkpoint.document("config"))
        assert isinstance(theirs, DictConfig)
        refuse_foreign_code(theirs, str(checkpoint.path))
        ours = self.config
        for key in ("autoencoder._target_", "diffusion", "objective.prediction"):
            mine, other = OmegaConf.select(ours, key), OmegaConf.select(theirs, key)
            if other is not None and mine != other:
                raise ConfigError(
                    f"guidance.checkpoint={path}: was trained with another {key} ({_difference(mine, other)}): "
                    f"choose a checkpoint that shares it"
                )
        encoded = recorded_autoencoder(checkpoint)
        if encoded is not None and encoded != self.autoencoder.fingerprint:
            raise ConfigError(
                f"guidance.checkpoint={path}: was trained with {describe_fingerprint(encoded)}, not "
                f"{describe_fingerprint(self.autoencoder.fingerprint)}"
            )
        check_latents(theirs.model, self.latent_shape)
        network = construct(theirs.model, "model").to(self.device)
        load_weights(checkpoint, network, weights, "guidance.weights")
        return network


def recorded_autoencoder(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The fingerprint of what a checkpoint's latents came from; None if it does not tell, as of pixels."""
    return checkpoint.document("train_state")["data"].get("autoencoder")


def describe_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """An autoencoder in a few words."""
    rest = {key: str(value)[:12] for key, value in fingerprint.items() if key != "kind"}
    return " ".join([fingerprint["kind"], *(f"{key}={value}" for key, value in rest.items())])


def check_encoder(data: DictConfig, autoencoder: Autoencoder) -> None:
    """Refuse an autoencoder that has not made the latents that the data are, if these are latents and are here."""
    if not str(data.get("_target_")).endswith(".LatentSet"):
        return
    try:
        source = construct(data, "data")
    except UserError:
        return  # nobody needs them to use a trained model
    source.check_autoencoder(autoencoder.fingerprint)


def check_latents(model: DictConfig, latent_shape: tuple[int, int, int]) -> None:
    """Refuse, before it is built, a model that does not take latents of this shape (C, H, W)."""
    channels, height, width = latent_shape
    if model.in_channels != channels:
        raise ConfigError(f"model.in_channels={model.in_channels}: the data gives {channels} channel(s)")
    side = model.get("input_size")
    if side and (height, width) != (side, side):
        remedy = f"set it to {height}" if height == width else "this model takes square latents only"
        raise ConfigError(f"model.input_size={side}: the data gives {height}x{width} latents: {remedy}")
    patch, ratio = model.get("patch_size", 1), model.get("hourglass_ratio", 1)
    if patch < 1 or ratio < 1:
        return  # the model's constructor says so better
    if height % patch or width % patch:
        raise ConfigError(f"model.patch_size={patch}: does not divide the data's {height}x{width} latents")
    tokens = height * width // patch**2
    if tokens % ratio:
        raise ConfigError(f"model.hourglass_ratio={ratio}: does not divide the {tokens} tokens of the data")


def check_objective(model: nn.Module, objective: Objective) -> None:
    """Refuse to train a denoiser as a classifier, the reverse, or a variance that the objective leaves alone."""
    classifies = isinstance(objective, ClassifierObjective)
    misfit = f"objective: {type(objective).__name__} does not train {type(model).__name__}"
    if isinstance(model, NoisyClassifier) and not classifies:
        raise ConfigError(f"{misfit}: set objective=classifier, or choose another model")
    if isinstance(model, Denoiser) and classifies:
        raise ConfigError(f"{misfit}: choose another objective, or model=classifier_tiny or its like")
    try:
        objective.check_network(bool(getattr(model, "learn_sigma", False)))
    except ValueError as error:
        raise ConfigError(_with_key("objective", error)) from error


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
        source.check_autoencoder(autoencoder.fingerprint)
        if source.latent_shape != system.latent_shape:
            raise DataError(
                f"data.path={config.data.path}: holds latents of {source.latent_shape}, the autoencoder makes "
                f"{system.latent_shape} of images of {source.image_shape}: encode the images again"
            )
        source.check_spread()
    settings = dict(config.trainer)
    for launching in ("num_processes", "max_restarts", "timeout_seconds", "dry_run"):
        del settings[launching]
    sample_every_images = settings.pop("sample_every_images")
    precision = Precision(settings.pop("precision"), system.device, settings.pop("tf32"))
    store = CheckpointStore(run.checkpoints, settings.pop("keep_checkpoints"), warn)

    def give_up_waiting() -> None:
        """Of several processes, the others may wait for this one already, and need its batch to end well."""
        if stop() and processes.world_size == 1:
            raise Interrupted

    batches: Batches = BatchLoader(
        source,
        config.trainer.batch_size,
        config.seed,
        with_labels=config.model.num_classes is not None,
        num_workers=settings.pop("num_workers"),
        pin_memory=system.device.type == "cuda",
        samples=processes.share(config.trainer.batch_size),
        noise_shape=system.latent_shape if autoencoder.is_stochastic else None,
        # Each process finds every bad image sooner or later, and counts for itself.
        bad_files=run.path / ("bad_files.jsonl" if processes.is_first else f"bad_files_{processes.rank}.jsonl"),
        warn=warn,
        poll=give_up_waiting,
    )

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

    def report(facts: Mapping[str, Any]) -> None:
        try:
            run.write_status("running", processes=processes.world_size, **facts)
        except (OSError, StorageError) as error:  # who looks from outside sees less; training need not end for it
            warn(str(error))

    return Trainer(
        model=system.model,
        objective=system.objective,
        batches=batches,
        to_latents=to_latents,
        optimizer=construct(config.optimizer, "optimizer", named_parameters=system.model.named_parameters()),
        checkpoints=store,
        snapshots=CheckpointStore(run.path / posthoc.DIRECTORY, None, warn),
        log=log,
        precision=precision,
        config=OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
        seed=config.seed,
        periodic=_periodic(
            system, run, processes, log, sample_every_images, getattr(source, "preprocessing", None)
        ),
        processes=processes,
        throughput=Throughput(
            functools.partial(training_flops_of, config.model, system.latent_shape),
            device_peak(system.device, precision.name, precision.tf32),
            processes.world_size,
        ),
        profile=profile,
        report=report,
        stop=stop,
        **settings,
    )


def build_relays(config: DictConfig, run: RunDirectory, warn: Callable[[str], None]) -> list[Relay]:
    """The configured loggers, none of them started. ConfigError for one whose package is missing."""
    content: Mapping[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return [
        Relay(str(name), construct(node, f"logger.{name}"), run.path, config.name, content, warn)
        for name, node in config.logger.items()
    ]


@functools.cache
def _complexity_of(model: str, latent_shape: tuple[int, ...]) -> Complexity:
    # Of a model without memory, whatever becomes of the one that is trained: it may be compiled or sharded.
    with torch.device("meta"):
        network = construct(OmegaConf.create(model), "model")  # type: ignore[arg-type]
    return measure_complexity(network, latent_shape)


def complexity_of(model: DictConfig, latent_shape: tuple[int, ...]) -> Complexity:
    """What a configured model costs on latents (C, H, W); measured once."""
    return _complexity_of(OmegaConf.to_yaml(model, resolve=True), latent_shape)


def training_flops_of(model: DictConfig, latent_shape: tuple[int, ...]) -> int:
    """Floating-point operations of training a configured model on one image."""
    cost = complexity_of(model, latent_shape)
    return training_flops(cost.flops + cost.ssm_flops, bool(model.get("activation_checkpointing", False)))


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
            if not processes.is_first:
                return {}
            metrics = evaluation.run(system.generator(model, config, undertaking.check))
            forget_spectra(model)
            return metrics

        periodic.append(Periodic("evaluation", evaluation.every_images, evaluate))
    return periodic


def forget_spectra(model: nn.Module) -> None:
    """Free what frozen S4D layers keep for sampling, so that training has its memory back."""
    for module in model.modules():
        if isinstance(module, S4D):
            module.forget_spectra()


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


def build_evaluation(
    config: DictConfig, image_shape: Sequence[int], preprocessing: str | None = None
) -> Evaluation | None:
    """The configured evaluation of images (C, H, W) that were prepared like this; None for evaluation=none."""
    if not config.evaluation:
        return None
    node = config.evaluation.copy()
    if str(node.reference).startswith(PACKAGE_PREFIX):
        inside = str(node.reference).removeprefix(PACKAGE_PREFIX)
        node.reference = str(Path(__file__).resolve().parent / inside)
    evaluation: Evaluation = construct(node, "evaluation")
    _check_extractor(evaluation.extractor, image_shape, "another evaluation, or evaluation=none")
    evaluation.reference.refuse_images(image_shape, preprocessing)
    return evaluation


def build_extractor(evaluation: DictConfig, image_shape: Sequence[int]) -> FeatureExtractor:
    """The network alone of an evaluation of images (C, H, W), which need not have a reference yet."""
    if not evaluation:
        raise ConfigError("evaluation=none: has no network to measure images with: choose an evaluation")
    extractor: FeatureExtractor = construct(evaluation.extractor, "evaluation.extractor")
    _check_extractor(extractor, image_shape, "another evaluation or other data")
    return extractor


def _check_extractor(extractor: FeatureExtractor, image_shape: Sequence[int], choice: str) -> None:
    wanted = tuple(extractor.image_shape)
    if any(side not in (None, given) for side, given in zip(wanted, image_shape, strict=True)):
        shown = str(wanted).replace("None", "any")
        raise ConfigError(
            f"evaluation.extractor: measures images of shape {shown}, the data has {tuple(image_shape)}: "
            f"choose {choice}"
        )


def choose_weights(checkpoint: Checkpoint, weights: str, key: str) -> str:
    """The full name of `weights` (ema stands for the first average) of a checkpoint; ConfigError names `key`."""
    if weights.startswith(posthoc.PREFIX):
        posthoc.plan(checkpoint, weights, note, key)
        return weights
    name = checkpoint.ema_names[0] if weights == "ema" else weights
    known = [*checkpoint.ema_names, "model"]
    if name not in known:
        raise ConfigError(f"{key}={weights}: {checkpoint.path} has {', '.join(known)}")
    return name


def read_weights(checkpoint: Checkpoint, name: str, key: str) -> dict[str, Tensor]:
    """The tensors of the weights with a full name; ConfigError names `key`."""
    if name.startswith(posthoc.PREFIX):
        return posthoc.reconstruct(checkpoint, name, note, key)
    return checkpoint.tensors(name)


def load_weights(checkpoint: Checkpoint, model: nn.Module, weights: str, key: str = "sampling.weights") -> str:
    """Load `weights`, as `choose_weights` knows them, into a model; returns their full name."""
    name = choose_weights(checkpoint, weights, key)
    checkpoint.check_model(model.state_dict())
    model.load_state_dict(read_weights(checkpoint, name, key))
    model.requires_grad_(False).eval()
    return name


def check_device_name(name: str) -> None:
    """Refuse what is a device nowhere."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device={name}: choose auto, cpu, cuda or cuda:N")


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: not available here: choose auto or cpu") from error
    return device


def construct(node: DictConfig, key: str, **arguments: Any) -> Any:
    """What a group describes, given also `arguments`; ConfigError names the key that its constructor refuses."""
    try:
        return bound(node, key)(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(_with_key(key, error)) from error


def bound(node: DictConfig, key: str) -> Callable[..., Any]:
    """The function or class of a group with its options bound; the rest of its arguments come at the call."""
    node = check_signature(node, key)
    try:
        return hydra.utils.instantiate(node, _convert_="all", _partial_=True)
    except InstantiationException as error:  # from a nested object
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise ConfigError(_with_key(key, cause)) from error


def refuse_foreign_code(config: DictConfig, where: str) -> None:
    """A configuration names what to call, and a checkpoint's may come from a stranger: only our own parts."""
    for key, value in leaves(config):
        if not key.endswith("_target_"):
            continue
        # Where the object is defined counts: diffussm.data.images.hashlib is no part of ours.
        ours = str(value).startswith("diffussm.") and _find_object(str(value), key)
        if not ours or not str(getattr(ours, "__module__", "")).startswith(TRUSTED_MODULES):
            raise RunDirectoryError(
                f"{where}: its configuration calls {key}={value}, which is no part of diffussm to build with: "
                "trust_checkpoint=true allows it, if you know where it comes from"
            )


def check_signature(node: DictConfig, key: str) -> DictConfig:
    """Check a group's keys and scalar values against the parameters and type hints of its target.

    Returns the group with integers made floats where the target wants floats.
    """
    node = node.copy()
    target = _find_object(node._target_, f"{key}._target_")
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in [(str(name), value) for name, value in node.items()]:
        if name in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if name not in parameters and not takes_any:
            raise ConfigError(f"{key}.{name}: no such key{nearest(name, parameters)}")
        if not isinstance(value, DictConfig) and not _fits(value, hints.get(name, Any)):
            raise ConfigError(f"{key}.{name}={value}: must be {_describe(hints[name])}")
        if hints.get(name) is float:
            node[name] = float(value)
    return node


def _find_object(name: str, key: str) -> Any:
    """What a dotted name stands for; ConfigError names the key if there is no such thing."""
    logger = logging.getLogger("hydra.utils")
    before, logger.disabled = logger.disabled, True  # it has its own account of a failure, of several lines
    try:
        return hydra.utils.get_object(name)
    except Exception as error:  # whatever importing a user's module may raise
        raise ConfigError(f"{key}={name}: cannot be imported: {error}") from error
    finally:
        logger.disabled = before


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    if origin in (Sequence, tuple):
        items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
        hints = get_args(hint) if origin is tuple else get_args(hint) * len(items or ())
        return items is not None and len(items) == len(hints) and all(map(_fits, items, hints))
    return True  # nested objects are the constructor's to judge


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"a list, each {_describe(*get_args(hint))}"
    if get_origin(hint) is tuple:
        return f"a list of {', '.join(map(_describe, get_args(hint)))}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(hint, "null" if hint is type(None) else str(hint))


def _with_key(key: str, error: BaseException) -> str:
    """`name=value: remedy`, as constructors say it, under the group's key."""
    message = str(error).splitlines()[0]
    if message.startswith(f"{key}."):
        return message
    return f"{key}.{message}" if re.match(r"[\w.]+=", message) else f"{key}: {message}"


def _difference(ours: Any, theirs: Any) -> str:
    """`key: theirs, not ours` of every key in which two groups (or values) differ."""
    before, after = dict(leaves(ours)), dict(leaves(theirs))
    return "; ".join(
        f"{key or 'value'}: {after.get(key, 'absent')}, not {before.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )
