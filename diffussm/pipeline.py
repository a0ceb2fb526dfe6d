"""diffusers' view of a trained network: components that it saves and loads, and the pipeline that samples.

    pipe = DiffuSSMPipeline.from_pretrained(folder)            # a folder that `diffussm export` wrote
    images = pipe(class_labels=[3, 8], guidance_scale=1.5).images

The components are our networks themselves: config.json holds their constructor's arguments, the weights bear
their own names. A folder can name nothing else than these classes and diffusers' own.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, get_args

import numpy as np
import torch
from diffusers import (
    ConfigMixin,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from diffussm.data.autoencoder import DCAutoencoder, FrozenAutoencoder, IdentityAutoencoder, KLAutoencoder
from diffussm.diffusion.flow import TIME_SCALE
from diffussm.diffusion.guidance import classifier_free_guidance
from diffussm.diffusion.process import split_prediction
from diffussm.diffusion.schedule import Schedule
from diffussm.models import DiffuSSM, DiT

AUTOENCODERS: dict[str, type[FrozenAutoencoder]] = {
    kind.class_name: kind for kind in (KLAutoencoder, DCAutoencoder)
}
PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}

OutputType = Literal["pil", "np", "pt", "latent"]
# diffusers 0.35 reads typing.Optional, and neither X | None nor a bare None.
ImageSize = Optional[list[int]]  # noqa: UP045
Vae = Optional[ModelMixin]  # noqa: UP045


class Component(ModelMixin, ConfigMixin):
    """A network that diffusers can load; subclasses add the network and register its arguments."""

    @classmethod
    def from_config(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The network with these arguments; ValueError if they were written for another class."""
        named = config.get("_class_name", cls.__name__)
        if named != cls.__name__:
            raise ValueError(f"_class_name={named}: these are no arguments of {cls.__name__}: load that class")
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, without its advice to install accelerate."""
        return super().from_pretrained(*args, **_built_whole(kwargs))


class DiffuSSMModel(Component, DiffuSSM):
    """DiffuSSM as a component."""

    __init__ = register_to_config(DiffuSSM.__init__)


class DiTModel(Component, DiT):
    """DiT as a component."""

    __init__ = register_to_config(DiT.__init__)


COMPONENTS: dict[type[nn.Module], type[Component]] = {DiffuSSM: DiffuSSMModel, DiT: DiTModel}


class DiffuSSMPipeline(DiffusionPipeline):
    """Images of a diffusion network, of pixels or of latents, by the scheduler of one's choice.

    Args:
        transformer: the network, called as (x_t, t, y).
        scheduler: DDPMScheduler is given the learned variance if it asks for it (`learned_range`), every other
            one the prediction alone.
        vae: AutoencoderKL or AutoencoderDC, whose config tells scale and shift of the latents; None if the network
            works on pixels.
        image_size: [height, width] of its images.
        flow: whether the network was trained by rectified flow, so that it needs a scheduler of that.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: Vae = None,
        image_size: ImageSize = None,
        flow: bool = False,
    ) -> None:
        super().__init__()
        if vae is not None and type(vae).__name__ not in AUTOENCODERS:
            raise ValueError(f"vae: {type(vae).__name__} is none of {', '.join(AUTOENCODERS)}")
        if image_size is None or len(image_size) != 2:
            raise ValueError(f"image_size={image_size}: must be [height, width]")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(image_size=list(image_size), flow=flow)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but never from pickles; the networks come frozen, ready to sample."""
        pipeline = super().from_pretrained(*args, **_built_whole({"use_safetensors": True, **kwargs}))
        pipeline.transformer.requires_grad_(False)  # S4D layers then keep their spectra from step to step
        if pipeline.vae is not None:
            pipeline.vae.requires_grad_(False)
        return pipeline

    @classmethod
    def load_config(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """model_index.json, refused before anything is imported if it names classes that are not known here."""
        loaded = super().load_config(folder, *args, **kwargs)
        _refuse_foreign_classes(loaded[0] if isinstance(loaded, tuple) else loaded, cls.__name__)
        if index := sorted(Path(folder).glob("*/*.index.json")):
            # It may name files of another format, pickles among them, which diffusers then loads.
            raise ValueError(f"{index[0]}: weights are in one file each: remove it")
        if code := sorted(Path(folder).glob("*/*.py")):
            # A file that bears the name of a component's module is run in its place, by diffusers 0.35 unasked.
            raise ValueError(f"{code[0]}: weights need no code: find out where it comes from and remove it")
        return loaded

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B C H W"] | None = None,
        num_images: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image of each class.

        Args:
            class_labels: a class per image, 0 .. num_classes-1; None for an unconditional network.
            guidance_scale: s in eps_u + s (eps_c - eps_u), on all channels; 1 is no guidance, and half the work.
            num_inference_steps: steps of the scheduler, each one call of the network.
            generator: of the initial noise and of the scheduler's; a list of one per image makes each image
                independent of the others.
            latents: initial noise of standard normal numbers, instead of the generator's.
            num_images: of an unconditional network; by default 1.
            output_type: pil (quantised as `diffussm sample` does), np (B, H, W, C) or pt (B, C, H, W) in 0..1,
                or latent: x_0 as it is, scaled.
            return_dict: whether to return an object with `images`, or the tuple (images,).
        """
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type}: choose {', '.join(get_args(OutputType))}")
        device, scheduler = self._execution_device, _for_prediction_alone(self.scheduler)
        y, count = self._labels(class_labels, num_images)
        factor = 1 if self.vae is None else AUTOENCODERS[type(self.vae).__name__].read_factor(self.vae.config)
        shape = (count, self.transformer.in_channels, *(side // factor for side in self.config.image_size))
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: {len(generator)} generators for {count} images: give one each")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: {tuple(latents.shape)} must be {shape}")
        denoise = self._denoiser(guidance_scale)

        self._check_scheduler(num_inference_steps)
        _set_timesteps(scheduler, num_inference_steps, device)
        # The state of the process is fp32 whatever the network's precision: it sums many small steps.
        x = (
            randn_tensor(shape, generator, device, torch.float32)
            if latents is None
            else latents.to(device).float()
        )
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        y = None if y is None else y.to(device)
        # Not every scheduler draws noise, and those of rectified flow do not scale the network's input.
        noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        for t in self.progress_bar(scheduler.timesteps):
            output = denoise(scale_input(x, t), t.to(device).expand(count), y)
            if not _takes_variance(scheduler):
                output, _ = split_prediction(output, x.shape[1])
            x = scheduler.step(output, t, x, **noise).prev_sample
        if not x.isfinite().all():
            raise ValueError("the samples are not finite: load the network in fp32, or change the scheduler")
        images = x if output_type == "latent" else _in_format(self._decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_scheduler(self, num_steps: int) -> None:
        """Refuse a scheduler of the other process, and a single step that would not begin with noise."""
        name = type(self.scheduler).__name__
        flows = name.startswith("FlowMatch") or bool(self.scheduler.config.get("use_flow_sigmas"))
        if flows != self.config.flow:
            kind, other = ("rectified flow", "diffusion") if self.config.flow else ("diffusion", "rectified flow")
            raise ValueError(f"scheduler: the network was trained by {kind}, and {name} is of {other}")
        if num_steps == 1 and self.scheduler.config.get("timestep_spacing") == "linspace":
            raise ValueError("num_inference_steps=1: would begin at timestep 0, without noise: take at least 2")

    def _labels(
        self, class_labels: int | Sequence[int] | Tensor | None, num_images: int | None
    ) -> tuple[Int[Tensor, "B"] | None, int]:
        """(labels, number of images)."""
        num_classes = self.transformer.num_classes
        if num_classes is None:
            if class_labels is not None:
                raise ValueError(f"class_labels={class_labels}: the network is unconditional: give num_images")
            count = 1 if num_images is None else num_images
            if count < 1:
                raise ValueError(f"num_images={count}: must be at least 1")
            return None, count
        if class_labels is None:
            raise ValueError(f"class_labels=None: give a class per image, each in 0..{num_classes - 1}")
        if num_images is not None:
            raise ValueError(f"num_images={num_images}: follows from class_labels: leave it out")
        if isinstance(class_labels, str):
            raise ValueError(f"class_labels={class_labels!r}: give numbers, each in 0..{num_classes - 1}")
        labels = torch.as_tensor(class_labels).reshape(-1)
        if len(labels) == 0 or labels.is_floating_point() or not ((labels >= 0) & (labels < num_classes)).all():
            raise ValueError(f"class_labels={class_labels}: each must lie in 0..{num_classes - 1}")
        return labels, len(labels)

    def _decode(self, x_0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B c H W"]:
        """Images in about -1..1."""
        if self.vae is None:
            return x_0
        config = self.vae.config
        if self.vae.dtype == torch.float16 and config.get("force_upcast"):
            self.vae.to(torch.float32)  # for it overflows
        latents = x_0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def _denoiser(self, guidance_scale: float) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The network, in its own precision, with guidance."""

        def denoise(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return self.transformer(x_t.to(self.transformer.dtype), t, y).to(x_t.dtype)

        if guidance_scale < 0:
            raise ValueError(f"guidance_scale={guidance_scale}: must be at least 0")
        if guidance_scale == 1.0:
            return denoise
        null_label = self.transformer.null_label
        if null_label is None:
            raise ValueError(f"guidance_scale={guidance_scale}: the network knows no null label: set it to 1")
        return classifier_free_guidance(denoise, guidance_scale, null_label)


def ddpm_scheduler(
    schedule: Schedule,
    *,
    prediction: str = "eps",
    variance_type: str = "learned_range",
    clip_x_0: bool = False,
) -> DDPMScheduler:
    """diffusers' scheduler of this process; with N steps it visits the timesteps that we do (linspace).

    Where a timestep would lie halfway between two, it may visit the other one. Its configuration lists every beta,
    so that any schedule can be written down.

    Args:
        prediction: what the network predicts, of PREDICTION_TYPES.
        variance_type: learned_range for a network that learns sigma, else fixed_large (beta_t) or fixed_small
            (beta-tilde_t).
        clip_x_0: clamp the predicted x_0 to [-1, 1].
    """
    return DDPMScheduler(
        num_train_timesteps=len(schedule),
        trained_betas=schedule.betas.tolist(),
        variance_type=variance_type,
        clip_sample=clip_x_0,
        prediction_type=PREDICTION_TYPES[prediction],
        timestep_spacing="linspace",
    )


def flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler of rectified flow, x_t = (1 - t) x_0 + t eps, for a network of eps - x_0."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE, shift=shift)


def _set_timesteps(scheduler: Any, num_steps: int, device: torch.device) -> None:
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: must be at least 1")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # N equal steps from 1 to 0; its own default has N - 1 of them and a last one of 1/1000.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)


def _takes_variance(scheduler: Any) -> bool:
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"


def _for_prediction_alone(scheduler: Any) -> Any:
    """A scheduler that drops no latent channels: told of a learned variance, multistep solvers keep just three."""
    told = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if (
        not told
        or _takes_variance(scheduler)
        or "variance_type" not in inspect.signature(type(scheduler)).parameters
    ):
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type=None)


def _in_format(images: Float[Tensor, "B C H W"], output_type: OutputType) -> Any:
    if output_type == "pil":
        pixels = IdentityAutoencoder().to_pixels(images).cpu()
        return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in pixels]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _built_whole(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("low_cpu_mem_usage"):  # accelerate cannot make parameters that carry a role
        raise ValueError("low_cpu_mem_usage=True: these networks are not built empty: leave it out")
    return {**kwargs, "low_cpu_mem_usage": False}


def _refuse_foreign_classes(config: dict[str, Any], pipeline: str) -> None:
    networks = [component.__name__ for component in COMPONENTS.values()]
    if config.get("_class_name") != pipeline:
        raise ValueError(f"_class_name={config.get('_class_name')}: no folder of {pipeline}")
    for name, value in config.items():
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            continue
        if name == "scheduler":
            known = value[:1] == ["diffusers"]
        elif name == "vae":
            known = value in [["diffusers", autoencoder] for autoencoder in AUTOENCODERS]
        else:
            known = value in [[__name__, network] for network in networks]
        if not known:
            raise ValueError(
                f"{name}={value}: not built here: only {', '.join(networks)}, and schedulers, "
                f"{' and '.join(AUTOENCODERS)} of diffusers"
            )
