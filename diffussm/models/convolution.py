"""The work of an S4D layer as one operator: kernels, transforms and products, forward and backward.

    K_l = 2 Re(sum_n weight_n Abar_n^l) + skip at l = 0         for every channel, l = 0 .. L-1
    y   = causal convolution of u with K of the first D channels, anticausal with K of the next D

`s4d_convolution` is a `torch.library` operator, opaque to autograd and `torch.compile`. It saves nothing but
its inputs: kernels and spectra are made again in the backward pass. Channels are worked off in portions whose
spectra fit the cache, so temporaries do not grow with the width. A faster implementation for another device
registers itself for that device under the same name (`s4d_convolution.register_kernel`).

    channels    D (causal only) or 2D       pairs    N/2 conjugate pairs      F    frequencies of the padded length
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

# Bytes of one portion's input spectrum. A few of them fit a CPU's cache; on a GPU they only bound memory.
CPU_PORTION, GPU_PORTION = 2 << 20, 256 << 20
LEAST_PORTION = 16  # channels: where u is a transposed (B, L, D), they are read by cache lines of 16


class Discrete(NamedTuple):
    """Abar = exp(log_modulus + i angle) and weight = C Bbar (channels, pairs), and skip (channels,)."""

    log_modulus: Tensor
    angle: Tensor
    weight_real: Tensor
    weight_imag: Tensor
    skip: Tensor

    def select(self, d_model: int, portion: slice) -> "Discrete":
        """The channels `portion` of both directions."""
        return Discrete(*(part.unflatten(0, (-1, d_model))[:, portion].flatten(0, 1) for part in self))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 within: a rounded matrix product would spoil the kernel."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9: the older way refuses to be mixed
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        with torch.autocast(device.type, enabled=False):
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision
        return
    allowed = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)


def make_kernel(discrete: Discrete, length: int, dtype: torch.dtype) -> Float[Tensor, "channels L"]:
    """The kernels K_0 .. K_{L-1}; no gradients."""
    return _Tables(discrete, length, dtype).kernel()


def make_spectra(discrete: Discrete, d_model: int, length: int, dtype: torch.dtype) -> Complex[Tensor, "dirs D F"]:
    """What the spectrum of u (B, D, L) is multiplied by in each direction."""
    spectra = _Padded(length, dtype).spectrum(make_kernel(discrete, length, dtype))
    return _transfer(spectra, len(discrete.skip) // d_model)


def padded_length(length: int) -> int:
    """The cheapest even size 2^a 3^b 5^c of a transform in which convolutions of L points do not wrap around."""
    least = max(2 * length - 1, 2)
    odd = [3**b * 5**c for b in range(21) for c in range(14) if 3**b * 5**c <= least]
    return min(factor << max(1, (-(-least // factor) - 1).bit_length()) for factor in odd)


def convolve_spectra(
    u: Float[Tensor, "B D L"], spectra: Complex[Tensor, "dirs D F"]
) -> Float[Tensor, "B channels L"]:
    """The convolution with kernels whose spectra are known; no gradients."""
    y = u.new_empty(len(u), len(spectra), *u.shape[1:])
    padded = _Padded(u.shape[2], spectra.real.dtype)
    for portion in _portions(u):
        _convolve(padded, u[:, portion], spectra[:, portion], y[:, :, portion])
    return y.flatten(1, 2)


@torch.library.custom_op("diffussm::s4d_convolution", mutates_args=())
def s4d_convolution(
    u: Tensor, log_modulus: Tensor, angle: Tensor, weight_real: Tensor, weight_imag: Tensor, skip: Tensor
) -> Tensor:
    """(B, D, L) -> (B, channels, L) in the dtype of u, computed in fp32 (float64 for float64)."""
    discrete = Discrete(log_modulus, angle, weight_real, weight_imag, skip)
    batch, d_model, length = u.shape
    directions, dtype = len(skip) // d_model, _working_dtype(u)
    y = u.new_empty(batch, directions, d_model, length)
    padded_u, padded_kernel = _Padded(length, dtype), _Padded(length, dtype)
    with full_precision(u.device):
        for portion in _portions(u):
            kernel = _Tables(discrete.select(d_model, portion), length, dtype).kernel()
            spectra = _transfer(padded_kernel.spectrum(kernel), directions)
            _convolve(padded_u, u[:, portion], spectra, y[:, :, portion])
    return y.flatten(1, 2)


@torch.library.custom_op("diffussm::s4d_convolution_backward", mutates_args=())
def s4d_convolution_backward(
    grad_y: Tensor,
    u: Tensor,
    log_modulus: Tensor,
    angle: Tensor,
    weight_real: Tensor,
    weight_imag: Tensor,
    skip: Tensor,
) -> list[Tensor]:
    """Gradients of u and of the five parts of `Discrete`."""
    discrete = Discrete(log_modulus, angle, weight_real, weight_imag, skip)
    _, d_model, length = u.shape
    dtype = _working_dtype(u)
    grad_y = grad_y.unflatten(1, (-1, d_model))
    directions = grad_y.shape[1]
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    gradients = [torch.empty_like(part).unflatten(0, (directions, d_model)) for part in discrete]
    padded_u, padded_kernel = _Padded(length, dtype), _Padded(length, dtype)
    with full_precision(u.device):
        for portion in _portions(u):
            tables = _Tables(discrete.select(d_model, portion), length, dtype)
            spectra = _transfer(padded_kernel.spectrum(tables.kernel()), directions).conj_physical()
            u_spectrum = padded_u.spectrum(u[:, portion]).conj_physical_()
            grad_u_spectrum, grad_kernel = torch.zeros_like(u_spectrum), []
            for direction in range(directions):
                grad_spectrum = padded_u.spectrum(grad_y[:, direction, portion])
                grad_u_spectrum.addcmul_(grad_spectrum, spectra[direction])
                cross = grad_spectrum.mul_(u_spectrum).sum(0)
                grad_kernel.append(padded_u.rows(cross if direction == 0 else cross.conj_physical_()))
            grad_u[:, portion] = padded_u.rows(grad_u_spectrum)
            for whole, part in zip(gradients, tables.backward(torch.cat(grad_kernel)), strict=True):
                whole[:, portion] = part.unflatten(0, (directions, -1))
    return [grad_u, *(gradient.flatten(0, 1) for gradient in gradients)]


@s4d_convolution.register_fake
def _(u: Tensor, *discrete: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], discrete[-1].shape[0], u.shape[2])


@s4d_convolution_backward.register_fake
def _(grad_y: Tensor, u: Tensor, *discrete: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (u, *discrete)]


def _save_inputs(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return tuple(s4d_convolution_backward(grad_y, *ctx.saved_tensors))


s4d_convolution.register_autograd(_backward, setup_context=_save_inputs)


def _convolve(padded: "_Padded", u: Tensor, spectra: Tensor, out: Tensor) -> None:
    """One transform of u (B, d, L), a product and a transform back per direction, into out (B, dirs, d, L)."""
    u_spectrum = padded.spectrum(u)
    for direction, spectrum in enumerate(spectra):
        out[:, direction] = padded.rows(u_spectrum * spectrum)


def _transfer(spectra: Tensor, directions: int) -> Tensor:
    """Spectra of kernels (directions * d, F) to what the spectrum of u is multiplied by (directions, d, F).

    An anticausal convolution is a correlation with the kernel: its conjugate spectrum.
    """
    spectra = spectra.unflatten(0, (directions, -1))
    for backward in spectra[1:]:
        backward.conj_physical_()
    return spectra


class _Padded:
    """Transforms of rows (..., L) padded to a length in which convolutions do not wrap around."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype, self.n = length, dtype, padded_length(length)
        self.buffer: Tensor | None = None  # its zeros are written once

    def spectrum(self, rows: Tensor) -> Tensor:
        if self.buffer is None or self.buffer.shape[:-1] != rows.shape[:-1]:
            self.buffer = torch.zeros(*rows.shape[:-1], self.n, dtype=self.dtype, device=rows.device)
        self.buffer[..., : self.length] = rows
        return torch.fft.rfft(self.buffer)

    def rows(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum, n=self.n)[..., : self.length]


def _portions(u: Tensor) -> Iterator[slice]:
    """Slices of the channels of u (B, D, L)."""
    batch, d_model, length = u.shape
    if not u.numel():
        raise ValueError(f"u has shape {list(u.shape)}: there is nothing to convolve")
    budget = GPU_PORTION if u.is_cuda else CPU_PORTION
    most = max(LEAST_PORTION, budget // (batch * padded_length(length) * _working_dtype(u).itemsize))
    size = math.ceil(d_model / math.ceil(d_model / most))  # portions of one size, or nearly
    for start in range(0, d_model, size):
        yield slice(start, min(start + size, d_model))


def _working_dtype(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


class _Tables:
    """The kernel by splitting l = a P + b, so that Abar^l = Abar^(aP) Abar^b, a < Q, b < P.

    Two tables of about sqrt(L) powers and real matrix products replace L complex exponentials, and the
    gradient has the same form.
    """

    def __init__(self, discrete: Discrete, length: int, dtype: torch.dtype) -> None:
        self.length, self.skip = length, discrete.skip.to(dtype)
        self.P = math.ceil(math.sqrt(length))
        self.Q = math.ceil(length / self.P)
        self.weight = Pair(discrete.weight_real.to(dtype), discrete.weight_imag.to(dtype))
        self.fine = _powers(discrete, 1, self.P, dtype)  # (P, channels, pairs)
        self.coarse = _powers(discrete, self.P, self.Q, dtype)  # (Q, channels, pairs)

    def kernel(self) -> Tensor:
        """K (channels, L)."""
        left = multiply(self.coarse, self.weight)
        kernel = torch.bmm(left.real.transpose(0, 1), self.fine.real.permute(1, 2, 0))
        kernel.baddbmm_(left.imag.transpose(0, 1), self.fine.imag.permute(1, 2, 0), alpha=-1)
        kernel = kernel.mul_(2).flatten(1)[:, : self.length]
        kernel[:, 0] += self.skip
        return kernel

    def backward(self, grad_kernel: Tensor) -> Discrete:
        """The gradient of `Discrete`, from the moments sum_l g_l Abar^l and sum_l l g_l Abar^l; uses up `fine`."""
        rows = torch.nn.functional.pad(grad_kernel, (0, self.P * self.Q - self.length))
        rows = rows.unflatten(1, (self.Q, self.P))
        b, aP = (
            step * torch.arange(count, device=rows.device, dtype=rows.dtype)[:, None, None]
            for step, count in ((1, self.P), (self.P, self.Q))
        )
        # sums over b, (Q, channels, pairs): of g Abar^b, of g b Abar^b, and with aP of g l Abar^b
        plain = Pair(*(torch.bmm(rows, part.transpose(0, 1)).transpose(0, 1) for part in self.fine))
        by_b = Pair(*(torch.bmm(rows, part.mul_(b).transpose(0, 1)).transpose(0, 1) for part in self.fine))
        by_l = Pair(*(q.addcmul_(aP, p) for p, q in zip(plain, by_b, strict=True)))
        zeroth = Pair(*(part.sum(0) for part in multiply(self.coarse, plain)))
        first = Pair(*(part.sum(0) for part in multiply(self.coarse, by_l)))
        slope = multiply(self.weight, first)
        return Discrete(2 * slope.real, -2 * slope.imag, 2 * zeroth.real, -2 * zeroth.imag, grad_kernel[:, 0])


class Pair(NamedTuple):
    """A complex tensor as two real ones, whose products run at the speed of real arithmetic."""

    real: Tensor
    imag: Tensor


def multiply(a: Pair, b: Pair) -> Pair:
    """The complex product."""
    real = (a.real * b.real).addcmul_(a.imag, b.imag, value=-1)
    return Pair(real, (a.real * b.imag).addcmul_(a.imag, b.real))


def _powers(discrete: Discrete, step: int, count: int, dtype: torch.dtype) -> Pair:
    """Abar^(step l) for l = 0 .. count-1: (count, channels, pairs).

    By doubling: the first 2^k powers times Abar^(step 2^k), a factor squared in float64 and so exact however
    many turns it is. log2(count) rounded products, and no exponential or sine per element.
    """
    radius, phase = (discrete.log_modulus * step).exp(), discrete.angle * step
    factor = Pair(radius * phase.cos(), radius * phase.sin())
    powers = Pair(*(torch.empty(count, *phase.shape, dtype=dtype, device=phase.device) for _ in range(2)))
    powers.real[0], powers.imag[0] = 1, 0
    have = 1
    while have < count:
        more = min(have, count - have)
        a, b = Pair(*(part[:more] for part in powers)), Pair(*(part.to(dtype) for part in factor))
        out = Pair(*(part[have : have + more] for part in powers))
        torch.mul(a.real, b.real, out=out.real).addcmul_(a.imag, b.imag, value=-1)
        torch.mul(a.real, b.imag, out=out.imag).addcmul_(a.imag, b.real)
        factor, have = multiply(factor, factor), have + more
    return powers
