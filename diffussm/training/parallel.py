"""How a batch and a model are spread over the processes of a job: the one seam to torch.distributed."""

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError

# Buffers need not be brought into agreement again and again; how to say so depends on the version of torch.
_NEWER, _OLDER = "forward_sync_buffers", "broadcast_buffers"
_IS_NEWER = _NEWER in inspect.signature(DistributedDataParallel).parameters
_CONSTANT_BUFFERS: dict[str, Any] = {_NEWER if _IS_NEWER else _OLDER: False}


def wrap_model(model: nn.Module, processes: Processes, num_parts: int) -> nn.Module:
    """What forward passes go through, so that backward passes leave the mean of the gradients of all processes.

    Args:
        num_parts: forward and backward passes in a step.
    """
    if processes.world_size == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        **_CONSTANT_BUFFERS,
        gradient_as_bucket_view=True,
        # The graph is the same in every step, but a static one does not know of passes without reduction.
        static_graph=num_parts == 1,
    )


def local_gradients(network: nn.Module) -> AbstractContextManager:
    """A forward and backward pass that leaves its gradients to be reduced by a later one."""
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def split(batch_size: int, processes: Processes, device_batch_size: int | None) -> list[range]:
    """This process's share of a batch in parts of at most `device_batch_size`, as many as every process has.

    ConfigError if a process would have an empty part.
    """
    fewest, most = batch_size // processes.world_size, -(-batch_size // processes.world_size)
    num_parts = -(-most // (device_batch_size or most or 1))
    if num_parts > fewest:
        each = "" if device_batch_size is None else f", {device_batch_size} at a time"
        raise ConfigError(
            f"trainer.batch_size={batch_size}: cannot be shared by {processes.world_size} processes{each}: "
            f"set it to a multiple of {processes.world_size}"
        )
    share = processes.share(batch_size)
    return [share[len(share) * i // num_parts : len(share) * (i + 1) // num_parts] for i in range(num_parts)]
