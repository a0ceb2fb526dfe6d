"""TF32, the ten-bit multiplication that GPUs pass off as fp32: switched off where fp32 is meant."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and matrix products of fp32 in full precision; what was set before is set again at the end."""
    settings = _settings()
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, full in settings:
            setattr(owner, name, full)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _settings() -> list[tuple[Any, str, Any]]:
    """Who has a setting, its name, and its value for full precision."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # torch 2.9 and later, which warn of the names before
        return [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    return [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
