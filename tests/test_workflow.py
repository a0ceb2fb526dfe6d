"""The workflow of continuous integration runs what the README names, with pinned actions and without secrets."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from diffussm.build import shipped_path
from diffussm.compose import compose
from diffussm.evaluation.baseline import Baseline

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / ".github" / "workflows" / "ci.yml"
SLOW = FILE.with_name("slow.yml")
GATE = ROOT / "scripts" / "gate.sh"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="not a git checkout")


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load(FILE.read_text())


def test_it_runs_on_push_and_pull_request_and_may_only_read(workflow):
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 takes on for a truth
    assert set(triggers) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in FILE.read_text()


def test_actions_are_pinned_to_a_major_version_and_results_uploaded_whatever_happens(workflow):
    for job in workflow["jobs"].values():
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)
        upload = job["steps"][-1]
        assert upload["uses"].startswith("actions/upload-artifact@") and upload["if"] == "always()"
        assert any("cache" in step.get("with", {}) for step in job["steps"])


def test_its_commands_are_scripts_of_this_repository(workflow):
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    scripts = [shlex.split(command)[1] for command in commands]
    assert scripts == ["scripts/test.sh", "scripts/gate.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_slow_tests_run_once_a_week():
    workflow = yaml.safe_load(SLOW.read_text())
    triggers = workflow.get("on", workflow.get(True))
    assert set(triggers) == {"schedule", "workflow_dispatch"} and len(triggers["schedule"]) == 1
    assert workflow["permissions"] == {"contents": "read"} and "secrets" not in SLOW.read_text()
    (job,) = workflow["jobs"].values()
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert used and all(f"uses: {name}\n" in FILE.read_text() for name in used)
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    assert command.startswith("bash scripts/test.sh -m slow ")


def test_the_gate_trains_and_asks_for_what_the_baseline_answers():
    lines = GATE.read_text().replace("\\\n", " ").replace("$run", "run").splitlines()
    train, evaluate = (shlex.split(line)[1:] for line in lines if line.startswith('"$diffussm"'))
    trained = compose(train[0], train[1:])
    groups = ("sampler", "guidance", "sampling", "evaluation", "data", "autoencoder")
    overrides = [argument for argument in evaluate[1:] if argument != "$@"]
    config = compose(evaluate[0], overrides, from_checkpoint={key: trained[key] for key in groups})
    asked = ("sampling", "evaluation", "sampler", "guidance")
    request = OmegaConf.to_container(OmegaConf.create({key: config[key] for key in asked}))
    baseline = Baseline.read(shipped_path(config.gate.relative_to), "gate.relative_to")
    baseline.request = {key: value for key, value in baseline.request.items() if key in asked}
    assert not request["sampling"].pop("tf32")  # which requests tell only where it is on
    baseline.refuse_other(request)
