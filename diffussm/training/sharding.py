"""A model in parts, one in each process of a job (FSDP2): for models that outgrow one device.

Weights, gradients, optimiser moments and averages are DTensors, cut along their first dimension. A block's weights
come together for its forward and its backward pass, and part again. Files know nothing of it: whole tensors are
written, and of whole tensors every process takes its part.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError
from diffussm.training.parallel import Replicas


class Shards(Replicas):
    """A model that no process has whole; it is cut up here and now, in place, and moved to the device.

    ConfigError unless the processes have met.
    """

    def __init__(self, processes: Processes, model: nn.Module, device: torch.device) -> None:
        super().__init__(processes)
        if not dist.is_initialized():
            raise ConfigError(
                "trainer.parallel=fsdp: needs processes that have met: start them with trainer.num_processes or "
                "torchrun, or set it to ddp"
            )
        self.settling_passes = 0  # sums are made in the same order from the first pass on
        self.num_shards = processes.world_size
        # The model's own class and structure, without memory: fully_shard makes it one that refuses to be copied.
        self._skeleton = _replaced(model, [torch.empty_like(tensor, device="meta") for tensor in _tensors(model)])
        world = dist.group.WORLD
        assert world is not None
        mesh = DeviceMesh.from_group(world, device.type)  # of the group that is there: nothing to be agreed upon
        # Changing a view in place would undo the hook that has weights come together in the backward pass.
        model.register_forward_hook(lambda module, inputs, output: output.clone())
        declared = [vars(parameter) for parameter in model.parameters()]  # such as what the optimiser is to know
        blocks = getattr(model, "blocks", None)
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for parameter, attributes in zip(model.parameters(), declared, strict=True):
            vars(parameter).update(attributes)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Sums, divided afterwards: gloo has no mean, and torch 2.8 takes its sum for one.
                module.set_force_sum_reduction_for_comms(True)

    def wrap(self, model: nn.Module, num_parts: int) -> nn.Module:
        return model

    @contextlib.contextmanager
    def local_gradients(self, network: nn.Module) -> Iterator[None]:
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def copy(self, model: nn.Module) -> nn.Module:
        return _replaced(self._skeleton, [tensor.detach().clone() for tensor in _tensors(model)])

    @contextlib.contextmanager
    def whole(self, average: nn.Module) -> Iterator[nn.Module]:
        yield _replaced(average, [self._unite(tensor) for tensor in _tensors(average)])

    @torch.no_grad()
    def local(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        squared = nn.utils.get_total_norm(self.local(gradients)).square()
        return self.processes.sum(squared).sqrt()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One after the other, to the memory of the first process's CPU."""
        found = {}
        for name, tensor in tensors.items():
            whole = self._unite(tensor)
            if self.processes.is_first:
                found[name] = whole.cpu()
        return found

    def part(self, whole: Tensor, like: Tensor | None) -> Tensor:
        if not isinstance(like, DTensor) or like.shape != whole.shape:
            return whole
        mine = torch.empty_like(like, requires_grad=False)  # of its own memory, while what follows is a view
        # Without src_data_rank=None the first process would send to the others what they have.
        cut = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        for ours, theirs in zip(self.local([mine]), self.local([cut]), strict=True):
            ours.copy_(theirs)
        return mine

    def _unite(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            with self.processes.noticing_losses():
                return tensor.full_tensor()
        return tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _replaced(module: nn.Module, tensors: Iterable[Tensor]) -> nn.Module:
    """A copy of a module with these in place of its `_tensors`, which themselves are not copied."""
    memo: dict[int, Tensor] = {}
    for theirs, ours in zip(_tensors(module), tensors, strict=True):
        is_parameter = isinstance(theirs, nn.Parameter)
        memo[id(theirs)] = nn.Parameter(ours, requires_grad=False) if is_parameter else ours
    return deepcopy(module, memo)
