"""`sample` and `evaluate`: guidance of every kind, measures of images, and refusals before anything is written."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from PIL import Image

from diffussm.cli import main

RECIPES = {
    "conditional": ("experiment=digits",),
    "weaker": ("experiment=digits", "trainer.total_images=32"),
    "unconditional": ("experiment=digits_unconditional",),
    "cosine": ("experiment=digits", "diffusion=cosine"),
    "zero": (
        "experiment=digits",
        "diffusion=cosine",
        "diffusion.zero_terminal_snr=true",
        "objective.prediction=v",
    ),
    "no sampler": ("experiment=digits", "sampler=none"),
    "flow": ("experiment=digits_flow",),
    "classifier": ("experiment=digits_classifier",),
}
OF_SAMPLES = ("sampler.num_steps=2", "evaluation.num_samples=64")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory of small finished runs, by name."""
    root = tmp_path_factory.mktemp("guidance")
    for name, recipe in RECIPES.items():
        unsampled = name == "classifier"
        small = [override for override in SMALL_RUN[1:] if not unsampled or override not in OF_SAMPLES]
        assert main(["train", recipe[0], *small, *recipe[1:], f"run_dir={root / name}"]) == 0
    return root


def draw(runs: Path, out: Path, run: str, *overrides: str) -> list[bytes]:
    arguments = [
        f"checkpoint={runs / run}",
        f"out={out}",
        "num_images=4",
        "sampler.num_steps=4",
        "sampling.weights=model",
    ]
    assert main(["sample", *arguments, *overrides]) == 0
    return [Image.open(path).tobytes() for path in sorted(out.glob("0*.png"))]


def test_every_kind_of_guidance_changes_what_is_drawn(runs, tmp_path):
    classifier = f"guidance.checkpoint={runs / 'classifier'}"
    weaker = ("guidance=autoguidance", f"guidance.checkpoint={runs / 'weaker'}")
    drawn = {
        name: draw(runs, tmp_path / str(index), *arguments)
        for index, (name, arguments) in enumerate(
            {
                "conditional": ("conditional", "guidance.scale=1"),
                "classifier-free": ("conditional", "guidance.scale=8"),
                "early": ("conditional", "guidance.scale=8", "guidance.interval=[600,1000]"),
                "never": ("conditional", "guidance.scale=8", "guidance.interval=[1000,1001]"),
                "one channel": ("conditional", "guidance.scale=8", "guidance.channels=1"),
                "autoguidance": ("conditional", *weaker, "guidance.scale=50"),
                "by itself": ("conditional", *weaker, "guidance.scale=1"),
                "unconditional": ("unconditional",),
                "classifier": ("unconditional", "guidance=classifier", classifier, "guidance.scale=30"),
                "no classifier": ("unconditional", "guidance=classifier", classifier, "guidance.scale=0"),
            }.items()
        )
    }
    assert drawn["never"] == drawn["by itself"] == drawn["conditional"]
    assert drawn["one channel"] == drawn["classifier-free"]  # digits have one channel
    assert drawn["no classifier"] == drawn["unconditional"]
    different = ("conditional", "classifier-free", "early", "autoguidance", "unconditional", "classifier")
    same = [(a, b) for a, b in itertools.combinations(different, 2) if drawn[a] == drawn[b]]
    assert same == []


def test_a_classifier_gives_an_unconditional_model_labels(runs, tmp_path):
    ways = ("guidance=classifier", f"guidance.checkpoint={runs / 'classifier'}", "classes=[3]")
    draw(runs, tmp_path / "out", "unconditional", *ways)
    request = json.loads((tmp_path / "out" / "samples.json").read_text())["request"]
    assert request["classes"] == [3] and len(request["guidance"]["checkpoint"]["sha256"]) == 64


def test_the_answer_is_known_by_the_content_of_the_companion_not_by_its_place(runs, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "classifier", moved)
    ways = (f"checkpoint={runs / 'unconditional'}", "guidance=classifier", f"out={tmp_path / 'out'}")
    for companion in (runs / "classifier", moved):
        assert main(["sample", *ways, "num_images=2", f"guidance.checkpoint={companion}"]) == 0
    assert "these 2 images are there already" in capsys.readouterr().out


REFUSALS = [
    # run, overrides, what the line says; {runs} is their directory
    ("conditional", ["guidance.scale=2", "guidance.channels=2"], "guidance.channels=2: the latents have 1"),
    ("conditional", ["guidance=autoguidance"], "guidance.checkpoint: not set"),
    (
        "conditional",
        ["guidance=autoguidance", "guidance.checkpoint=nowhere"],
        "guidance.checkpoint=nowhere: no checkpoint there",
    ),
    (
        "conditional",
        ["guidance=autoguidance", "guidance.checkpoint={runs}/unconditional"],
        "knows None classes, the model 10: choose a weaker model of the same data",
    ),
    (
        "conditional",
        ["guidance=autoguidance", "guidance.checkpoint={runs}/cosine"],
        "was trained with another diffusion (_target_: diffussm.diffusion.schedule.cosine_schedule, not",
    ),
    (
        "conditional",
        ["guidance=autoguidance", "guidance.checkpoint={runs}/classifier"],
        "is a classifier: choose guidance=classifier",
    ),
    (
        "conditional",
        ["guidance=autoguidance", "guidance.checkpoint={runs}/weaker", "guidance.weights=ema_0.5"],
        "guidance.weights=ema_0.5: ",
    ),
    (
        "unconditional",
        ["guidance=classifier", "guidance.checkpoint={runs}/conditional"],
        "is no classifier: train one with objective=classifier",
    ),
    ("conditional", ["guidance.scale=2", "guidance.interval=[5000,6000]"], "timesteps run from 0 to 1000"),
    ("flow", ["guidance.scale=2", "guidance.interval=[0.1,0.6]"], "timesteps run from 0 to 1000"),
    ("conditional", ["classes=3"], "classes=3: must be a list: write classes=[3]"),
    ("unconditional", ["guidance.scale=2"], "guidance.scale=2.0: needs a conditional model"),
    ("classifier", ["sampler=ddim"], "a classifier draws nothing"),
    ("classifier", [], "a classifier draws nothing"),
]


@pytest.mark.parametrize(("run", "overrides", "says"), REFUSALS)
def test_guidance_that_cannot_work_is_one_line_and_writes_nothing(runs, run, overrides, says, in_tmp, capsys):
    overrides = [override.format(runs=runs) for override in overrides]
    assert main(["sample", f"checkpoint={runs / run}", "out=new", *overrides]) in (2, 73)
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "run", "override", "says"),
    [
        ("sample", "flow", "sampler=ddim", "is one of rectified flow: choose sampler=flow_euler or flow_heun"),
        ("sample", "conditional", "sampler=flow_heun", "is one of Gaussian diffusion: choose sampler=ddpm"),
        ("evaluate", "flow", "metrics=[vlb]", "metrics=[vlb]: rectified flow has no such measure"),
    ],
)
def test_the_other_process_is_refused_in_one_line(runs, diffussm, in_tmp, verb, run, override, says):
    result = diffussm(
        verb, f"checkpoint={runs / run}", "out=new.json", override
    )  # signatures are not checked there
    assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


def test_a_history_that_was_cut_off_loses_its_last_line_only(runs, tmp_path, capsys):
    arguments = [f"checkpoint={runs / 'conditional'}", f"out={tmp_path / 'a.json'}", "metrics=[fid]"]
    assert main(["evaluate", *arguments]) == 0
    with (tmp_path / "a.jsonl").open("a") as history:
        history.write('{"request": {"checkp')
    before = capsys.readouterr().out
    (tmp_path / "a.json").unlink()
    assert main(["evaluate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == before and "a.jsonl:2: damaged: left out" in captured.err


def test_the_bound_needs_no_sampler_and_knows_of_none(runs, tmp_path):
    results = evaluate(runs, tmp_path, "no sampler", "metrics=[vlb]", "likelihood_images=1")
    assert results["image_metrics"]["vlb"] > 0 and not {"sampler", "guidance"} & set(results["request"])
    assert main(["export", f"checkpoint={runs / 'no sampler'}", f"to={tmp_path / 'pipe'}"]) == 0
    (tmp_path / "of_its_own").mkdir()
    evaluate(
        runs, tmp_path / "of_its_own", "conditional", "metrics=[vlb]", "likelihood_images=1", "guidance.scale=3"
    )
    before = (tmp_path / "of_its_own" / "results.json").stat().st_mtime_ns
    evaluate(runs, tmp_path / "of_its_own", "conditional", "metrics=[vlb]", "likelihood_images=1")
    assert (tmp_path / "of_its_own" / "results.json").stat().st_mtime_ns == before


def evaluate(runs: Path, out: Path, run: str, *overrides: str) -> dict:
    assert main(["evaluate", f"checkpoint={runs / run}", f"out={out / 'results.json'}", *overrides]) == 0
    return json.loads((out / "results.json").read_text())


def test_only_the_metrics_that_were_asked_for_are_measured(runs, tmp_path, capsys):
    results = evaluate(runs, tmp_path, "conditional", "metrics=[fid,recall]")
    expected = {"FID-digits", "recall", "num_samples"}
    assert set(results["metrics"]) == expected | {"images_per_second"}
    assert set(results["real_against_real"]) == expected
    shown = capsys.readouterr().out
    assert "FID-digits" in shown and "sFID" not in shown
    whole = evaluate(runs, tmp_path, "conditional")
    assert whole["metrics"]["FID-digits"] == pytest.approx(results["metrics"]["FID-digits"], rel=1e-4)


def test_the_bound_and_the_inversion_are_measured_on_images_and_recorded(runs, tmp_path, capsys):
    metrics = ["metrics=[vlb,inversion]", "data.split=held_out", "likelihood_images=3"]
    results = evaluate(runs, tmp_path, "conditional", *metrics, "sampling.batch_size=2")
    found = results["image_metrics"]
    assert found["num_samples"] == 3
    assert found["vlb"] > found["vlb_decoder"] + found["vlb_prior"] > 0
    assert found["inversion_rmse"] > 0
    assert results["request"]["data"]["measured"] == 3
    shown = capsys.readouterr().out
    assert "vlb" in shown and "on images" in shown and "FID" not in shown
    before = (tmp_path / "results.json").stat().st_mtime_ns
    evaluate(runs, tmp_path, "conditional", *metrics, "sampling.batch_size=2")
    assert (tmp_path / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("run", "overrides", "says"),
    [
        ("conditional", ["metrics=[fdi]"], "metrics=['fdi']: choose from fid, sfid"),
        ("conditional", ["metrics=[]"], "metrics=[]: choose at least one"),
        ("conditional", ["metrics=[vlb]", "likelihood_images=0"], "likelihood_images=0: must be at least 1"),
        ("conditional", ["metrics=[inversion]", "sampler=ddpm"], "metrics=[inversion]: inverts sampler=ddim"),
        ("conditional", ["metrics=[inversion]", "sampler.eta=0.5"], "metrics=[inversion]: inverts sampler=ddim"),
        ("classifier", ["metrics=[vlb]"], "a classifier draws nothing"),
        ("classifier", [], "nothing to compare samples with"),
        ("zero", ["metrics=[inversion]"], "metrics=[inversion]: the last step of zero_terminal_snr=true has no"),
        ("conditional", ["out=new.jsonl"], "out=new.jsonl: must end in .json"),
        (
            "conditional",
            ["out=new/a.json", "sampler.num_steps=2000"],
            "sampler.num_steps=2000: must lie in 1..1000",
        ),
        ("conditional", ["out=new/a.json", "sampling.weights=ema_5"], "sampling.weights=ema_5: "),
        ("conditional", ["metrics=vlb"], "metrics=vlb: must be a list: write metrics=[vlb]"),
        (
            "conditional",
            ["metrics=[class_agreement]", "evaluation.class_agreement=false"],
            "evaluation.class_agreement=false leaves it out",
        ),
        ("conditional", ["metrics=[vlb]", "data=image_folder"], "diffussm: data.path: not set"),
    ],
)
def test_measures_that_cannot_be_taken_are_one_line_and_write_nothing(runs, run, overrides, says, in_tmp, capsys):
    assert main(["evaluate", f"checkpoint={runs / run}", "out=new.json", *overrides]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(in_tmp.iterdir()) == []
