"""Mixed precision: which dtype the forward pass runs in, loss scaling where its range needs it, and TF32."""

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """fp32, or autocast to bf16 or fp16 with weights, gradients and EMA kept in fp32; fp16 scales the loss.

    Args:
        tf32: on a GPU, round the factors of fp32 matrix products and convolutions to TF32's 10 bits. What must
            not be rounded, such as a state-space model's kernel, protects itself.
    """

    def __init__(self, name: PrecisionName, device: torch.device, tf32: bool = True) -> None:
        if name not in ("fp32", *_AUTOCAST):
            raise ValueError(f"precision={name!r}: choose fp32, bf16 or fp16")
        self.name, self.device, self.tf32 = name, device, tf32
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        if device.type == "cuda":
            # Some versions of torch warn once, of the older way to say it, which is the one that all understand
            # (the compiler of torch 2.9 refuses the newer).
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _set_products(*_products())

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes."""
        return torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.name), enabled=self.name in _AUTOCAST)

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """The context of forward and backward passes: TF32 or not, and afterwards as before."""
        if self.device.type != "cuda":  # "high" would round the products of some CPUs too
            yield
            return
        before = _products()
        try:
            _set_products("high" if self.tf32 else "highest", self.tf32)
            yield
        finally:
            _set_products(*before)


def _products() -> tuple[str, bool]:
    """How products of fp32 matrices, and convolutions, may be rounded."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_products(matrices: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions
