"""What a model costs on paper: parameters, multiply-accumulates, SSM work and activations of one image.

Nothing is computed and no memory is used: the model runs on fake tensors, which have shapes only, under
torch's own counter. DiT and DiffuSSM call dense multiply-accumulates "Gflops" and leave FFTs out, so the
work of the state-space model has a column of its own.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """Costs of one forward pass, of one image unless said otherwise.

    parameters: learned numbers. macs: multiply-accumulates of the dense layers and of attention.
    ssm_flops: floating-point operations of the state-space convolutions, see `s4d_flops`.
    activation_bytes: what autograd keeps for the backward pass in fp32, parameters not counted.
    """

    parameters: int
    macs: int
    ssm_flops: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the dense part: two for each multiply-accumulate."""
        return 2 * self.macs


def measure_complexity(model: nn.Module, latent_shape: Sequence[int]) -> Complexity:
    """The complexity of a denoiser or classifier on latents (C, H, W); a model on the meta device will do.

    ValueError if the latents do not fit the model.
    """
    with torch.device("meta"):
        inputs = [torch.zeros(1, *latent_shape), torch.zeros(1, dtype=torch.long)]
        takes_labels = "y" in inspect.signature(model.forward).parameters  # a classifier gives them
        if takes_labels and getattr(model, "num_classes", None) is not None:
            inputs.append(torch.zeros(1, dtype=torch.long))
    return measure_module(model, *inputs)


def measure_module(module: nn.Module, *inputs: Tensor) -> Complexity:
    """The complexity of any module for a whole batch of inputs of these shapes and types, in training mode.

    The module itself is neither run nor changed: its copy holds no memory.
    """
    mode = FakeTensorMode()
    fake = _fake_copy(module, mode).train()
    with mode:
        fake_inputs = [torch.zeros(given.shape, dtype=given.dtype) for given in inputs]
        return measure_call(fake, lambda: fake(*fake_inputs))


def measure_call(module: nn.Module, call: Callable[[], object]) -> Complexity:
    """The complexity of `call`, which runs a module of fake tensors in their mode.

    Under autocast, what is kept for the backward pass is counted in its precision, with the weights that it casts.
    """
    saved, ssm = _SavedBytes(), _SSMCounter()
    for parameter in module.parameters():
        saved.ignore(parameter)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch 2.8 does not count
    counter = FlopCounterMode(display=False, custom_mapping={**ssm.mapping, attention: _attention_flops})
    with counter, torch.autograd.graph.saved_tensors_hooks(saved.add, lambda kept: kept):
        call()
    return Complexity(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        macs=counter.get_total_flops() // 2,
        ssm_flops=ssm.flops,
        activation_bytes=saved.total,
    )


def s4d_flops(batch_size: int, d_model: int, channels: int, pairs: int, length: int) -> int:
    """Floating-point operations of an S4D convolution (B, D, L) -> (B, channels, L) with N/2 = pairs.

    A real FFT of n = 2L points (zero-padded) counts 2.5 n log2 n, a complex product 6. Transforms: the
    input's and the outputs', one kernel's for each channel. Kernels: a real matrix product over N states.
    Its two tables of about sqrt(L) exponentials are left out.
    """
    n = 2 * length
    transform = 2.5 * n * math.log2(n)
    transforms = transform * (batch_size * (d_model + channels) + channels)
    products = 6 * (n // 2 + 1) * batch_size * channels
    kernels = 2 * channels * (2 * pairs) * length
    return round(transforms) + products + kernels


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *others: Any, **options: Any) -> int:
    batch_size, heads, length, features = q
    return 2 * batch_size * heads * length * k[2] * (features + v[3])


class _SSMCounter:
    """The work of the S4D operator, which hides its FFTs and products from torch's counter."""

    def __init__(self) -> None:
        self.flops = 0
        self.mapping: dict[Any, Callable[..., int]] = {torch.ops.diffussm.s4d_convolution: self._count}

    def _count(self, u: Sequence[int], log_modulus: Sequence[int], *others: Any, **options: Any) -> int:
        batch_size, d_model, length = u
        self.flops += s4d_flops(batch_size, d_model, log_modulus[0], log_modulus[1], length)
        return 0  # counted here, not among the dense layers


class _SavedBytes:
    """Bytes of the distinct storages that autograd saves."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def ignore(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = storage

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


def _fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with parameters and buffers that have shapes only."""
    fakes: dict[int, Any] = {}
    with mode:
        for parameter in module.parameters():
            fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape))
        for buffer in module.buffers():
            fakes[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(module, fakes)  # outside the mode, which cannot copy real tensors that layers keep
