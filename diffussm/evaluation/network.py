"""Large networks behind the metrics: weights that cannot run code, and ways of going faster that are measured."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from diffussm.evaluation.features import Features
from diffussm.runtime.errors import DataError


class FrozenNetwork(nn.Module):
    """A feature extractor whose plain arithmetic, `features`, may be left for something faster.

    Args:
        precision: bf16 runs under autocast.
        compile: by torch.compile.
        channels_last: the memory format that most convolutions are fastest in; other rounding.
    """

    def __init__(
        self, precision: Literal["fp32", "bf16"] = "fp32", compile: bool = False, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.precision, self.compiled, self.channels_last = precision, compile, channels_last
        self._fast: Callable[[Tensor], Features] = torch.compile(self.features) if compile else self.features

    def features(self, images: Tensor) -> Features:
        """The network's own arithmetic."""
        raise NotImplementedError

    @property
    def settings(self) -> Mapping[str, Any]:
        """What besides the weights decides the features, where it is not plain arithmetic."""
        ways = {"precision": self.precision, "compile": self.compiled, "channels_last": self.channels_last}
        return {key: value for key, value in ways.items() if value not in ("fp32", False)}

    def freeze(self) -> None:
        """Make it ready for `forward` once the weights are in."""
        self.requires_grad_(False).eval()
        self._arrange(self.channels_last)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Features:
        device = next(self.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self._fast(images)
        spatial, logits = (None if values is None else values.float() for values in found[1:])
        return Features(found.pool.float(), spatial, logits)

    @torch.no_grad()
    def deviation(self, images: UInt8[Tensor, "B C H W"]) -> float | None:
        """How far pool features of these images are at most from plain ones, in their root mean square.

        None where nothing makes a difference.
        """
        if not self.settings:
            return None
        fast = self(images).pool
        self._arrange(channels_last=False)
        plain = self.features(images).pool
        self._arrange(self.channels_last)
        return float((fast - plain).abs().max() / plain.square().mean().sqrt())

    def _arrange(self, channels_last: bool) -> None:
        """Activations follow the format of the weights."""
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def read_weights(path: Path, key: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of a safetensors file or of a .pth that holds nothing else, and the file's SHA-256.

    DataError, which names `key`, for any other file: nothing in it is run.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("holds more than tensors by name")
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{key}={path}: cannot be read as weights ({reason[:200]}): choose another file"
        ) from error
    return dict(state), hashlib.sha256(content).hexdigest()


def load_weights(network: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> None:
    """Load weights that fit exactly; DataError says what does not."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    expected |= {name: given.get(name, ()) for name in expected if name.endswith("num_batches_tracked")}
    for name in sorted(expected.keys() | given.keys()):
        if name.endswith("num_batches_tracked") or expected.get(name) == given.get(name):
            continue
        raise DataError(
            f"{key}={path}: weights of another network: {name} is {given.get(name, 'missing')}, "
            f"not {expected.get(name, 'wanted')}: choose another file"
        )
    network.load_state_dict({name: state[name] for name in expected if name in state}, strict=False)
