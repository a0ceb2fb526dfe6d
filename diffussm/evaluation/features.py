"""Feature extractors: networks that turn uint8 images into what the metrics compare."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from diffussm.runtime.errors import DataError

DIGITS_WEIGHTS = Path(__file__).with_name("digits_cnn.safetensors")


class Features(NamedTuple):
    """Pooled features (FID, KID, precision and the like), spatial features (sFID) and class logits (IS)."""

    pool: Float[Tensor, "B pool"]
    spatial: Float[Tensor, "B spatial"] | None
    logits: Float[Tensor, "B classes"] | None


class FeatureExtractor(Protocol):
    """A frozen network behind the metrics.

    Attributes:
        name: qualifies the metrics (FID-<name>), None means Inception's.
        image_shape: (C, H, W) of the images; None for a height and width that may be any.
        dims: by name of what it gives of Features, the number of dimensions.
        settings: what besides the weights decides the features, for the record.
    """

    name: str | None
    sha256: str
    image_shape: tuple[int, int | None, int | None]
    dims: Mapping[str, int]
    settings: Mapping[str, Any]

    def __call__(self, images: Tensor) -> Features: ...
    def to(self, device: torch.device) -> "FeatureExtractor": ...


class DigitsCNN(nn.Module):
    """A small classifier of 8x8 digits, to digits what InceptionV3 is to photographs.

    pool is 64-d; spatial the first 7 channels of the last feature map in NHWC order, 4 x 4 x 7 = 112, as
    sFID takes them from Inception; logits have no bias.
    """

    name = "digits"
    dims: Mapping[str, int] = {"pool": 64, "spatial": 112, "logits": 10}

    def __init__(self, reduction: int = 1) -> None:
        """Args: reduction: the side of the squares whose means are its pixels, for digits of 8 times that."""
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction={reduction}: must be at least 1")
        self.reduction, self.image_shape = reduction, (1, 8 * reduction, 8 * reduction)
        self.settings: Mapping[str, Any] = {} if reduction == 1 else {"reduction": reduction}
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.classifier = nn.Linear(64, 10, bias=False)
        self.sha256 = ""

    @classmethod
    def pretrained(cls, weights: str | Path = DIGITS_WEIGHTS, reduction: int = 1) -> "DigitsCNN":
        """The network whose weights are shipped with the package (made by scripts/train_digits_cnn.py)."""
        network = cls(reduction)
        try:
            content = Path(weights).read_bytes()
            network.load_state_dict(safetensors.torch.load(content))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(
                f"evaluation weights {weights}: not readable ({str(error).splitlines()[0]})"
            ) from error
        network.sha256 = hashlib.sha256(content).hexdigest()
        return network.requires_grad_(False).eval()

    def forward(self, images: UInt8[Tensor, "B 1 H W"]) -> Features:
        x = relu(self.conv1(avg_pool2d(images.float(), self.reduction) / 127.5 - 1))
        x = relu(self.conv2(x))
        x = relu(self.conv3(x))  # (B, 64, 4, 4)
        pool = x.mean(dim=(2, 3))
        return Features(pool, rearrange(x[:, :7], "b c h w -> b (h w c)"), self.classifier(pool))
