"""`diffussm evaluate` as a gate: exit codes, files, and refusals before anything is measured."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import SMALL_RUN

from diffussm.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run, measured with two seeds and added to baseline.json beside it."""
    root = tmp_path_factory.mktemp("gate")
    assert main(["train", *SMALL_RUN, f"run_dir={root / 'run'}"]) == 0
    for seed in range(2):
        added = f"gate.add_to={root / 'baseline.json'}"
        assert main(["evaluate", f"checkpoint={root / 'run'}", f"sampling.seed={seed}", added]) == 0
    return root / "run"


def evaluate(run: Path, *overrides: str) -> int:
    """Answered from the run's history where it was measured before."""
    return main(["evaluate", f"checkpoint={run}", *(override.format(root=run.parent) for override in overrides)])


def test_the_exit_code_is_1_for_a_broken_limit_alone(run, capsys):
    fid = json.loads((run / "results.json").read_text())["metrics"]["FID-digits"]
    seed = "sampling.seed=1"
    assert evaluate(run, seed, f"gate.fid_max={fid + 1}") == 0
    captured = capsys.readouterr()
    assert captured.out.count("gate  ") == 1 and "gate         ok    FID-digits" in captured.out
    assert "gate failed" not in captured.err
    assert evaluate(run, seed, f"gate.fid_max={fid - 1}", "gate.recall_min=0", "gate.is_min=100") == 1
    captured = capsys.readouterr()
    assert captured.out.count("gate         FAIL") == 2 and captured.out.count("gate         ok") == 1
    assert captured.err == "diffussm: gate failed: FID-digits, IS\n"
    assert evaluate(run, seed) == 0
    assert "gate  " not in capsys.readouterr().out


def test_a_baseline_judges_all_that_it_holds_and_knows_of_tolerances(run, capsys):
    relative = "gate.relative_to={root}/baseline.json"
    assert evaluate(run, relative) == 0
    assert capsys.readouterr().out.count("gate         ok") >= 9
    assert evaluate(run, relative, "gate.deviations=0") == 1  # of two results one is worse than their mean
    capsys.readouterr()
    assert evaluate(run, relative, "metrics=[fid]", "gate.fid_tolerance=1000") == 0
    shown = capsys.readouterr().out
    assert shown.count("gate  ") == 1 and "of 2, tolerance 1000" in shown


def test_verdicts_are_written_as_junit_and_appended_to_the_summary(run, tmp_path):
    (tmp_path / "summary.md").write_text("before\n")
    files = (f"gate.junit={tmp_path / 'new' / 'gate.xml'}", f"gate.summary={tmp_path / 'summary.md'}")
    assert evaluate(run, "gate.fid_max=0", *files) == 1
    assert evaluate(run, "gate.fid_max=1e9", *files) == 0
    root = ET.parse(tmp_path / "new" / "gate.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("1", "0")
    facts = {item.get("name"): item.get("value") for item in root.iter("property")}
    assert facts["samples"] == "64" and "checkpoints/step-" in facts["checkpoint"]
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n### Gate: 1 of 1 limits broken") and "### Gate: all 1 limits held" in text


def test_every_checkpoint_is_judged_and_none_hides_another(run, tmp_path, capsys):
    """Of several, one that fails fails all, in the files too."""
    asked = ("metrics=[fid]", f"out={tmp_path / 'results.json'}")
    pattern = f"checkpoints={run / 'checkpoints' / '*'}"
    assert main(["evaluate", pattern, *asked]) == 0
    history = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {entry["request"]["checkpoint"]["path"]: entry["metrics"]["FID-digits"] for entry in history}
    assert len(found) == 2
    capsys.readouterr()
    files = (f"gate.junit={tmp_path / 'gate.xml'}", f"gate.summary={tmp_path / 'gate.md'}")
    assert main(["evaluate", pattern, *asked, f"gate.fid_max={sum(found.values()) / 2}", *files]) == 1
    captured = capsys.readouterr()
    assert all(f"gate         of {path} (" in captured.out for path in found)
    assert captured.err.splitlines()[-1] == "diffussm: gate failed: FID-digits"
    root = ET.parse(tmp_path / "gate.xml").getroot()
    assert (root.get("tests"), root.get("failures"), len(root.findall("testsuite"))) == ("2", "1", 2)
    assert (tmp_path / "gate.md").read_text().count("### Gate: ") == 2


REFUSALS = [
    # overrides, exit code, what the line says; {root} is where run and baseline.json are
    (["gate.fdi_max=6"], 2, "gate.fdi_max: no such key (did you mean fid_max?)"),
    (["gate.fid_max=low"], 2, "gate.fid_max: Value 'low'"),
    (["gate.fid_max=nan"], 2, "gate.fid_max=nan: must be a finite number"),
    (["gate.fid_max=6", "metrics=[is]"], 2, "gate.fid_max=6: fid is not measured: add it to metrics"),
    (["gate.vlb_max=6"], 2, "gate.vlb_max=6: vlb is not measured: add it to metrics"),
    (["gate.fid_inf_max=6"], 2, "fid_inf is not measured: set evaluation.extrapolate=true"),
    (["gate.relative_to=no.json"], 2, "gate.relative_to=no.json: no such file: results are added"),
    (["gate.relative_to=diffussm:no.json"], 2, "diffussm/no.json: no such file"),
    (
        ["gate.relative_to={root}/baseline.json", "sampler.num_steps=3"],
        2,
        "baseline.json: answers another request: sampler.num_steps=2 there and 3 here: ask for the same",
    ),
    (["gate.relative_to={root}/run/results.json"], 65, "results.json: no baseline"),
    (["gate.relative_to={root}/baseline.json", "metrics=[vlb]"], 2, "answers another request"),
    (
        ["gate.relative_to={root}/baseline.json", "gate.fid_tolerance=1", "metrics=[is]"],
        2,
        "gate.fid_tolerance=1: baseline.json and the metrics do not share fid",
    ),
    (["gate.relative_to={root}/baseline.json", "gate.deviations=-1"], 2, "gate.deviations=-1.0: must be at least"),
    (["gate.fid_tolerance=1"], 2, "gate.fid_tolerance=1.0: worse than what? set gate.relative_to too"),
    (["gate.junit=a.xml"], 2, "gate.junit=a.xml: nothing is judged: set a limit"),
    (["gate.summary=a.md"], 2, "gate.summary=a.md: nothing is judged"),
    (["gate.fid_max=6", "gate.junit={root}"], 2, "is a directory: name a file"),
    (["gate.fid_max=6", "gate.junit=/dev/null/a.xml"], 73, "gate.junit=/dev/null/a.xml: /dev/null is a file"),
    (["gate.add_to=a.json", "gate.fid_max=6"], 2, "gate.add_to=a.json: a result is judged or added"),
    (["gate.add_to=a.txt"], 2, "gate.add_to=a.txt: must end in .json"),
    (["gate.add_to={root}/baseline.json", "guidance.scale=2"], 2, "guidance.scale=1.25 there and 2"),
]


@pytest.mark.parametrize(("overrides", "code", "says"), REFUSALS)
def test_gates_that_cannot_work_are_one_line_before_anything_is_measured(
    run, overrides, code, says, in_tmp, capsys, monkeypatch
):
    monkeypatch.setattr("diffussm.evaluation.evaluator.Evaluation.run", lambda *_: pytest.fail("measured"))
    before = (run / "results.jsonl").read_bytes(), (run.parent / "baseline.json").read_bytes()
    assert evaluate(run, *overrides) == code
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(in_tmp.iterdir()) == []
    assert before == ((run / "results.jsonl").read_bytes(), (run.parent / "baseline.json").read_bytes())


def test_one_result_is_no_spread_but_can_be_held_to_a_tolerance(run, tmp_path, capsys):
    alone = tmp_path / "alone.json"
    assert evaluate(run, "metrics=[fid]", f"gate.add_to={alone}") == 0
    assert evaluate(run, "metrics=[fid]", f"gate.relative_to={alone}") == 2
    assert "one result has no spread: add others to it" in capsys.readouterr().err
    assert evaluate(run, "metrics=[fid]", f"gate.relative_to={alone}", "gate.fid_tolerance=0.1") == 0
