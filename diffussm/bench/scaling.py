"""The suite `scaling`: what a forward pass of one image costs as images grow, of both families in every size.

The cost on paper is always told. The time is measured where it fits: of the whole model, or on a CPU, where that
would take too long, of models with few of its blocks, from which the whole follows, for all blocks are alike.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffussm.bench.memory import predicted_peak
from diffussm.bench.timing import Timing, alternate
from diffussm.bench.workload import GIB, Measurement, Setup, Skip, Workload, warm_peak
from diffussm.build import create_model
from diffussm.models.complexity import measure_complexity

PIXELS_PER_LATENT = 8  # along each side, of the usual autoencoders
FEW = (1, 3)  # blocks of the models from which a whole one is extrapolated
BYTES = {"fp32": 4, "bf16": 2}
# name -> preset, and what is replaced in it
SUBJECTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    f"DiffuSSM-{size.upper()}": (f"diffussm_{size}", {}) for size in ("s", "l", "xl")
} | {
    f"DiT-{size.upper()}/{patch}": (f"dit_{size}_2", {"patch_size": patch})
    for patch in (2, 1)
    for size in ("s", "l", "xl")
}


@dataclass(frozen=True)
class Cost:
    """What a forward pass of one image of so many pixels a side costs on paper.

    attention_macs: those of `macs` that are quadratic in the tokens. score_bytes: of the matrices of attention
    scores of one layer, where they are stored, as a fused kernel does not.
    """

    subject: str
    pixels: int
    tokens: int
    depth: int
    parameters: int
    macs: int
    ssm_flops: int
    attention_macs: int
    score_bytes: int

    @property
    def flops(self) -> int:
        """All of its floating-point operations."""
        return 2 * self.macs + self.ssm_flops


def measure_scaling(setup: Setup, note: Callable[[str], None]) -> Iterator[Cost | Measurement | Skip]:
    """All costs, then what can be measured of them, small images first."""
    costs = []
    for pixels in sorted(setup.resolutions):
        note(f"scaling, {pixels} pixels, on paper")
        for name in SUBJECTS:
            costs.append(_cost(name, pixels, setup))
            yield costs[-1]
    rates: dict[str, tuple[Cost, float]] = {}  # the latest cost, and the seconds of one block of it
    for cost in costs:
        note(f"scaling, {cost.pixels} pixels: {cost.subject}")
        yield from _measure(cost, setup, rates)


def _cost(name: str, pixels: int, setup: Setup) -> Cost:
    with torch.device("meta"):
        model: Any = _create(name, pixels)
    found = measure_complexity(model, (4, *_sides(pixels)))
    tokens = math.prod(_sides(pixels)) // model.patch_size**2
    heads = getattr(model, "num_heads", 0)
    width = model.pos_embed.shape[-1] if heads else 0
    return Cost(
        subject=name,
        pixels=pixels,
        tokens=tokens,
        depth=len(model.blocks),
        parameters=found.parameters,
        macs=found.macs,
        ssm_flops=found.ssm_flops,
        attention_macs=2 * len(model.blocks) * tokens**2 * width,
        score_bytes=heads * tokens**2 * BYTES[setup.precision],
    )


def _measure(cost: Cost, setup: Setup, rates: dict[str, tuple[Cost, float]]) -> Iterator[Measurement | Skip]:
    def skip(reason: str) -> Skip:
        return Skip("scaling", "forward", cost.subject, cost.tokens, reason)

    before = rates.get(cost.subject)
    expected = before[1] * cost.flops / before[0].flops if before else 0.0
    if expected > setup.call_limit_seconds:
        yield skip(f"a block may take {expected:.3g} s, call_limit_seconds={setup.call_limit_seconds:g}")
        return
    one = _fit(cost, setup, 1)
    if isinstance(one, str):
        yield skip(one)
        return
    start = time.perf_counter()
    one.run("forward")
    seconds = time.perf_counter() - start
    rates[cost.subject] = (cost, seconds)
    depth = cost.depth
    if setup.device.type == "cuda" or seconds * depth <= setup.seconds:
        whole = _fit(cost, setup, depth)
        if isinstance(whole, Workload):
            peak = warm_peak(whole, "forward")
            timing = alternate({"": partial(whole.run, "forward")}, setup.repetitions, setup.seconds)[""]
            yield _result(cost, timing, peak, blocks=0)
            return
        if setup.device.type == "cuda":
            yield skip(whole)
            return
    few = _fit(cost, setup, FEW[1])
    if isinstance(few, str):
        yield skip(few)
        return
    if FEW[1] * seconds > setup.call_limit_seconds:
        reason = f"{FEW[1]} blocks may take {FEW[1] * seconds:.3g} s"
        yield skip(f"{reason}, call_limit_seconds={setup.call_limit_seconds:g}")
        return
    peak = warm_peak(few, "forward")
    calls = {str(blocks): partial(module.run, "forward") for blocks, module in zip(FEW, (one, few), strict=True)}
    timings = alternate(calls, setup.repetitions, setup.seconds)
    yield _result(cost, extrapolate(timings[str(FEW[0])], timings[str(FEW[1])], depth), peak, blocks=FEW[1])


def extrapolate(least: Timing, most: Timing, depth: int) -> Timing:
    """The time of a model of `depth` blocks from those of models that have as many as FEW says."""
    low, high = FEW
    each = (most.seconds - least.seconds) / (high - low)
    spread = (most.spread + least.spread) * (depth - low) / (high - low)
    return Timing(least.seconds + (depth - low) * each, spread, min(least.repetitions, most.repetitions))


def _result(cost: Cost, timing: Timing, peak: int, blocks: int) -> Measurement:
    return Measurement(
        "scaling",
        "forward",
        cost.subject,
        cost.tokens,
        timing,
        peak,
        cost.parameters,
        2 * cost.macs,
        blocks=blocks,
    )


def _fit(cost: Cost, setup: Setup, depth: int) -> Workload | str:
    """A model of so many blocks with its inputs, or why it does not fit the memory."""
    fake = replace(setup, device=torch.device("cpu"), precision="fp32", compile=False)

    def call() -> Callable[[], None]:
        workload = _workload(cost, fake, depth)
        workload.module.requires_grad_(True)  # frozen layers keep spectra by address, which fakes do not have
        return lambda: workload.run("forward")

    need = predicted_peak(call) / GIB
    if need > setup.memory_limit_gib:
        return f"would need {need:.1f} GiB, memory_limit_gib={setup.memory_limit_gib:g}"
    return _workload(cost, setup, depth)


def _workload(cost: Cost, setup: Setup, depth: int) -> Workload:
    device = setup.device
    with torch.device(device):
        model = _create(cost.subject, cost.pixels, depth=depth)
        inputs: list[Tensor] = [torch.randn(1, 4, *_sides(cost.pixels))]
        inputs += [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    if device.type != "cpu":  # for what its constructor has put elsewhere; fake tensors cannot be moved
        model = model.to(device)
    return Workload(model.eval(), inputs, setup)


def _create(name: str, pixels: int, **overrides: int) -> nn.Module:
    preset, replaced = SUBJECTS[name]
    size = {"input_size": _sides(pixels)[0]} if preset.startswith("dit") else {}
    return create_model(preset, **{**replaced, **size, **overrides})


def _sides(pixels: int) -> tuple[int, int]:
    return pixels // PIXELS_PER_LATENT, pixels // PIXELS_PER_LATENT
