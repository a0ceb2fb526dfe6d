"""How a batch and a model are spread over the processes of a job: the one seam to torch.distributed.

A model is whole in each process (`Replicas`), or in parts (`sharding.Shards`). What a trainer does with its
tensors beyond forward and backward passes, it asks of these.
"""

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError

# Buffers need not be brought into agreement again and again; how to say so depends on the version of torch.
_NEWER, _OLDER = "forward_sync_buffers", "broadcast_buffers"
_IS_NEWER = _NEWER in inspect.signature(DistributedDataParallel).parameters
_CONSTANT_BUFFERS: dict[str, Any] = {_NEWER if _IS_NEWER else _OLDER: False}


class Replicas:
    """A model that every process has whole: only the gradients have to meet."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.num_shards = 1  # that together are the model
        # DistributedDataParallel sums gradients in another order from its second pass on, and that one remains.
        self.settling_passes = 2 if processes.world_size > 1 else 0

    def wrap(self, model: nn.Module, num_parts: int) -> nn.Module:
        """What forward passes go through, so that backward passes leave the mean of all processes' gradients.

        Args:
            num_parts: forward and backward passes in a step.
        """
        if self.processes.world_size == 1:
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

    def local_gradients(self, network: nn.Module) -> AbstractContextManager:
        """A forward and backward pass that leaves its gradients to be reduced by a later one."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()

    def copy(self, model: nn.Module) -> nn.Module:
        """A model like it, for averages: its tensors lie where the model's lie."""
        return deepcopy(model)

    def whole(self, average: nn.Module) -> AbstractContextManager[nn.Module]:
        """What a `copy` is to be called as, within this context; entered by all processes."""
        return contextlib.nullcontext(average)

    def local(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What this process has of some tensors, to be changed in place element by element."""
        return list(tensors)

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The norm of all of them together, in all processes."""
        return nn.utils.get_total_norm(gradients)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of some tensors, in the first process at least; called by all."""
        return dict(tensors)

    def part(self, whole: Tensor, like: Tensor | None) -> Tensor:
        """Of a whole tensor what this process needs of it to replace `like`."""
        return whole


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
