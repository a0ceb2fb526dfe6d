"""How a model is spread over the processes of a job: the one seam between the trainer and torch.distributed."""

import contextlib
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffussm.runtime.distributed import Processes


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
        broadcast_buffers=False,  # they are constants
        gradient_as_bucket_view=True,
        # The graph is the same in every step, but a static one does not know of passes without reduction.
        static_graph=num_parts == 1,
    )


def local_gradients(network: nn.Module) -> AbstractContextManager:
    """A forward and backward pass that leaves its gradients to be reduced by a later one."""
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()
