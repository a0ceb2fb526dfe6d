"""Mixed precision: which dtype the forward pass runs in, and loss scaling where its range needs it."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """fp32, or autocast to bf16 or fp16 with weights, gradients and EMA kept in fp32; fp16 scales the loss."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name not in ("fp32", *_AUTOCAST):
            raise ValueError(f"precision={name!r}: choose fp32, bf16 or fp16")
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes."""
        return torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.name), enabled=self.name in _AUTOCAST)
