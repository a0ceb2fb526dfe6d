"""Autoencoders: between images as uint8 and the latents x_0 that diffusion works on.

`IdentityAutoencoder` is diffusion in pixel space. The others are frozen networks of diffusers, read from a
directory or the hub: `KLAutoencoder` (Stable Diffusion's and its successors') and `DCAutoencoder` (DC-AE). They
know their shapes, scale and shift from config.json alone, and load weights at the first image or latent.
"""

import contextlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffussm.data.latents import sample_posterior
from diffussm.data.pretrained import CONFIG_FILE, WEIGHTS_FILE, Pretrained
from diffussm.data.tf32 import without_tf32
from diffussm.runtime.errors import ConfigError, DataError, DivergedError, note

IMAGE_CHANNELS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[int, int, int]


class Autoencoder(Protocol):
    """Images to latents and back; `latent_shape` tells what a model will see.

    `is_stochastic`: whether `to_latents` takes the noise of a posterior; without it, it gives the mean.
    `fingerprint`: what identifies it to checkpoints and latent sets.
    """

    @property
    def is_stochastic(self) -> bool: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def latent_shape(self, image_shape: Shape) -> Shape: ...
    def image_shape(self, latent_shape: Shape) -> Shape: ...
    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def to_pixels(self, latents: Tensor) -> Tensor: ...
    def to(self, device: torch.device) -> "Autoencoder": ...


class IdentityAutoencoder:
    """Diffusion in pixel space: the latent is the image, scaled to [-1, 1]."""

    is_stochastic = False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """It has no weights."""
        return {"kind": "identity"}

    def latent_shape(self, image_shape: Shape) -> Shape:
        """The image's own shape."""
        return image_shape

    def image_shape(self, latent_shape: Shape) -> Shape:
        """The latent's own shape."""
        return latent_shape

    def to_latents(
        self, images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """0..255 to -1..1."""
        assert noise is None, "there is no posterior"
        return _to_float(images)

    def to_pixels(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """clamp(127.5 x + 128, 0, 255), truncated, as DiT quantises; inverts `to_latents`."""
        return _to_uint8(latents)

    def to(self, device: torch.device) -> "IdentityAutoencoder":
        """Itself: it works where its input is."""
        return self


class FrozenAutoencoder(ABC):
    """A frozen autoencoder of diffusers: x_0 = (latent - shift) scale.

    Args:
        pretrained: a directory with config.json and diffusion_pytorch_model.safetensors, there or in its vae/, or
            a repository of the hub, owner/name.
        subfolder: of the directory or repository.
        revision: of the repository.
        scale: None: scaling_factor of config.json.
        shift: None: shift_factor of config.json, or 0.
        latent_channels: what config.json must say; None: whatever it says.
        factor: side of an image by side of its latent, likewise. With both, shapes are known without any file.
        precision: of weights and activations, whatever the caller's autocast or TF32. fp16 gives way to fp32 where
            config.json says that the network overflows in it (force_upcast).
        batch_size: most images in one pass.
        tile: images with a longer side, in pixels, pass in overlapping tiles of this side, which takes less memory
            and differs slightly from the whole at the seams; None: always whole.
    """

    class_name: ClassVar[str]  # in diffusers
    default_scale: ClassVar[float]  # what diffusers takes if config.json names none
    has_shift: ClassVar[bool]  # whether its config.json can name one
    is_stochastic: ClassVar[bool]

    def __init__(
        self,
        pretrained: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        latent_channels: int | None = None,
        factor: int | None = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        batch_size: int = 8,
        tile: int | None = 1024,
    ) -> None:
        if scale == 0:
            raise ValueError("scale=0: leaves nothing of the latents: set it to null for config.json's")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if tile is not None and tile < 1:
            raise ValueError(f"tile={tile}: must be at least 1, or null for none")
        for key, value in (("latent_channels", latent_channels), ("factor", factor)):
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: must be at least 1, or null for what config.json says")
        self.files = Pretrained("autoencoder.pretrained", pretrained, subfolder, revision, self.class_name)
        self._scale, self._shift, self._told = scale, shift, {"latent_channels": latent_channels, "factor": factor}
        self._precision, self.batch_size, self.tile = precision, batch_size, tile
        self.device = torch.device("cpu")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, found to agree with what was told; DataError if it cannot be had."""
        config = self.files.config
        try:
            facts = {"latent_channels": int(config["latent_channels"]), "factor": self.read_factor(config)}
            channels = int(config["in_channels"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.files.where}: config.json is not whole ({error!r}): restore it") from error
        for key, value in facts.items():
            if self._told[key] not in (None, value):
                raise ConfigError(
                    f"autoencoder.{key}={self._told[key]}: config.json of {self.files.where} says {value}: set it "
                    "so, or to null"
                )
        if channels != IMAGE_CHANNELS:
            raise DataError(f"{self.files.where}: takes images of {channels} channels, not {IMAGE_CHANNELS}")
        return {**config, **facts}

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        told = self._told["latent_channels"]
        return self.config["latent_channels"] if told is None else told

    @property
    def factor(self) -> int:
        """Side of an image by side of its latent."""
        told = self._told["factor"]
        return self.config["factor"] if told is None else told

    @property
    def scale(self) -> float:
        """What brings latents to a standard deviation of about 1."""
        return float(self.config.get("scaling_factor", self.default_scale) if self._scale is None else self._scale)

    @property
    def shift(self) -> float:
        """The mean of the latents."""
        return float((self.config.get("shift_factor") or 0.0) if self._shift is None else self._shift)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Its network and whatever else decides what latents mean; precision and tiles are rounding to it."""
        return {
            "kind": type(self).__name__,
            "sha256": self.files.sha256,
            "config_sha256": self.files.architecture_sha256,
            "scale": self.scale,
            "shift": self.shift,
            "latent_channels": self.config["latent_channels"],
            "factor": self.config["factor"],
        }

    @cached_property
    def precision(self) -> str:
        """Of weights and activations, after what config.json says."""
        if self._precision == "fp16" and self.files.config.get("force_upcast"):
            note("autoencoder.precision=fp16: its config.json asks for more (force_upcast): it works in fp32")
            return "fp32"
        return self._precision

    @property
    def encoding(self) -> dict[str, Any]:
        """Which of the possible latents of an image it gives."""
        return {"precision": self.precision, "tile": self.tile}

    @property
    def rounding(self) -> dict[str, Any]:
        """What else the last bits of latents depend on."""
        return {"diffusers": importlib.metadata.version("diffusers"), "autoencoder.batch_size": self.batch_size}

    def latent_shape(self, image_shape: Shape) -> Shape:
        """(C, H, W) of the latents of such images; ConfigError names the key if there are none."""
        channels, height, width = image_shape
        factor = self.factor
        if channels != IMAGE_CHANNELS:
            raise ConfigError(
                f"autoencoder: {type(self).__name__} takes images of {IMAGE_CHANNELS} channels, the data gives "
                f"{channels}: choose autoencoder=identity"
            )
        if height % factor or width % factor:
            size = height if height == width else f"{height}x{width}"
            raise ConfigError(f"data.resolution={size}: must be a multiple of {factor}, the autoencoder's factor")
        if self.tile is not None and self.tile % (4 * factor):  # tiles overlap by a quarter
            raise ConfigError(
                f"autoencoder.tile={self.tile}: must be a multiple of {4 * factor}, or null for none"
            )
        return (self.latent_channels, height // factor, width // factor)

    def image_shape(self, latent_shape: Shape) -> Shape:
        """(C, H, W) of what such latents are decoded to; inverts `latent_shape`."""
        _, height, width = latent_shape
        return (IMAGE_CHANNELS, height * self.factor, width * self.factor)

    def to(self, device: torch.device) -> "FrozenAutoencoder":
        """Itself, working on this device from now on."""
        self.device = torch.device(device)
        if "network" in vars(self):
            self.network.to(self.device)
        return self

    @cached_property
    def network(self) -> Any:
        """The network of diffusers, loaded at first use; DataError if its file is missing or not whole."""
        network = self._load()
        if self.tile is not None:
            self._enable_tiling(network, self.tile)
        with _quiet():
            return network.to(self.device, DTYPES[self.precision]).requires_grad_(False).eval()

    def _load(self) -> nn.Module:
        weights, _ = self.files.weights, self.config
        import diffusers  # here, because it takes seconds

        try:
            with _quiet():
                network, told = getattr(diffusers, self.class_name).from_pretrained(
                    weights.parent,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # whatever a damaged file may raise
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{weights}: cannot be loaded ({why}): restore it and its config.json") from error
        if misfits := [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]:
            raise DataError(
                f"{weights}: does not fit its config.json ({len(misfits)} tensors, such as {misfits[0]})"
            )
        return network

    def written_out(self) -> dict[str, bytes]:
        """Its two files by name, with the scale and shift that are used here, and no word of where they were."""
        config = {key: value for key, value in self.files.config.items() if key != "_name_or_path"}
        config["scaling_factor"] = self.scale
        if self.shift and not self.has_shift:
            raise ConfigError(
                f"autoencoder.shift={self.shift}: {self.class_name} of diffusers has none to tell of"
            )
        if self.has_shift:
            config["shift_factor"] = self.shift
        return {CONFIG_FILE: json.dumps(config, indent=2).encode(), WEIGHTS_FILE: self.files.weights.read_bytes()}

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        """What the encoder says of images, unscaled: see the subclass."""
        return self._in_batches(lambda part: self._encode(_to_float(part)), images)

    @abstractmethod
    def to_latents(
        self, images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """x_0 of images."""

    @torch.no_grad()
    def to_pixels(self, latents: Float[Tensor, "B c h w"]) -> UInt8[Tensor, "B C H W"]:
        """Decoded and quantised as pixels are everywhere: clamp(127.5 x + 128, 0, 255), truncated."""
        unscaled = latents.float() / self.scale + self.shift
        return _to_uint8(
            self._in_batches(lambda part: self.network.decode(part.to(self.network.dtype)).sample, unscaled)
        )

    def _in_batches(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`work` of `batch_size` items at a time, in the network's own precision, whose results are float32."""
        self.network  # noqa: B018  (loaded first, for it decides the precision)
        exact = without_tf32() if self.precision == "fp32" else contextlib.nullcontext()
        with torch.autocast(self.device.type, enabled=False), exact:
            parts = [work(part.to(self.device)).float() for part in x.split(self.batch_size)]
        result = torch.cat(parts)
        if self.precision != "fp32" and not result.isfinite().all():
            raise DivergedError(f"the autoencoder overflows in {self.precision}: set autoencoder.precision=fp32")
        return result

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...
    @staticmethod
    @abstractmethod
    def read_factor(config: Mapping[str, Any]) -> int:
        """Side of an image by side of its latent, of the network with this config.json."""

    @abstractmethod
    def _enable_tiling(self, network: Any, tile: int) -> None: ...


class KLAutoencoder(FrozenAutoencoder):
    """AutoencoderKL, whose posterior is normal: Stable Diffusion 1 to 3, SDXL, Flux."""

    class_name = "AutoencoderKL"
    default_scale = 0.18215
    has_shift = True
    is_stochastic = True

    def to_latents(
        self, images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """A sample of the posterior, for this noise; without noise, its mean."""
        noise = None if noise is None else noise.to(self.device)
        return sample_posterior(self.encode(images), noise, self.scale, self.shift)

    def _encode(self, images: Tensor) -> Tensor:
        """Moments: mean, then log-variance, which diffusers keeps within -30 and 20."""
        posterior = self.network.encode(images.to(self.network.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    @staticmethod
    def read_factor(config: Mapping[str, Any]) -> int:
        """Every level but the last halves the sides."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def _enable_tiling(self, network: Any, tile: int) -> None:
        network.enable_tiling()
        network.tile_sample_min_size, network.tile_latent_min_size = tile, tile // self.factor


class DCAutoencoder(FrozenAutoencoder):
    """AutoencoderDC, the deep-compression autoencoder, which knows no posterior."""

    class_name = "AutoencoderDC"
    default_scale = 1.0
    has_shift = False
    is_stochastic = False

    def to_latents(
        self, images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Scaled latents; there is no noise to take."""
        assert noise is None, "there is no posterior"
        return (self.encode(images) - self.shift) * self.scale

    def _encode(self, images: Tensor) -> Tensor:
        """The latents themselves."""
        return self.network.encode(images.to(self.network.dtype)).latent

    @staticmethod
    def read_factor(config: Mapping[str, Any]) -> int:
        """Every level but the last halves the sides."""
        return 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def _enable_tiling(self, network: Any, tile: int) -> None:
        stride = tile * 3 // 4
        network.enable_tiling(tile, tile, stride, stride)


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _to_uint8(x: Tensor) -> Tensor:
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """diffusers' remarks on what it loads are no one's business: what matters is checked."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
