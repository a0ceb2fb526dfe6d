"""S4D: a diagonal state-space model as a convolution over the sequence.

    x'(s) = A x(s) + B u(s),   y(s) = 2 Re(C x(s)) + D u(s)          A diagonal, Re A < 0

discretised with step dt to x_l = Abar x_{l-1} + Bbar u_l, whose impulse response is the kernel
K_l = 2 Re(sum_n C_n Bbar_n Abar_n^l). `S4D` is the layer; below it stand the initial state matrices,
the discretisation, the kernel and the convolution, in the order in which a forward pass needs them.

Complex numbers are kept as pairs of reals: parameters survive every optimiser and checkpoint format,
and all heavy work (`_kernel`) is a real matrix product.
"""

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffussm.models.layers import tag

Init = Literal["lin", "inv", "legs"]
Discretization = Literal["zoh", "bilinear"]


class S4D(nn.Module):
    """Diagonal state-space layer (S4D), forward and backward in time, with a skip connection D.

    Maps (B, L, D) to (B, L, 2D) when bidirectional: first the D causal outputs, where position l sees
    0..l, then the D anticausal ones, where it sees l..L-1. Unidirectional: the causal half only.

    Args:
        d_model: channels D, each with a state-space model of its own per direction.
        d_state: state size N; even, held as N/2 conjugate pairs.
        init: Im A of S4D-Lin, S4D-Inv or S4D-LegS; Re A starts at -1/2 in all three.
        dt_min, dt_max: range of the log-uniform initial step sizes.
        learn_B: make B a parameter (it starts at 1) instead of leaving its role to C.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        bidirectional: bool = True,
        init: Init = "lin",
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learn_B: bool = True,
    ) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state}: must be even and at least 2 (it counts conjugate pairs)")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: must satisfy 0 < dt_min <= dt_max")
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization={discretization!r}: choose zoh or bilinear")
        self.d_model, self.bidirectional, self.discretization = d_model, bidirectional, discretization
        channels, pairs = d_model * (2 if bidirectional else 1), d_state // 2

        log_dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max))
        self.log_dt = tag(nn.Parameter(log_dt), "ssm")
        self.log_A_real = tag(nn.Parameter(torch.full((channels, pairs), math.log(0.5))), "ssm")
        self.A_imag = tag(nn.Parameter(initial_A_imag(init, d_state).repeat(channels, 1)), "ssm")
        B = torch.tensor([1.0, 0.0]).repeat(channels, pairs, 1)
        self.B = tag(nn.Parameter(B), "ssm") if learn_B else None
        self.C = tag(nn.Parameter(torch.randn(channels, pairs, 2) * math.sqrt(0.5)), "no_decay")
        self.D = tag(nn.Parameter(torch.ones(channels)), "no_decay")

    def forward(self, u: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D_out"]:
        # An fp32 island: FFTs have no bf16, and half-precision kernels lose the long memory that dt of
        # 1e-3 stands for. CUDA autocast, unlike the CPU's, does not protect FFTs by itself.
        with torch.autocast(u.device.type, enabled=False):
            kernel = self.kernel(u.shape[1])
            x = rearrange(u, "b l d -> b d l").to(kernel.dtype)
            y = convolve(x, kernel)
        return rearrange(y, "b d l -> b l d").to(u.dtype)

    def kernel(self, length: int) -> Float[Tensor, "channels L"]:
        """The impulse responses K_0..K_{L-1} of every channel, fp32 (float64 if the parameters are).

        K_0 includes the skip D, which is an impulse response at lag 0 like any other.
        """
        kernel = _kernel(self.discretize(), length, torch.promote_types(self.C.dtype, torch.float32))
        return torch.cat([kernel[:, :1] + self.D[:, None], kernel[:, 1:]], dim=1)

    def discretize(self) -> "Discrete":
        """Abar (as a logarithm) and C Bbar by zero-order hold or the bilinear rule, in float64."""
        # float64 costs nothing at (channels, N/2) and makes the kernel exact for long sequences.
        dt = self.log_dt.double().exp()[:, None]
        A_real, A_imag = -self.log_A_real.double().exp(), self.A_imag.double()
        log_modulus, angle, gain = _discretize(A_real, A_imag, dt, self.discretization)
        C = _Complex(*self.C.double().unbind(-1))
        weight = _multiply(C, gain)
        if self.B is not None:
            weight = _multiply(weight, _Complex(*self.B.double().unbind(-1)))
        return Discrete(log_modulus, angle, *weight)


class _Complex(NamedTuple):
    real: Tensor
    imag: Tensor


class Discrete(NamedTuple):
    """Abar = exp(log_modulus + i angle) and weight = C Bbar, each (channels, N/2)."""

    log_modulus: Tensor
    angle: Tensor
    weight_real: Tensor
    weight_imag: Tensor


def initial_A_imag(init: Init, d_state: int) -> Float[Tensor, "pairs"]:
    """Im A of the conjugate pairs: S4D-Lin pi n, S4D-Inv N/pi (N/(2n+1) - 1), S4D-LegS' eigenvalues."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    elif init == "legs":
        # HiPPO-LegS is normal plus low rank; the normal part is -1/2 I + S with S skew-symmetric,
        # S_nk = -sqrt((2n+1)(2k+1)) / 2 for n > k, so i S is Hermitian with real eigenvalues.
        root = (2 * torch.arange(d_state, dtype=torch.float64) + 1).sqrt()
        lower = torch.tril(torch.outer(root, root) / 2, diagonal=-1)
        imag = torch.linalg.eigvalsh(1j * (lower.T - lower))[d_state // 2 :]
    else:
        raise ValueError(f"init={init!r}: choose lin, inv or legs")
    return imag.float()


def _discretize(
    A_real: Tensor, A_imag: Tensor, dt: Tensor, rule: Discretization
) -> tuple[Tensor, Tensor, _Complex]:
    """log|Abar|, arg Abar and Bbar / B."""
    x, y = dt * A_real, dt * A_imag
    if rule == "zoh":  # Abar = exp(dt A), Bbar = (Abar - 1) / A B
        # exp(x) cos(y) - 1 without cancellation for small x and y
        numerator = _Complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
        norm = A_real.square() + A_imag.square()
        inverse_A = _Complex(A_real / norm, -A_imag / norm)
        return x, y, _multiply(numerator, inverse_A)
    # bilinear: Abar = (1 + z/2) / (1 - z/2), Bbar = dt / (1 - z/2) B, with z = dt A
    norm = (1 - x / 2).square() + (y / 2).square()
    modulus_squared_minus_one = (2 * x / norm).clamp_min(-1 + 1e-12)  # Abar = 0 has no logarithm
    angle = torch.atan2(y / 2, 1 + x / 2) + torch.atan2(y / 2, 1 - x / 2)
    return modulus_squared_minus_one.log1p() / 2, angle, _Complex(dt * (1 - x / 2) / norm, dt * y / 2 / norm)


def _kernel(discrete: Discrete, length: int, dtype: torch.dtype) -> Float[Tensor, "channels L"]:
    """K_l = 2 Re(weight Abar^l) by splitting l = a P + b, so that Abar^l = Abar^(aP) Abar^b.

    Two tables of about sqrt(L) powers and one real matrix product replace L complex exponentials.
    """
    P = math.ceil(math.sqrt(length))
    Q = math.ceil(length / P)
    device = discrete.angle.device
    fine = _powers(discrete, torch.arange(P, device=device), dtype)
    coarse = _powers(discrete, P * torch.arange(Q, device=device), dtype)
    weight = _Complex(*(part[..., None].to(dtype) for part in (discrete.weight_real, discrete.weight_imag)))
    left = _multiply(weight, coarse)
    rows = torch.cat([left.real, -left.imag], dim=1).transpose(1, 2)  # (channels, Q, N)
    columns = torch.cat([fine.real, fine.imag], dim=1)  # (channels, N, P)
    return 2 * (rows @ columns).flatten(1)[:, :length]


def _powers(discrete: Discrete, exponents: Tensor, dtype: torch.dtype) -> _Complex:
    """Abar^l for every l in `exponents`: (channels, N/2, len(exponents))."""
    radius = (discrete.log_modulus[..., None] * exponents).to(dtype).exp()
    # Phases reach thousands of turns: reduced in float64, they survive the cast.
    phase = torch.remainder(discrete.angle[..., None] * exponents, 2 * math.pi).to(dtype)
    return _Complex(radius * phase.cos(), radius * phase.sin())


def _multiply(a: _Complex, b: _Complex) -> _Complex:
    return _Complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def convolve(u: Float[Tensor, "B D L"], kernel: Float[Tensor, "channels L"]) -> Float[Tensor, "B channels L"]:
    """Causal convolution with the first D kernels; anticausal with the next D, if there are 2D.

        y_l = sum_{s <= l} K_{l-s} u_s           and           y_l = sum_{s >= l} K_{s-l} u_s

    The second is a correlation: the conjugate spectrum. Both share one transform of the input.
    """
    d_model, length = u.shape[1], u.shape[2]
    n = 2 * length  # zero padding: circular products must not wrap around
    spectrum = torch.fft.rfft(kernel, n=n)
    transfer = torch.cat([spectrum[:d_model], spectrum[d_model:].conj()]).unflatten(0, (-1, d_model))
    y = torch.fft.irfft(torch.fft.rfft(u, n=n)[:, None] * transfer, n=n)[..., :length]
    return y.flatten(1, 2)
