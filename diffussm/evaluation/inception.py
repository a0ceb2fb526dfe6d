"""InceptionV3 as FID, IS and sFID know it: torch-fidelity's network, with the spatial features of ADM."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from diffussm.evaluation.features import Features
from diffussm.evaluation.network import FrozenNetwork, load_weights, read_weights
from diffussm.runtime import environment
from diffussm.runtime.errors import ConfigError

KEY = "evaluation.extractor.weights"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
STEM = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
)  # fmt: skip
HEAD = ("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")


class Inception(FrozenNetwork):
    """The network behind FID: pool 2048, spatial 17 x 17 x 7 of sFID, logits 1008 without their bias.

    Plain, its features are torch-fidelity's to the last bit.

    Args:
        weights: a file (.pth or .safetensors); download, to fetch it into torch's cache; None: the file that
            DIFFUSSM_INCEPTION_WEIGHTS names, or that in torch's cache, where torch-fidelity keeps it.
        sha256: that the file must have; None for any, which makes metrics of your own.
    """

    network: Any
    name = None
    image_shape = (3, None, None)
    dims: Mapping[str, int] = {"pool": 2048, "spatial": 2023, "logits": 1008}

    def __init__(
        self,
        weights: str | None = None,
        sha256: str | None = SHA256,
        precision: Literal["fp32", "bf16"] = "fp32",
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(precision, compile, channels_last)
        path = find_weights(weights)
        state, self.sha256 = read_weights(path, KEY)
        if sha256 is not None and self.sha256 != sha256:
            raise ConfigError(
                f"{KEY}={path}: its SHA-256 is {self.sha256}, not {sha256}: get {URL_INCEPTION_V3}, or set "
                "evaluation.extractor.sha256 to that of your file"
            )
        self.network = _blank_network()
        load_weights(self.network, state, path, KEY)
        self.freeze()

    @classmethod
    def untrained(cls, seed: int = 0, **ways: Any) -> "Inception":
        """Random weights, for tests and benchmarks; its numbers mean nothing.

        Convolutions have He's variance: with that of torch, features hardly depend on the image.
        """
        extractor = cls.__new__(cls)
        FrozenNetwork.__init__(extractor, **ways)
        extractor.network = _blank_network()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in extractor.network.named_parameters():
            if name.endswith("conv.weight"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            elif name.startswith("fc."):
                nn.init.normal_(parameter, std=0.05, generator=generator)
        digest = hashlib.sha256()
        for parameter in extractor.network.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        extractor.sha256 = digest.hexdigest()
        extractor.freeze()
        return extractor

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """torch-fidelity's forward pass, which keeps no spatial features, stage by stage."""
        x = resize(images.float(), SIDE).sub_(128).div_(128)
        for stage in STEM:
            x = self.network.get_submodule(stage)(x)  # at last (B, 768, 17, 17)
        # The first channels of Mixed_6d are those of its branch1x1. ADM's files have them in TensorFlow's order.
        spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")
        for stage in HEAD:
            x = self.network.get_submodule(stage)(x)
        pool = torch.flatten(x, 1)
        return Features(pool, spatial, pool.mm(self.network.fc.weight.T))


def resize(images: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B C side side"]:
    """Bilinear as TensorFlow 1 does it, pixel centres at corners and not antialiased.

    torch-fidelity's to the last bit, and faster, for every row is stretched once, before rows are mixed.
    """
    for dim, sizes in ((3, (1, 1, 1, side)), (2, (1, 1, side, 1))):
        size = images.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * torch.tensor(size / side)
        below = place.long()
        above = (below + 1).clamp_max(size - 1)
        weight = (place - below).view(sizes)
        low = images.index_select(dim, below)
        images = images.index_select(dim, above).sub_(low).mul_(weight).add_(low)
    return images


def find_weights(weights: str | None) -> Path:
    """The file of weights; ConfigError says where it was looked for and what to put where."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if weights == "download":
        return cached if cached.is_file() else _download(cached)
    if weights is not None:
        path, said = Path(weights).expanduser(), f"{KEY}={weights}"
    elif (named := environment.inception_weights()) is not None:
        path, said = Path(named).expanduser(), f"DIFFUSSM_INCEPTION_WEIGHTS={named}"
    else:
        path, said = cached, f"{KEY}: not set and not in torch's cache"
    if path.is_file():
        return path
    problem = said if path == cached else f"{said}: no such file"
    raise ConfigError(
        f"{problem}: put {URL_INCEPTION_V3} at {cached}, name a copy by {KEY}=FILE, or let {KEY}=download fetch it"
    )


def _download(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=SHA256, progress=False)
    except (OSError, URLError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{KEY}=download: {URL_INCEPTION_V3} does not arrive ({reason}): fetch it elsewhere, for {path}"
        ) from error
    return path


class _Blank(FeatureExtractorInceptionV3):
    """torch-fidelity's network, whose constructor insists on loading weights, and would unpickle them."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)


def _blank_network() -> Any:
    none = io.BytesIO()
    torch.save({}, none)
    none.seek(0)
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn in vain
        return _Blank("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=none)
