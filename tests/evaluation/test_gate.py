"""Verdicts: what is held to which limit, on which side, and how far from a baseline."""

import math

import pytest

from diffussm.config import GATED, SAMPLE_METRICS
from diffussm.evaluation.gate import Rule, Spread, judge, name_of

RULES = {name: Rule(side) for name, side in GATED.items()}


def passed(metrics, rules=RULES, **options) -> dict[str, bool]:
    return {verdict.metric: verdict.passed for verdict in judge(metrics, rules, **options)}


def test_limits_have_a_side_and_belong_to_what_is_allowed():
    rules = {**RULES, "fid": Rule("max", 6.0), "recall": Rule("min", 0.7)}
    assert passed({"FID": 6.0, "recall": 0.7}, rules) == {"FID": True, "recall": True}
    assert passed({"FID": 6.01, "recall": 0.69}, rules) == {"FID": False, "recall": False}
    assert passed({"FID": 0.1, "recall": 0.9, "IS": 1.0}, rules) == {"FID": True, "recall": True}


@pytest.mark.parametrize("metrics", [{}, {"FID": None}, {"FID": math.nan}, {"FID": math.inf}, {"FID": -math.inf}])
def test_what_was_not_measured_or_is_no_number_does_not_pass(metrics):
    verdict = judge(metrics, {"fid": Rule("max", 6.0)})[0]
    assert not verdict.passed and ("not measured" in str(verdict)) == (metrics.get("FID") is None)


def test_a_metric_may_be_worse_than_the_baseline_by_its_deviations_and_better_by_any():
    baseline = {"FID-digits": Spread.of([5.0, 6.0, 7.0]), "recall": Spread.of([0.7, 0.8, 0.9])}
    assert baseline["FID-digits"] == Spread(6.0, 1.0, 3)
    for fid, recall, deviations, expected in (
        (8.9, 0.51, 3.0, True), (9.1, 0.49, 3.0, False), (9.1, 0.49, 4.0, True), (0.0, 1.0, 0.0, True),
    ):  # fmt: skip
        found = passed({"FID-digits": fid, "recall": recall}, baseline=baseline, deviations=deviations)
        assert found == {"FID-digits": expected, "recall": expected}


def test_a_metric_may_be_worse_by_the_larger_of_deviations_and_tolerance():
    rules = {**RULES, "fid": Rule("max", tolerance=0.5), "recall": Rule("min", tolerance=0.25)}
    baseline = {"FID": Spread.of([6.0]), "recall": Spread.of([0.7, 0.8, 0.9])}
    for fid, recall, deviations, expected in (
        (6.49, 0.56, 0.0, True), (6.51, 0.54, 0.0, False), (6.49, 0.56, 2.0, True), (6.51, 0.51, 3.0, None),
    ):  # fmt: skip
        found = passed({"FID": fid, "recall": recall}, rules, baseline=baseline, deviations=deviations)
        assert found == {"FID": bool(expected), "recall": expected is not False}


def test_an_absolute_and_a_relative_limit_are_two_verdicts():
    rules = {**RULES, "fid": Rule("max", 5.0)}
    verdicts = judge({"FID": 6.0}, rules, {"FID": Spread.of([6.0, 6.2])})
    assert [(verdict.passed, verdict.because.split()[0]) for verdict in verdicts] == [
        (False, "gate.fid_max"), (True, "baseline"),
    ]  # fmt: skip
    assert str(verdicts[0]) == "FAIL  FID 6: at most 5 (gate.fid_max)"


def test_a_baseline_metric_that_is_gone_does_not_pass():
    assert passed({"FID": 6.0}, baseline={"recall": Spread.of([0.7, 0.8])}) == {"recall": False}


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("FID", "fid"), ("FID-digits", "fid"), ("FID-digits_inf", "fid_inf"), ("FID_inf", "fid_inf"),
        ("sFID-dinov2", "sfid"), ("KID-digits", "kid"), ("IS", "is"), ("class_agreement", "class_agreement"),
        ("vlb", "vlb"), ("vlb_prior", "vlb_prior"), ("inversion_rmse", "inversion"),
    ],
)  # fmt: skip
def test_titles_have_the_names_of_settings(title, name):
    assert name_of(title) == name


def test_every_metric_that_can_be_asked_for_can_be_held_to_a_limit():
    assert set(SAMPLE_METRICS) <= set(GATED)
