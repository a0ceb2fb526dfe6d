"""S4D: a diagonal state-space model as a convolution over the sequence.

    x'(s) = A x(s) + B u(s),   y(s) = 2 Re(C x(s)) + D u(s)          A diagonal, Re A < 0

discretised with step dt to x_l = Abar x_{l-1} + Bbar u_l, whose impulse response is the kernel
K_l = 2 Re(sum_n C_n Bbar_n Abar_n^l). `S4D` is the layer in its two equal views, convolution and recurrence;
below it stand the initial state matrices and the discretisation. The convolution itself is in `convolution`.

Complex parameters are kept as pairs of reals, so that they survive every optimiser and checkpoint format.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from diffussm.models.convolution import (
    Discrete,
    Pair,
    convolve_spectra,
    full_precision,
    make_kernel,
    make_spectra,
    multiply,
    s4d_convolution,
)
from diffussm.models.layers import require_choice, require_positive, tag

Direction = Literal["forward", "backward"]
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
        require_positive(d_model=d_model)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state}: must be even and at least 2 (it counts conjugate pairs)")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: must satisfy 0 < dt_min <= dt_max")
        require_choice("discretization", discretization, Discretization)
        require_choice("init", init, Init)
        self.d_model, self.bidirectional, self.discretization = d_model, bidirectional, discretization
        self._spectra: tuple[object, list[Tensor], Tensor] | None = None
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
        return self.convolve(u.transpose(1, 2)).transpose(1, 2)

    def convolve(self, u: Float[Tensor, "B D L"]) -> Float[Tensor, "B channels L"]:
        """The layer in channel-major layout, as `forward` computes it.

        An fp32 island, whatever autocast says: FFTs have no bf16, and half-precision kernels lose the long
        memory that dt of 1e-3 stands for. Once the layer is frozen (no parameter requires a gradient, eval
        mode, gradients off), the kernels' spectra are kept from call to call until a parameter changes; only
        in-place writing through `parameter.data` escapes notice. Compiled layers keep none.
        """
        frozen = not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling())
        if frozen and not any(parameter.requires_grad for parameter in self.parameters()):
            spectra = self._frozen_spectra(u)
            return convolve_spectra(u, spectra)
        if not torch.compiler.is_compiling():
            self.forget_spectra()  # training goes on: fused optimisers change parameters without a trace
        return s4d_convolution(u, *self.discretize())

    def kernel(self, length: int) -> Float[Tensor, "channels L"]:
        """The impulse responses K_0..K_{L-1} of every channel, fp32 (float64 if the parameters are).

        K_0 includes the skip D, which is an impulse response at lag 0 like any other. Without gradients.
        """
        with torch.no_grad(), full_precision(self.C.device):
            return make_kernel(self.discretize(), length, torch.promote_types(self.C.dtype, torch.float32))

    def recurrence(self, u: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D_out"]:
        """The same map by the state equation, one position after the other: slow, for tests and insight."""
        y = [self._scan(u, "forward")]
        if self.bidirectional:
            y.append(self._scan(u.flip(1), "backward").flip(1))
        return torch.cat(y, dim=-1)

    def _scan(self, u: Tensor, direction: Direction) -> Tensor:
        state, outputs = self.initial_state(len(u), u.dtype), []
        discrete = self._discretize_direction(direction)
        for u_l in u.unbind(1):
            y_l, state = _step(discrete, state, u_l)
            outputs.append(y_l)
        return torch.stack(outputs, dim=1)

    def initial_state(self, batch_size: int, dtype: torch.dtype = torch.float32) -> Complex[Tensor, "B D pairs"]:
        """The state x before the first position: zero."""
        shape = batch_size, self.d_model, self.A_imag.shape[1]
        return torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=self.C.device) * 1j

    def step(
        self, state: Complex[Tensor, "B D pairs"], u: Float[Tensor, "B D"], direction: Direction = "forward"
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D pairs"]]:
        """One position: x_l = Abar x_{l-1} + u_l, y_l = 2 Re(C Bbar x_l) + D u_l; returns (y_l, x_l).

        The state is that of the system with Bbar = 1 (C carries it). `direction="backward"` steps the
        second half of a bidirectional layer, which is to be fed from the end of the sequence.
        """
        return _step(self._discretize_direction(direction), state, u)

    def _discretize_direction(self, direction: Direction) -> Discrete:
        if direction == "backward" and not self.bidirectional:
            raise ValueError("direction=backward: this layer is unidirectional")
        start = self.d_model if direction == "backward" else 0
        return Discrete(*(part[start : start + self.d_model] for part in self.discretize()))

    def discretize(self) -> Discrete:
        """Abar (as a logarithm) and C Bbar by zero-order hold or the bilinear rule, in float64, and D."""
        # float64 costs nothing at (channels, N/2) and makes the kernel exact for long sequences.
        dt = self.log_dt.double().exp()[:, None]
        A_real, A_imag = -self.log_A_real.double().exp(), self.A_imag.double()
        log_modulus, angle, gain = _discretize(A_real, A_imag, dt, self.discretization)
        weight = multiply(Pair(*self.C.double().unbind(-1)), gain)
        if self.B is not None:
            weight = multiply(weight, Pair(*self.B.double().unbind(-1)))
        return Discrete(log_modulus, angle, *weight, self.D)

    def forget_spectra(self) -> None:
        """Give back the memory of spectra that a frozen layer keeps."""
        self._spectra = None

    def train(self, mode: bool = True) -> "S4D":
        """As for every module; a layer that may be trained keeps no spectra."""
        self.forget_spectra()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spectra": None}  # copies make their own

    def _frozen_spectra(self, u: Tensor) -> Tensor:
        length, dtype = u.shape[-1], torch.promote_types(u.dtype, torch.float32)
        parameters = [parameter.detach() for parameter in self.parameters()]
        if any(parameter.is_inference() for parameter in parameters):  # whose changes leave no trace
            return self._make_spectra(length, dtype)
        # In-place changes raise a tensor's version, and replacements have another address, for what is kept
        # beside the spectra holds on to the old one.
        versions = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        key = length, dtype, u.device, self.discretization, versions
        if self._spectra is None or self._spectra[0] != key:
            self._spectra = key, parameters, self._make_spectra(length, dtype)
        return self._spectra[2]

    def _make_spectra(self, length: int, dtype: torch.dtype) -> Tensor:
        with full_precision(self.C.device):
            return make_spectra(self.discretize(), self.d_model, length, dtype)


def _step(discrete: Discrete, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    Abar = torch.polar(discrete.log_modulus.exp(), discrete.angle).to(state.dtype)
    weight = torch.complex(discrete.weight_real, discrete.weight_imag).to(state.dtype)
    state = Abar * state + u[..., None]
    return (2 * (weight * state).sum(-1).real + discrete.skip * u).to(u.dtype), state


def initial_A_imag(init: Init, d_state: int) -> Float[Tensor, "pairs"]:
    """Im A of the conjugate pairs: S4D-Lin pi n, S4D-Inv N/pi (N/(2n+1) - 1), S4D-LegS' eigenvalues."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    else:
        # HiPPO-LegS is normal plus low rank; the normal part is -1/2 I + S with S skew-symmetric,
        # S_nk = -sqrt((2n+1)(2k+1)) / 2 for n > k, so i S is Hermitian with real eigenvalues.
        root = (2 * torch.arange(d_state, dtype=torch.float64) + 1).sqrt()
        lower = torch.tril(torch.outer(root, root) / 2, diagonal=-1)
        imag = torch.linalg.eigvalsh(1j * (lower.T - lower))[d_state // 2 :]
    return imag.float()


def _discretize(A_real: Tensor, A_imag: Tensor, dt: Tensor, rule: Discretization) -> tuple[Tensor, Tensor, Pair]:
    """log|Abar|, arg Abar and Bbar / B."""
    x, y = dt * A_real, dt * A_imag
    if rule == "zoh":  # Abar = exp(dt A), Bbar = (Abar - 1) / A B
        # exp(x) cos(y) - 1 without cancellation for small x and y
        numerator = Pair(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
        norm = A_real.square() + A_imag.square()
        inverse_A = Pair(A_real / norm, -A_imag / norm)
        return x, y, multiply(numerator, inverse_A)
    # bilinear: Abar = (1 + z/2) / (1 - z/2), Bbar = dt / (1 - z/2) B, with z = dt A
    norm = (1 - x / 2).square() + (y / 2).square()
    modulus_squared_minus_one = (2 * x / norm).clamp_min(-1 + 1e-12)  # Abar = 0 has no logarithm
    angle = torch.atan2(y / 2, 1 + x / 2) + torch.atan2(y / 2, 1 - x / 2)
    return modulus_squared_minus_one.log1p() / 2, angle, Pair(dt * (1 - x / 2) / norm, dt * y / 2 / norm)
