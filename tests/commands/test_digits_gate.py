"""The committed gate: digits as they should be pass it, and what goes wrong with generators fails it."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN
from torch import Tensor
from torch.nn.functional import pad

from diffussm.build import System, shipped_path
from diffussm.cli import main
from diffussm.config import GATED
from diffussm.data.images import Digits
from diffussm.evaluation.baseline import Baseline
from diffussm.evaluation.gate import Rule, judge
from diffussm.evaluation.generate import Generator

BASELINE = "diffussm:evaluation/digits_baseline.json"
Draw = Callable[[int, int], Tensor]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gate.sh"
TOLERANCES = dict(re.findall(r"gate\.(\w+)_tolerance=([\d.]+)", SCRIPT.read_text()))
RULES = {name: Rule(side, tolerance=float(TOLERANCES.get(name, 0))) for name, side in GATED.items()}
# What a tenth of the training would be: its schedules are as much shorter.
SHORTER = (
    "trainer.total_images=4k",
    "trainer.warmup_images=160",
    "trainer.decay_images=3840",
    "trainer.ema_decays=[0.95]",
)


def committed() -> Baseline:
    return Baseline.read(shipped_path(BASELINE), "gate.relative_to")


def test_each_committed_result_passes_by_the_others():
    results = committed().results
    assert len(results) >= 5
    for number, result in enumerate(results):
        others = committed()
        others.results = results[:number] + results[number + 1 :]
        verdicts = judge(result["metrics"], RULES, others.spreads(GATED))
        assert len(verdicts) >= 9 and all(verdict.passed for verdict in verdicts), list(map(str, verdicts))


def test_the_committed_digits_are_recognisable_and_tell_of_no_machine():
    baseline = committed()
    assert baseline.spreads(["class_agreement"])["class_agreement"].mean > 0.9
    assert re.findall(r'": "/|runs/', json.dumps(baseline.request)) == []


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A run of the gate's experiment whose model is too small and too young to draw anything."""
    path = tmp_path_factory.mktemp("untrained")
    small = [override for override in SMALL_RUN if override.startswith(("model.", "trainer."))]
    assert main(["train", "experiment=digits_gate", *small, f"run_dir={path}"]) == 0
    return path


@functools.cache
def digits_of(label: int) -> Tensor:
    digits = Digits()
    return digits.images[digits.labels == label]


def real(label: int, number: int) -> Tensor:
    """A real digit of the class that was asked for, each time another one."""
    return digits_of(label)[number]


def one_class(label: int, number: int) -> Tensor:
    """Threes, whatever was asked for."""
    return digits_of(3)[number]


def few_digits(label: int, number: int) -> Tensor:
    """The right class, but always the same three digits of it."""
    return digits_of(label)[number % 3]


def shifted(label: int, number: int) -> Tensor:
    """A real digit two pixels to the right."""
    return pad(real(label, number)[..., :-2], (2, 0))


def drawing(draw: Draw) -> Callable[..., Generator]:
    """What System.generator would be if models drew so: by class, and how many of it they have drawn already."""

    def generator(system, model, config) -> Generator:
        drawn: Counter[int] = Counter()

        def sample(x_T, y, noise):
            images = []
            for label in y.tolist():
                images.append(draw(label, drawn[label]))
                drawn[label] += 1
            return torch.stack(images)

        return Generator(sample, lambda x: x, (1, 8, 8), 10, 0, 250, torch.device("cpu"))

    return generator


def evaluate(run: Path, out: Path, *overrides: str) -> int:
    arguments = [f"checkpoint={run}", f"gate.relative_to={BASELINE}", f"out={out / 'results.json'}"]
    arguments += [f"gate.{name}_tolerance={tolerance}" for name, tolerance in TOLERANCES.items()]
    return main(["evaluate", *arguments, *overrides])


@pytest.mark.parametrize(
    ("draw", "code", "at_least"),
    [
        (real, 0, []),
        (one_class, 1, ["FID-digits", "IS", "recall", "class_agreement"]),
        (few_digits, 1, ["FID-digits", "recall", "coverage"]),
        (shifted, 1, ["FID-digits", "precision"]),
        (None, 1, ["FID-digits", "IS", "precision", "class_agreement"]),
    ],
    ids=["real digits", "one class", "few digits", "two pixels", "untrained"],
)
def test_what_goes_wrong_with_generators_fails(
    untrained, tmp_path, monkeypatch, capsys, draw: Draw | None, code, at_least
):
    if draw is not None:
        monkeypatch.setattr(System, "generator", drawing(draw))
    assert evaluate(untrained, tmp_path) == code
    captured = capsys.readouterr()
    assert captured.out.count("gate         ") >= 9
    failed = captured.err.strip().rpartition("gate failed: ")[2].split(", ") if code else []
    assert set(at_least) <= set(failed)


@pytest.mark.slow  # trains for minutes
@pytest.mark.parametrize(("overrides", "code"), [((), 0), (SHORTER, 1)], ids=["whole", "shorter"])
def test_the_gates_own_training_passes_and_a_tenth_of_it_fails(tmp_path, overrides, code):
    assert main(["train", "experiment=digits_gate", *overrides, f"run_dir={tmp_path / 'run'}"]) == 0
    assert evaluate(tmp_path / "run", tmp_path) == code
