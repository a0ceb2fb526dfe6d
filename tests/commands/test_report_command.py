"""`diffussm report` and `compare`: pages of real runs, of runs that lack everything, and refusals in one line."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from PIL import Image

from diffussm.cli import main
from diffussm.commands import denoising, sample

LITTLE = ["drawn_images=12"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two runs that have drawn grids, one of them evaluated."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["train", *SMALL_RUN, "name=one"]) == 0
        assert main(["train", *SMALL_RUN, "name=two", "seed=1", "trainer.total_images=64"]) == 0
        assert main(["evaluate", "checkpoint=runs/one"]) == 0
    return directory


@pytest.fixture
def runs(trained, in_tmp) -> Path:
    """Copies of them."""
    shutil.copytree(trained / "runs", in_tmp / "runs")
    return in_tmp / "runs"


def read_csv(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def no_network(*arguments: object, **options: object) -> None:
    raise AssertionError("the network was run although everything is there already")


def test_a_run_becomes_a_page(runs, capsys):
    assert main(["report", "runs/one", *LITTLE]) == 0
    printed = capsys.readouterr().out
    assert "FID-digits" in printed and "page         runs/one/report/report.html" in printed
    page = Path("runs/one/report/report.html").read_text()
    for promise in ("finished", "128 of 128 images seen", "class 9, image 9", "samples at 128 images", "t = 999",
                    "class 3, expected image at t = 0", "real against real, 360 images", "hidden_size: 16",
                    "diffussm train experiment=digits model.hidden_size=16"):  # fmt: skip
        assert promise in page
    assert len(page) < 1_000_000
    rows = read_csv("runs/one/report/results.csv")
    measured = json.loads(Path("runs/one/results.json").read_text())["metrics"]
    assert float(rows[0]["FID-digits"]) == measured["FID-digits"] and rows[0]["images"] == "128"


def test_what_is_drawn_is_what_sample_draws_and_drawn_once(runs, monkeypatch):
    assert main(["report", "runs/one", *LITTLE]) == 0
    assert main(["sample", "checkpoint=runs/one", "num_images=12", "out=drawn"]) == 0
    found = {path.name: path for path in Path("runs/one/samples").iterdir() if path.is_dir()}
    (steps,) = (path for name, path in found.items() if name.endswith("-steps"))
    (gallery,) = (path for name, path in found.items() if not name.endswith("-steps"))
    for index in range(12):
        assert (gallery / f"{index:06d}.png").read_bytes() == Path(f"drawn/{index:06d}.png").read_bytes()
    for index in range(4):
        with Image.open(steps / f"{index:06d}.png") as image, Image.open(f"drawn/{index:06d}.png") as drawn:
            assert max(abs(a - b) for a, b in zip(image.tobytes(), drawn.tobytes(), strict=True)) <= 1  # rounding
        # DDIM ends in the x_0 that is expected at its last step.
        last = steps / f"{index:06d}-1-x_0.png"
        assert last.read_bytes() == (steps / f"{index:06d}.png").read_bytes()
    for module in (sample, denoising):
        monkeypatch.setattr(module, "build_system", no_network)
    assert main(["report", "runs/one", *LITTLE]) == 0
    with pytest.raises(AssertionError, match="the network was run"):
        main(["report", "runs/one", *LITTLE, "sampling.seed=1"])


def test_runs_beside_each_other_begin_with_the_same_noise(runs, capsys):
    assert main(["compare", "runs/one", "runs/two", *LITTLE]) == 0
    printed = capsys.readouterr().out
    assert "| one " in printed and "| seed " in printed and "runs/compare/report.html" in printed
    names = {path.name for path in Path("runs/compare").iterdir()}
    assert names == {"report.html", "report.md", "samples.png", "curve-loss.png", "curve-FID-digits.png",
                     "comparison.csv", "comparison.tex", "differences.csv", "differences.tex"}  # fmt: skip
    row = read_csv("runs/compare/comparison.csv")[0]
    macs, images = float(row["GMAC"]), int(row["images"])
    assert float(row["total Gflops"]) == pytest.approx(macs * images) and images == 128
    differences = read_csv("runs/compare/differences.csv")
    assert {"key": "seed", "one": "0", "two": "1"} in differences
    page = Path("runs/compare/report.html").read_text()
    assert "one, class 7, image 7" in page and "two, class 7, image 7" in page


def test_a_sweep_is_compared_first_and_then_told_run_by_run(runs, capsys):
    assert main(["report", "runs", "drawn_images=0", "match=images"]) == 0
    assert "Each run at 64 images seen" in capsys.readouterr().out
    page = Path("runs/report/report.html").read_text()
    assert page.index(">2 runs compared") < page.index(">one") < page.index(">two")
    assert Path("runs/report/one-results.csv").exists()
    assert not [path for path in Path("runs/one/samples").iterdir() if path.is_dir()]


def test_paths_with_equals_signs_and_quotes_are_paths(runs, capsys):
    Path("runs/one").rename('runs/model=dit,it\'s a "b"')
    assert main(["report", 'runs/model=dit,it\'s a "b"', "drawn_images=1", "denoising_images=1"]) == 0
    assert "Could not be drawn" not in Path('runs/model=dit,it\'s a "b"/report/report.html').read_text()


@pytest.mark.parametrize("lacks", ["checkpoints", "results.jsonl", "samples", "config.yaml", "status.json",
                                   "metrics.jsonl"])  # fmt: skip
def test_a_run_that_lacks_something_still_has_its_page(runs, lacks):
    path = runs / "one" / lacks
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["report", "runs/one", "drawn_images=1", "denoising_images=1"]) == 0
    page = Path("runs/one/report/report.html").read_text()
    assert ("no checkpoint there" in page) == (lacks == "checkpoints")
    assert ("config.yaml is missing or damaged" in page) == (lacks == "config.yaml")


def test_a_run_that_has_only_begun_has_its_page(runs):
    for path in (runs / "one").iterdir():
        if path.name not in ("config.yaml", "status.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    status = json.loads(Path("runs/one/status.json").read_text())
    Path("runs/one/status.json").write_text(json.dumps({**status, "state": "running", "images": 0, "host": "away",
                                                        "updated": "2000-01-01T00:00:00+0000"}))  # fmt: skip
    assert main(["report", "runs/one"]) == 0
    assert "stalled" in Path("runs/one/report/report.html").read_text()


def test_events_are_told(runs):
    with Path("runs/one/metrics.jsonl").open("a") as file:
        event = {"images": 64, "event": "skipped step", "time": "2026-01-01T00:00:00+0000", "step": 4}
        file.write(json.dumps(event) + "\n")
        file.write(json.dumps({**event, "event": "<b>resume", "changed": ["a: 1 -> 2", "b"]}) + "\n")
    assert main(["report", "runs/one", "drawn_images=0"]) == 0
    rows = read_csv("runs/one/report/events.csv")
    assert [row["event"] for row in rows] == ["skipped step", "<b>resume"]
    assert [row["details"] for row in rows] == ["step 4", "step 4, changed a: 1 -> 2; b"]
    assert "&lt;b&gt;resume" in Path("runs/one/report/report.html").read_text()


def test_a_configuration_that_calls_foreign_code_calls_nothing(runs, capsys):
    path = runs / "one" / "config.yaml"
    path.write_text(path.read_text().replace("diffussm.models.DiffuSSM", "os.mkdir"))
    assert main(["report", "runs/one", "drawn_images=0"]) == 0
    assert "which is no part of diffussm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["report"], 2, "runs: none named: write diffussm report RUN_DIR ..."),
        (["compare"], 2, "runs: none named"),
        (["compare", "runs/one"], 2, "one run has nothing to stand beside"),
        (["report", "nowhere"], 73, "nowhere: no such directory"),
        (["report", "empty"], 73, "empty: holds no run"),
        (["report", "runs/one", "match=cost"], 2, "match=cost: choose parameters, compute, time, images"),
        (["report", "runs/one", "drawn_imags=1"], 2, "drawn_imags: no such key (did you mean drawn_images?)"),
        (["report", "runs/one", "drawn_images=-1"], 2, "drawn_images=-1: must be at least 0"),
        (["report", "runs/one", "denoising_images=-1"], 2, "denoising_images=-1: must be at least 0"),
        (["compare", "runs", "tolerance=1"], 2, "tolerance=1.0: must lie in 0..1"),
        (["report", "runs/one", "sampler.num_stepz=1"], 2, "sampler.num_stepz: "),
        (["report", "runs/one", "sampling.seed=-1"], 2, "sampling.seed=-1: must be at least 0"),
        (["report", "runs/one", "classes=[99]"], 2, "classes=[99]: each must lie in 0..9"),
        (["report", "runs/one", "out=file"], 73, "out=file: file is a file"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(runs, arguments, code, says, capsys):
    Path("empty").mkdir()
    Path("file").touch()
    before = sorted(Path().rglob("*"))
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said
    assert sorted(Path().rglob("*")) == before


def test_help_and_print_config_need_no_run(in_tmp, capsys):
    assert main(["compare", "--print-config", "match=time"]) == 0
    assert "match: time" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "RUN_DIR ..." in capsys.readouterr().out
