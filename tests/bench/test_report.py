"""Comparisons are right on made-up measurements, goals are judged honestly, files are complete at any time."""

import dataclasses
import json

import pytest
import torch
from test_suites import TINY

from diffussm.bench import report
from diffussm.bench.report import Report, compare
from diffussm.bench.timing import Timing
from diffussm.bench.workload import Measurement, Skip

REFERENCE = dataclasses.replace(TINY, batch_size=4, hidden_size=384, d_state=64, depth=13)


def measured(suite, subject, length, seconds, peak=100, flops=0, phase="training step") -> Measurement:
    return Measurement(suite, phase, subject, length, Timing(seconds, 0.1 * seconds, 5), peak, 7, flops)


LAYER = [
    measured("layer", "S4D", 1024, 1.0, peak=100),
    measured("layer", "textbook S4D", 1024, 15.0, peak=300),
    measured("layer", "S4D", 4096, 4.0, peak=100),
    measured("layer", "textbook S4D", 4096, 40.0, peak=800),
    measured("layer", "attention", 4096, 24.0),
]


def judged(measurements, setup=REFERENCE):
    return {(v.comparison.quantity, v.comparison.against, v.length): v for v in compare(measurements, setup)}


def test_ratios_are_baseline_over_ours_and_goals_are_judged():
    verdicts = judged(LAYER)
    found = {key: (verdict.value, verdict.goal, verdict.met) for key, verdict in verdicts.items()}
    assert found["time", "textbook S4D", 1024] == (15.0, 12, True)
    assert found["time", "textbook S4D", 4096] == (10.0, 12, False)
    assert found["memory", "textbook S4D", 1024] == (3.0, 5, False)
    assert found["memory", "textbook S4D", 4096] == (8.0, 5, True)
    assert found["time", "attention", 4096] == (6.0, 5, True)
    assert ("time", "attention", 1024) not in found


@pytest.mark.parametrize(("seconds", "met"), [(4.0, True), (6.0, False)])
def test_the_exponent_has_an_upper_goal_and_leaves_short_lengths_out(seconds, met):
    short = measured("layer", "S4D", 256, 1.0)
    verdict = judged([short, LAYER[0], measured("layer", "S4D", 4096, seconds)])["exponent", "", None]
    assert verdict.value == pytest.approx({4.0: 1.0, 6.0: 1.2925}[seconds], abs=1e-3)
    assert verdict.goal == 1.1 and verdict.met is met


def test_the_share_of_the_matrix_rate_is_a_ratio_of_rates():
    ours = measured("model", "DiffuSSM", 1024, 2.0, flops=130)
    gemm = measured("model", "matrix product", 1024, 0.5, flops=50)
    verdict = judged([ours, gemm])["dense rate", "matrix product", 1024]
    assert verdict.value == 0.65 and verdict.met


def test_throughput_is_judged_in_any_setting():
    latents = dataclasses.replace(measured("data", "latents", 1024, 2.0, phase="loading"), items=50_000)
    ours = dataclasses.replace(measured("data", "photographs", 65536, 2.0, phase="loading"), items=600)
    theirs = dataclasses.replace(
        measured("data", "photographs, torchvision", 65536, 1.8, phase="loading"), items=600
    )
    verdicts = judged([latents, ours, theirs], dataclasses.replace(REFERENCE, batch_size=2))
    assert [(v.value, v.goal, v.met) for v in verdicts.values()] == [
        (25_000, 20_000, True),
        (300, None, None),
        (0.9, 1.0, False),
    ]
    verdict = judged([latents])["throughput", "", 1024]
    assert (verdict.value, verdict.goal, verdict.met) == (25_000, 20_000, True)
    cells = report._verdict_cells(verdict)
    assert cells[3:] == ("latents", "25,000/s", ">= 20,000/s", "met")
    assert report._measurement_cells(latents)[-2:] == ("25,000", "")


def test_goals_hold_for_the_setting_they_are_stated_for_only():
    for change in ({"batch_size": 2}, {"hidden_size": 64}, {"d_state": 8}, {"precision": "bf16"}):
        verdicts = judged(LAYER, dataclasses.replace(REFERENCE, **change)).values()
        assert verdicts and all(verdict.goal is None and verdict.met is None for verdict in verdicts)


def test_mfu_is_judged_by_the_published_peak_of_the_gpu_or_not_at_all(monkeypatch):
    setup = dataclasses.replace(TINY, device=torch.device("cuda"), precision="bf16")
    ours = measured("xl", "DiffuSSM-XL", 1024, 1.0, flops=500e12)
    gemm = measured("xl", "matrix product", 1024, 1.0, flops=625e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    verdict = judged([ours, gemm], setup)["dense rate", "", 1024]
    assert verdict.value == pytest.approx(500 / 989) and verdict.goal == 0.45 and verdict.met
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    verdicts = judged([ours, gemm], setup)
    assert ("dense rate", "", 1024) not in verdicts
    assert verdicts["dense rate", "matrix product", 1024].value == pytest.approx(0.8)


def test_files_hold_everything_that_was_added(tmp_path):
    written = Report(tmp_path / "new", "diffussm bench", REFERENCE)
    for result in [*LAYER, Skip("layer", "forward", "attention", 16384, "would need 99 GiB")]:
        written.add(result)
    written.save()
    document = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert len(document["measurements"]) == 5 and document["complete"] is False
    assert document["measurements"][0]["timing"] == {"seconds": 1.0, "spread": 0.1, "repetitions": 5}
    assert document["machine"]["torch"] == torch.__version__ and document["setup"]["hidden_size"] == 384
    assert {"value": 10.0, "goal": 12, "met": False}.items() <= document["comparisons"][1].items()
    text = (tmp_path / "new" / "bench.md").read_text()
    assert "stopped before its end" in text and "would need 99 GiB" in text
    assert "| layer | training step | 4,096 | textbook S4D / S4D, time | 10x | >= 12x | missed |" in text
    written.is_complete = True
    written.save()
    assert "stopped" not in (tmp_path / "new" / "bench.md").read_text()


@pytest.mark.parametrize(
    ("result", "setup", "is_told"),
    [(LAYER, TINY, True), (LAYER, REFERENCE, False)],
    ids=["another setting", "their setting"],
)
def test_goals_of_another_setting_are_mentioned_where_there_are_some(result, setup, is_told, tmp_path):
    written = Report(tmp_path, "diffussm bench", setup)
    for measurement in result:
        written.add(measurement)
    assert ("goals are stated for other settings" in written.markdown()) == is_told


def test_every_table_row_has_as_many_cells_as_its_header():
    rows = [report._measurement_cells(measurement) for measurement in LAYER]
    rows += [report._measurement_cells(measured("model", "DiffuSSM", 16, 1.0, flops=2 * 10**9))]
    assert {len(row) for row in rows} == {len(report.MEASUREMENT_COLUMNS)} and rows[-1][-1] == "2.0"
    assert {len(report._verdict_cells(v)) for v in compare(LAYER, REFERENCE)} == {len(report.COMPARISON_COLUMNS)}
