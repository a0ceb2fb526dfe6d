"""`torch.compile` of a model's blocks, which are all alike: one of them is compiled, for all."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from diffussm.runtime.errors import ConfigError


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the members of `model.blocks` at their first calls, in place: names and copies know nothing of it.

    ConfigError for a model that has none.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(f"trainer.compile=true: {type(model).__name__} has no blocks: set it to false")
    import torch._dynamo  # slow, and not needed otherwise

    # A block's gradients come together anyway: nothing is to be gained by cutting it where
    # DistributedDataParallel would reduce them.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


@contextlib.contextmanager
def naming_compile_failures() -> Iterator[None]:
    """What the compiler raises becomes a ConfigError: to go on without it might go unnoticed for weeks."""
    try:
        yield
    except Exception as error:
        dynamo = sys.modules.get("torch._dynamo.exc")
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join([f"{type(error).__name__}:", *said[:2]])
        raise ConfigError(
            f"trainer.compile=true: a block cannot be compiled ({reason}): install a C++ compiler (for a GPU, "
            "Triton too), or set it to false"
        ) from error
