"""The suites: which subjects are measured together, at which lengths, and what is expected of them.

layer         S4D, textbook S4D, attention: (B, L, D) as a layer sees it
convolution   S4D and textbook S4D in channel-major order (B, D, L)
block         DiffuSSM block, with the textbook layer, with none, and DiT block
model         DiffuSSM, DiT and diffusers' DiT of the same width on the same tokens
dit           DiT and diffusers' DiT with patches of 2
sampling      a denoising step and a layer with spectra kept from step to step, and without
gemm          large matrix products
xl            DiffuSSM-XL, DiT-XL/2 and DiT-XL with patches of 1, for a GPU
data          latents and photographs as the loader brings them (loading.py)
trainer       the trainer and a bare loop on the same model and data (training.py)
evaluation    Inception's features and Frechet distances (evaluating.py)
scaling       DiffuSSM and DiT with patches of 1 and 2 in sizes S, L, XL as images grow (scaling.py)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from diffussm.bench.baselines import Attention, DiffusersDiT, MatrixProduct, NoSSM, TextbookS4D
from diffussm.bench.evaluating import (
    AREA,
    CHANNELS_LAST,
    DIM,
    DISTANCE,
    FEATURES,
    FIDELITY,
    SQRTM,
    measure_evaluation,
)
from diffussm.bench.loading import FOLDER, LATENT_AREA, LATENTS, PHOTOGRAPH_AREA, TORCHVISION, measure_loading
from diffussm.bench.scaling import Cost, measure_scaling
from diffussm.bench.training import BARE, TOKENS, TRAINER, measure_trainer
from diffussm.bench.workload import Measurement, Phase, Setup, Skip, Subject, measure_group
from diffussm.build import create_model
from diffussm.models import S4D

GEMM, OWN_GEMM = "matrix product", "matrix product of a layer"
GEMM_SIDE = 2048
S4D_LAYER, TEXTBOOK, ATTENTION = "S4D", "textbook S4D", "attention"
DIFFUSSM, DIT, DIFFUSERS = "DiffuSSM", "DiT", "diffusers DiT"
BLOCK, TEXTBOOK_BLOCK, BARE_BLOCK, DIT_BLOCK = (
    "DiffuSSM block", "DiffuSSM block, textbook S4D", "DiffuSSM block, no SSM", "DiT block",
)  # fmt: skip
CACHED, UNCACHED = "spectra kept", "spectra anew"
DIFFUSSM_XL, DIT_XL_2, DIT_XL_1 = "DiffuSSM-XL", "DiT-XL/2", "DiT-XL/1"

Module = TypeVar("Module", bound=nn.Module)
Quantity = Literal["time", "memory", "dense rate", "exponent", "throughput"]


@dataclass(frozen=True)
class Comparison:
    """What one subject is to another in a phase of a suite.

    time, memory: how many times less the subject takes. dense rate: its share of the other's floating-point
    rate, dense layers only ("" for the GPU's published peak). exponent: of its time in the length, from 1024
    tokens on. throughput: images per second.
    `goals` are by length, 0 for all lengths together; at least so much, for exponents at most.
    """

    suite: str
    phase: Phase
    quantity: Quantity
    subject: str
    against: str = ""
    goals: Mapping[int, float] | None = None


TRAIN: Phase = "training step"
COMPARISONS = (
    Comparison("layer", TRAIN, "time", S4D_LAYER, TEXTBOOK, {1024: 12, 4096: 12}),
    Comparison("layer", TRAIN, "memory", S4D_LAYER, TEXTBOOK, {1024: 5, 4096: 5}),
    Comparison("layer", TRAIN, "time", S4D_LAYER, ATTENTION, {4096: 5}),
    Comparison("layer", TRAIN, "exponent", S4D_LAYER, goals={0: 1.1}),
    Comparison("layer", TRAIN, "exponent", ATTENTION),
    Comparison("layer", "forward", "time", S4D_LAYER, TEXTBOOK),
    Comparison("layer", "forward", "memory", S4D_LAYER, TEXTBOOK),
    Comparison("layer", "forward", "time", S4D_LAYER, ATTENTION),
    Comparison("convolution", TRAIN, "time", S4D_LAYER, TEXTBOOK, {1024: 18, 4096: 22, 16384: 28}),
    Comparison("convolution", TRAIN, "memory", S4D_LAYER, TEXTBOOK, {1024: 6, 4096: 12, 16384: 20}),
    Comparison("convolution", TRAIN, "exponent", S4D_LAYER, goals={0: 1.1}),
    Comparison("convolution", "forward", "time", S4D_LAYER, TEXTBOOK),
    Comparison("block", TRAIN, "time", BLOCK, TEXTBOOK_BLOCK, {1024: 5}),
    Comparison("block", TRAIN, "time", BLOCK, DIT_BLOCK, {1024: 1.7}),
    Comparison("block", TRAIN, "time", BLOCK, BARE_BLOCK),
    Comparison("block", TRAIN, "memory", BLOCK, DIT_BLOCK),
    Comparison("block", TRAIN, "dense rate", BLOCK, GEMM),
    Comparison("block", TRAIN, "exponent", BLOCK),
    Comparison("block", TRAIN, "exponent", DIT_BLOCK),
    Comparison("block", "forward", "time", BLOCK, DIT_BLOCK),
    Comparison("model", TRAIN, "dense rate", DIFFUSSM, GEMM, {1024: 0.6}),
    Comparison("model", TRAIN, "time", DIFFUSSM, DIT),
    Comparison("model", TRAIN, "time", DIFFUSSM, DIFFUSERS),
    Comparison("model", TRAIN, "memory", DIFFUSSM, DIT),
    Comparison("model", TRAIN, "exponent", DIFFUSSM),
    Comparison("model", TRAIN, "exponent", DIT),
    Comparison("model", "forward", "time", DIFFUSSM, DIT),
    Comparison("dit", TRAIN, "time", DIT, DIFFUSERS, {256: 1.0, 1024: 1.0}),
    Comparison("dit", TRAIN, "memory", DIT, DIFFUSERS),
    Comparison("dit", "forward", "time", DIT, DIFFUSERS),
    Comparison("sampling", "forward", "time", f"{S4D_LAYER}, {CACHED}", f"{S4D_LAYER}, {UNCACHED}", {1024: 1.5}),
    Comparison("sampling", "forward", "time", f"{DIFFUSSM}, {CACHED}", f"{DIFFUSSM}, {UNCACHED}"),
    Comparison("gemm", "forward", "dense rate", OWN_GEMM, GEMM),
    Comparison("xl", TRAIN, "dense rate", DIFFUSSM_XL, goals={1024: 0.45, 4096: 0.45}),
    Comparison("xl", TRAIN, "dense rate", DIFFUSSM_XL, GEMM),
    Comparison("xl", TRAIN, "time", DIFFUSSM_XL, DIT_XL_2),
    Comparison("xl", TRAIN, "time", DIFFUSSM_XL, DIT_XL_1, {4096: 1.0}),
    Comparison("data", "loading", "throughput", LATENTS, goals={LATENT_AREA: 20_000}),
    Comparison("data", "loading", "throughput", FOLDER),
    Comparison("data", "loading", "time", FOLDER, TORCHVISION, {PHOTOGRAPH_AREA: 1.0}),
    Comparison("trainer", TRAIN, "time", TRAINER, BARE, {TOKENS: 0.97}),
    Comparison("evaluation", "features", "throughput", FEATURES),
    Comparison("evaluation", "features", "time", FEATURES, FIDELITY, {AREA: 1.0}),
    Comparison("evaluation", "features", "time", CHANNELS_LAST, FIDELITY, {AREA: 1.0}),
    Comparison("evaluation", "distance", "time", DISTANCE, SQRTM, {DIM: 2.0}),
    Comparison("scaling", "forward", "time", "DiffuSSM-S", "DiT-S/1"),
    Comparison("scaling", "forward", "time", "DiffuSSM-L", "DiT-L/1"),
    Comparison("scaling", "forward", "time", "DiffuSSM-XL", "DiT-XL/1"),
    Comparison("scaling", "forward", "exponent", "DiffuSSM-XL"),
    Comparison("scaling", "forward", "exponent", "DiT-XL/1"),
    Comparison("scaling", "forward", "exponent", "DiT-XL/2"),
)


def run_suites(
    names: Sequence[str], setup: Setup, note: Callable[[str], None]
) -> Iterator[Measurement | Skip | Cost]:
    """Measure the suites, each at all lengths from the shortest on; `note` is told what comes next."""
    latest: dict[tuple[str, Phase, str], Measurement] = {}
    for suite in names:
        if suite == "data":
            yield from measure_loading(setup, note)
            continue
        if suite == "trainer":
            yield from measure_trainer(setup, note)
            continue
        if suite == "evaluation":
            yield from measure_evaluation(setup, note)
            continue
        if suite == "scaling":
            yield from measure_scaling(setup, note)
            continue
        maker, phases, most = SUITES[suite]
        for length in sorted(setup.lengths):
            if length > most:
                continue
            for phase in phases:
                subjects = []
                for subject in maker(setup, length):
                    before = latest.get((suite, phase, subject.name))
                    expected = _at_most(before, length)
                    if expected > setup.call_limit_seconds:
                        reason = f"may take {expected:.0f} s, call_limit_seconds={setup.call_limit_seconds:g}"
                        yield Skip(suite, phase, subject.name, length, reason)
                    else:
                        subjects.append(subject)
                note(f"{suite}, {phase}, {length} tokens: {', '.join(subject.name for subject in subjects)}")
                for result in measure_group(suite, phase, length, subjects, setup):
                    if isinstance(result, Measurement):
                        latest[suite, phase, result.subject] = result
                    yield result


def _at_most(before: Measurement | None, length: int) -> float:
    """Seconds of a call if its cost is quadratic."""
    return before.timing.seconds * (length / before.length) ** 2 if before else 0.0


def _layer(setup: Setup, length: int) -> list[Subject]:
    def inputs(device: torch.device) -> list[Tensor]:
        return [_tokens(setup, length, device)]

    return [
        Subject(S4D_LAYER, lambda device: (_s4d(setup, device), inputs(device))),
        Subject(TEXTBOOK, lambda device: (TextbookS4D(_s4d(setup, device)), inputs(device))),
        Subject(ATTENTION, lambda device: (_place(device, lambda: Attention(setup.hidden_size)), inputs(device))),
    ]


class _Convolution(nn.Module):
    """The convolution of a layer alone, in channel-major order."""

    def __init__(self, layer: S4D | TextbookS4D) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        return self.layer.convolve(u)


def _convolution(setup: Setup, length: int) -> list[Subject]:
    def inputs(device: torch.device) -> list[Tensor]:
        shape = (setup.batch_size, setup.hidden_size, length)
        return [torch.randn(shape, device=device, requires_grad=True)]

    return [
        Subject(S4D_LAYER, lambda device: (_Convolution(_s4d(setup, device)), inputs(device))),
        Subject(TEXTBOOK, lambda device: (_Convolution(TextbookS4D(_s4d(setup, device))), inputs(device))),
    ]


def _block(setup: Setup, length: int) -> list[Subject]:
    def inputs(device: torch.device) -> list[Tensor]:
        condition = torch.randn(setup.batch_size, setup.hidden_size, device=device)
        return [_tokens(setup, length, device), condition]

    def diffussm_block(device: torch.device, ssm: Callable[[S4D], nn.Module]) -> nn.Module:
        block: nn.Module = _diffussm(setup, device, depth=1).get_submodule("blocks.0")
        block.ssm = ssm(block.ssm)  # type: ignore[arg-type]
        return block

    def dit_block(device: torch.device) -> nn.Module:
        return _dit(setup, device, length, patch_size=1, depth=1).get_submodule("blocks.0")

    return [
        Subject(BLOCK, lambda device: (diffussm_block(device, lambda layer: layer), inputs(device))),
        Subject(TEXTBOOK_BLOCK, lambda device: (diffussm_block(device, TextbookS4D), inputs(device))),
        Subject(BARE_BLOCK, lambda device: (diffussm_block(device, lambda layer: NoSSM()), inputs(device))),
        Subject(DIT_BLOCK, lambda device: (dit_block(device), inputs(device))),
        _gemm_subject(),
    ]


def _model(setup: Setup, length: int) -> list[Subject]:
    depth = max(1, setup.depth - 1)  # DiffuSSM presets have one block more than DiT's

    def inputs(device: torch.device) -> list[Tensor]:
        return _latents(setup, length, 1, device)

    return [
        Subject(DIFFUSSM, lambda device: (_diffussm(setup, device, setup.depth), inputs(device))),
        Subject(DIT, lambda device: (_dit(setup, device, length, 1, depth), inputs(device))),
        Subject(DIFFUSERS, lambda device: (_diffusers_dit(setup, device, length, 1, depth), inputs(device))),
        _gemm_subject(),
    ]


def _dit_suite(setup: Setup, length: int) -> list[Subject]:
    depth = max(1, setup.depth - 1)

    def inputs(device: torch.device) -> list[Tensor]:
        return _latents(setup, length, 2, device)

    return [
        Subject(DIT, lambda device: (_dit(setup, device, length, 2, depth), inputs(device))),
        Subject(DIFFUSERS, lambda device: (_diffusers_dit(setup, device, length, 2, depth), inputs(device))),
    ]


def _sampling(setup: Setup, length: int) -> list[Subject]:
    def layer(device: torch.device, frozen: bool) -> tuple[nn.Module, list[Tensor]]:
        return _s4d(setup, device).eval().requires_grad_(not frozen), [_tokens(setup, length, device)]

    def model(device: torch.device, frozen: bool) -> tuple[nn.Module, list[Tensor]]:
        network = _diffussm(setup, device, setup.depth).eval().requires_grad_(not frozen)
        return network, _latents(setup, length, 1, device)

    # Layers keep spectra where their parameters cannot change under them: frozen, in eval mode, without grad.
    return [
        Subject(f"{DIFFUSSM}, {CACHED}", lambda device: model(device, frozen=True)),
        Subject(f"{DIFFUSSM}, {UNCACHED}", lambda device: model(device, frozen=False)),
        Subject(f"{S4D_LAYER}, {CACHED}", lambda device: layer(device, frozen=True)),
        Subject(f"{S4D_LAYER}, {UNCACHED}", lambda device: layer(device, frozen=False)),
    ]


def _gemm(setup: Setup, length: int) -> list[Subject]:
    def build(device: torch.device) -> tuple[nn.Module, list[Tensor]]:
        left = torch.randn(setup.batch_size * length, setup.hidden_size, device=device)
        return MatrixProduct(), [left, torch.randn(setup.hidden_size, setup.hidden_size, device=device)]

    return [_gemm_subject(), Subject(OWN_GEMM, build)]


def _xl(setup: Setup, length: int) -> list[Subject]:
    side = math.isqrt(length)

    def model(device: torch.device, name: str, **overrides: int) -> tuple[nn.Module, list[Tensor]]:
        return _create(device, name, **overrides), _latents(setup, length, 1, device)

    return [
        Subject(DIFFUSSM_XL, lambda device: model(device, "diffussm_xl")),
        Subject(DIT_XL_2, lambda device: model(device, "dit_xl_2", input_size=side)),
        Subject(DIT_XL_1, lambda device: model(device, "dit_xl_2", input_size=side, patch_size=1)),
        _gemm_subject(),
    ]


def _gemm_subject() -> Subject:
    def build(device: torch.device) -> tuple[nn.Module, list[Tensor]]:
        return MatrixProduct(), [torch.randn(GEMM_SIDE, GEMM_SIDE, device=device) for _ in range(2)]

    return Subject(GEMM, build)


def _s4d(setup: Setup, device: torch.device) -> S4D:
    return _place(device, lambda: S4D(setup.hidden_size, setup.d_state))


def _diffussm(setup: Setup, device: torch.device, depth: int) -> nn.Module:
    return _create(device, "diffussm_s", hidden_size=setup.hidden_size, d_state=setup.d_state, depth=depth)


def _dit(setup: Setup, device: torch.device, length: int, patch_size: int, depth: int) -> nn.Module:
    return _create(
        device,
        "dit_s_2",
        input_size=math.isqrt(length) * patch_size,
        patch_size=patch_size,
        hidden_size=setup.hidden_size,
        depth=depth,
        num_heads=setup.hidden_size // 64,
    )


def _diffusers_dit(setup: Setup, device: torch.device, length: int, patch_size: int, depth: int) -> nn.Module:
    side = math.isqrt(length) * patch_size
    return _place(device, lambda: DiffusersDiT(side, patch_size, setup.hidden_size, depth))


def _create(device: torch.device, name: str, **overrides: int) -> nn.Module:
    return _place(device, lambda: create_model(name, **overrides))


def _place(device: torch.device, make: Callable[[], Module]) -> Module:
    """Make a module on a device, whatever device its constructor has in mind."""
    with torch.device(device):
        module = make()
    return module if device.type == "cpu" else module.to(device)


def _tokens(setup: Setup, length: int, device: torch.device) -> Tensor:
    return torch.randn(setup.batch_size, length, setup.hidden_size, device=device, requires_grad=True)


def _latents(setup: Setup, length: int, patch_size: int, device: torch.device) -> list[Tensor]:
    """x_t of so many tokens, t and y."""
    side = math.isqrt(length) * patch_size
    x_t = torch.randn(setup.batch_size, 4, side, side, device=device)
    t, y = (torch.randint(1000, (setup.batch_size,), device=device) for _ in range(2))
    return [x_t, t, y]


BOTH: tuple[Phase, ...] = ("forward", TRAIN)
ANY_LENGTH = 2**62
# name -> subjects, phases, greatest length
SUITES: dict[str, tuple[Callable[[Setup, int], list[Subject]], tuple[Phase, ...], int]] = {
    "layer": (_layer, BOTH, ANY_LENGTH),
    "convolution": (_convolution, BOTH, ANY_LENGTH),
    "block": (_block, BOTH, ANY_LENGTH),
    "model": (_model, BOTH, ANY_LENGTH),
    "dit": (_dit_suite, BOTH, 4096),
    "sampling": (_sampling, ("forward",), 4096),
    "gemm": (_gemm, ("forward",), ANY_LENGTH),
    "xl": (_xl, BOTH, 4096),
}
