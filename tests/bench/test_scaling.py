"""Cost against resolution: what is counted, what is measured, what is extrapolated, and what is left out."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from test_suites import TINY

from diffussm.bench import scaling
from diffussm.bench.scaling import Cost, measure_scaling
from diffussm.bench.timing import Timing
from diffussm.bench.workload import Measurement, Skip
from diffussm.cli import main

SMALL = {"hidden_size": 64, "depth": 5}
TINY_SUBJECTS = {
    "DiffuSSM-XL": ("diffussm_s", {**SMALL, "d_state": 4}),
    "DiT-XL/1": ("dit_s_2", {**SMALL, "num_heads": 2, "patch_size": 1}),
    "DiT-XL/2": ("dit_s_2", {**SMALL, "num_heads": 2, "patch_size": 2}),
}
SETUP = dataclasses.replace(TINY, resolutions=(64, 32))


@pytest.fixture
def tiny(monkeypatch):
    """Models of five blocks, whose depth the suite may change."""
    monkeypatch.setattr(scaling, "SUBJECTS", TINY_SUBJECTS)

    def create(name: str, pixels: int, **overrides: int) -> torch.nn.Module:
        preset, replaced = TINY_SUBJECTS[name]
        size = {"input_size": pixels // 8} if preset.startswith("dit") else {}
        built.append((name, pixels, overrides.get("depth")))
        return scaling.create_model(preset, **{**replaced, **size, **overrides})

    built: list[tuple] = []
    monkeypatch.setattr(scaling, "_create", create)
    return built


def results(setup) -> tuple[list[Cost], list[Measurement], list[Skip]]:
    found = list(measure_scaling(setup, lambda line: None))
    return tuple([one for one in found if isinstance(one, kind)] for kind in (Cost, Measurement, Skip))


def test_costs_are_told_for_every_model_and_resolution(tiny):
    costs, measurements, skips = results(SETUP)
    assert [(cost.subject, cost.pixels) for cost in costs] == [(n, px) for px in (32, 64) for n in TINY_SUBJECTS]
    assert [cost.tokens for cost in costs] == [16, 16, 4, 64, 64, 16]
    assert len(measurements) == 6 and not skips
    assert all(m.blocks == 0 and m.timing.seconds > 0 and m.peak_bytes > 0 for m in measurements)


@pytest.mark.parametrize("name", ["DiT-S/1", "DiT-XL/2"])
def test_attention_is_what_grows_with_the_square_of_the_tokens(name):
    short, long = (scaling._cost(name, pixels, SETUP) for pixels in (64, 128))
    assert long.tokens == 4 * short.tokens and long.attention_macs == 16 * short.attention_macs
    per_token = [(cost.macs - cost.attention_macs) / cost.tokens for cost in (short, long)]
    assert per_token[1] == pytest.approx(per_token[0], rel=0.1)  # but for the conditioning, once an image
    assert long.score_bytes == {"DiT-S/1": 6, "DiT-XL/2": 16}[name] * long.tokens**2 * 4


def test_our_cost_is_linear_and_has_no_scores():
    short, long = (scaling._cost("DiffuSSM-S", pixels, SETUP) for pixels in (256, 512))
    assert long.macs / short.macs == pytest.approx(4, rel=0.01)
    assert long.attention_macs == long.score_bytes == 0 < long.ssm_flops


@pytest.mark.parametrize(
    ("name", "limit", "is_left_out"), [("DiffuSSM-S", 0.1 * 70, False), ("DiT-S/1", 0.1 * 70, True)]
)
def test_what_a_block_may_take_follows_from_its_work(name, limit, is_left_out, monkeypatch):
    """Of 64 times the tokens, 64 times as much for us, and far more for attention."""
    short, long = (scaling._cost(name, pixels, SETUP) for pixels in (256, 2048))
    monkeypatch.setattr(scaling, "_fit", lambda *given: "as far as this")
    setup = dataclasses.replace(SETUP, call_limit_seconds=limit)
    (skip,) = scaling._measure(long, setup, {name: (short, 0.1)})
    assert ("a block may take" in skip.reason) == is_left_out


def test_published_figures_are_met():
    assert scaling._cost("DiT-XL/2", 512, SETUP).macs / 1e9 == pytest.approx(524.5, rel=2e-3)
    assert scaling._cost("DiffuSSM-XL", 256, SETUP).macs / 1e9 == pytest.approx(276.0, rel=1e-3)


def test_what_takes_too_long_as_a_whole_is_measured_in_few_blocks(tiny):
    _, measurements, skips = results(dataclasses.replace(SETUP, seconds=1e-9, resolutions=(32,)))
    assert not skips and {m.blocks for m in measurements} == {3}
    assert {depth for *_, depth in tiny} == {None, 1, 3}  # None: on paper
    assert {m.parameters for m in measurements} == {scaling._cost(n, 32, SETUP).parameters for n in TINY_SUBJECTS}


def test_a_whole_model_follows_from_few_blocks():
    timing = scaling.extrapolate(Timing(5.0, 0.5, 4), Timing(9.0, 1.0, 3), depth=29)
    assert timing == Timing(5.0 + 28 * 2.0, 1.5 * 14, 3)


def test_what_does_not_fit_is_left_out_with_its_reason(tiny):
    _, measurements, skips = results(dataclasses.replace(SETUP, resolutions=(32,), memory_limit_gib=1e-6))
    assert not measurements and all("memory_limit_gib=1e-06" in skip.reason for skip in skips) and len(skips) == 3
    limited = dataclasses.replace(SETUP, resolutions=(32,), call_limit_seconds=1e-9, seconds=1e-9)
    _, measurements, skips = results(limited)
    assert not measurements and all("call_limit_seconds=1e-09" in skip.reason for skip in skips)


def test_the_command_writes_table_picture_and_json(tiny, in_tmp, capsys):
    assert main(["bench", "suites=[scaling]", "resolutions=[32,64]", "repetitions=1"]) == 0
    out = capsys.readouterr().out
    assert "goals" not in out  # for it has none
    assert "| DiT-XL/1 | 64 | 64 |" in out and "DiT-XL/1 / DiffuSSM-XL, time" in out
    assert "bench/scaling.png" in out.splitlines()[-1]
    document = json.loads((in_tmp / "bench" / "bench.json").read_text())
    assert len(document["costs"]) == 6 and len(document["measurements"]) == 6
    with Image.open(in_tmp / "bench" / "scaling.png") as image:
        assert image.width > image.height > 100
    assert main(["bench", "suites=[scaling]", "resolutions=[32]"]) == 73


@pytest.mark.parametrize("resolutions", ["[]", "[24]", "[0]"])
def test_resolutions_must_be_cut_into_patches(resolutions, in_tmp, capsys):
    assert main(["bench", "suites=[scaling]", f"resolutions={resolutions}"]) == 2
    assert f"resolutions={resolutions}: needs at least one positive multiple of 16" in capsys.readouterr().err
