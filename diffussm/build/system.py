"""The parts that training, sampling and evaluation share."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffussm.build.checks import (
    check_encoder,
    check_latents,
    check_objective,
    describe_fingerprint,
    differences,
    recorded_autoencoder,
)
from diffussm.build.instantiation import bound, construct, refuse_foreign_code, with_key
from diffussm.build.weights import load_weights
from diffussm.compose import compose_group
from diffussm.data.autoencoder import Autoencoder, IdentityAutoencoder
from diffussm.data.images import ImageSource
from diffussm.data.loader import LatentSource, is_latent_set
from diffussm.diffusion.guidance import Guidance, Guided
from diffussm.diffusion.likelihood import mean_loss, variational_bound
from diffussm.diffusion.objective import Objective
from diffussm.diffusion.process import Prediction
from diffussm.diffusion.samplers import Noise, Sampler, ddim, ddim_inversion
from diffussm.diffusion.schedule import Schedule
from diffussm.evaluation.generate import Generator
from diffussm.evaluation.likelihood import ImageMeasure
from diffussm.models import S4D, NoisyClassifier
from diffussm.runtime.errors import ConfigError, DataError, note
from diffussm.runtime.seeding import derive_seed
from diffussm.training.checkpoint import find_checkpoint
from diffussm.training.precision import Precision


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


class System:
    """The parts that training, sampling and evaluation share, built from a training configuration.

    They need the shape of the images (C, H, W), but not the data.

    Args:
        making: a context in which the model is made, such as one in which tensors have shapes only.
        in_memory: leave the model where it is made, for it may not fit the device as a whole.
    """

    def __init__(
        self,
        config: DictConfig,
        image_shape: Sequence[int],
        device: torch.device,
        making: AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
        in_memory: bool = False,
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
        self.model = model if in_memory or device.type == "cpu" else model.to(device)
        self.process = process
        self.objective: Objective = construct(config.objective, "objective", schedule=process)
        check_objective(self.model, self.objective)

    def generator(
        self,
        model: nn.Module,
        config: DictConfig,
        check: Callable[[], object] = lambda: None,
        watch: Callable[[Tensor, Tensor, Prediction], object] = lambda x_t, t, prediction: None,
    ) -> Generator:
        """Generation with these weights and the sampler, guidance and sampling of `config`.

        Args:
            check: called before every evaluation of the network, and free to raise.
            watch: told after it of x_t, t and what was predicted, guidance included.
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
            prediction = guided(x_t, t, y)
            watch(x_t, t, prediction)
            return prediction

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
        """Measures of real images: loss and vlb, of the model itself; inversion, of its guided DDIM."""
        measures: dict[str, ImageMeasure] = {}
        self._refuse_classifier()
        sampling, schedule = config.sampling, self.process
        precision = Precision(sampling.precision, self.device, sampling.tf32)
        if "loss" in names:

            def loss(x_0: Tensor, y: Tensor | None, noise: Noise) -> Mapping[str, Tensor]:
                with precision.products(), precision.autocast():
                    return mean_loss(self.objective, model.eval(), x_0, y, noise)

            measures["loss"] = loss
        if others := [name for name in names if name != "loss" and not isinstance(schedule, Schedule)]:
            raise ConfigError(f"metrics=[{', '.join(others)}]: rectified flow has no such measure: leave it out")
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
            raise ConfigError(with_key("guidance", error)) from error

    def _try_out(self, sampler: Sampler) -> None:
        """Run the sampler on one number, so that options that cannot work fail here and now."""
        channels = 2 if self.config.model.get("learn_sigma") else 1
        one = torch.zeros(1, 1, 1, 1, device=self.device)
        try:
            predict = self.objective.predictor(lambda x, t, y: x.repeat(1, channels, 1, 1))
            sampler(predict, self.process, one, None, lambda: one)
        except ValueError as error:
            raise ConfigError(with_key("sampler", error)) from error

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
                    f"guidance.checkpoint={path}: was trained with another {key} ({differences(mine, other)}): "
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


def forget_spectra(model: nn.Module) -> None:
    """Free what frozen S4D layers keep for sampling, so that training has its memory back."""
    for module in model.modules():
        if isinstance(module, S4D):
            module.forget_spectra()
