"""`evaluate` of stored samples, against folders, and of several checkpoints; `sample` in every format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN
from PIL import Image

from diffussm.cli import main
from diffussm.data.images import Digits
from diffussm.data.samples import open_samples
from diffussm.runtime.errors import Preempted

WAYS = ("sampler.num_steps=2", "sampling.weights=model")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was evaluated twice while it was trained."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    evaluated = ("evaluation.every_images=64", "trainer.total_images=160", "trainer.save_every_images=96")
    assert main(["train", *SMALL_RUN, *evaluated, f"run_dir={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> Path:
    """150 samples with the labels that an evaluation gives them, in every format."""
    root = tmp_path_factory.mktemp("drawn")
    for form in ("png", "npz", "tar"):
        asked = ("num_images=150", "labels=balanced", "range_size=64", f"format={form}", f"out={root / form}")
        assert main(["sample", f"checkpoint={run}", *WAYS, *asked]) == 0
    return root


def write_digits(path: Path, split: str, count: int) -> Path:
    path.mkdir()
    for index, image in enumerate(Digits(split).images[:count]):
        Image.fromarray(image[0].numpy()).save(path / f"{index}.png")
    return path


def results(out: Path) -> dict:
    return json.loads(out.read_text())


def test_all_formats_hold_the_same_images_and_the_same_command_knows_them(run, drawn, capsys):
    png, npz, tar = (open_samples(drawn / form, 1) for form in ("png", "npz", "tar"))
    assert len(png) == len(npz) == len(tar) == 150
    for index in range(150):
        assert (png[index][0] == npz[index][0]).all() and (png[index][0] == tar[index][0]).all()
        assert png[index][1] == npz[index][1] == tar[index][1]
    assert {file.name for file in (drawn / "npz").iterdir()} == {"samples.npz", "samples.json", "grid.png"}
    hashes = {json.loads((drawn / form / "samples.json").read_text())["sha256"] for form in ("png", "npz", "tar")}
    assert len(hashes) == 1
    with np.load(drawn / "npz" / "samples.npz") as arrays:
        assert np.bincount(arrays["labels"]).tolist() == [15] * 10
    same = ("num_images=150", "labels=balanced", "format=tar", f"out={drawn / 'tar'}")
    assert main(["sample", f"checkpoint={run}", *WAYS, *same, "range_size=64"]) == 0
    assert "these 150 images are there already" in capsys.readouterr().out
    assert main(["sample", f"checkpoint={run}", *WAYS, *same, "range_size=32"]) == 73


def test_stored_samples_score_what_their_checkpoint_scores(run, drawn, tmp_path, capsys):
    asked = (f"checkpoint={run}", f"out={tmp_path / 'own.json'}", "evaluation.num_samples=150", *WAYS)
    assert main(["evaluate", *asked]) == 0
    own = results(tmp_path / "own.json")["metrics"]
    for form in ("png", "npz", "tar"):
        out = tmp_path / f"{form}.json"
        assert main(["evaluate", f"samples={drawn / form}", "evaluation=digits", f"out={out}"]) == 0
        found = results(out)
        assert found["metrics"] == pytest.approx(
            {**own, "images_per_second": found["metrics"]["images_per_second"]}
        )
        assert (
            found["request"]["samples"]["num_images"] == 150 and len(found["request"]["samples"]["sha256"]) == 64
        )
    shown = capsys.readouterr().out
    assert "real against real" in shown and "FID-digits" in shown
    before = (tmp_path / "png.jsonl").read_text()
    shutil.copytree(drawn / "png", tmp_path / "moved")
    assert (
        main(["evaluate", f"samples={tmp_path / 'moved'}", "evaluation=digits", f"out={tmp_path / 'png.json'}"])
        == 0
    )
    assert (tmp_path / "png.jsonl").read_text() == before  # the same images, wherever they lie
    (tmp_path / "moved" / "000003.png").write_bytes((drawn / "png" / "000004.png").read_bytes())
    assert (
        main(["evaluate", f"samples={tmp_path / 'moved'}", "evaluation=digits", f"out={tmp_path / 'png.json'}"])
        == 0
    )
    assert (tmp_path / "png.jsonl").read_text() != before  # and other ones


def test_a_folder_is_compared_with_a_folder(in_tmp, capsys):
    ours, theirs = write_digits(in_tmp / "ours", "train", 300), write_digits(in_tmp / "theirs", "held_out", 200)
    asked = ["evaluate", f"samples={ours}", "evaluation=digits", f"evaluation.reference={theirs}"]
    assert main(asked) == 0
    found = results(in_tmp / "ours.results.json")
    assert found["metrics"]["FID-digits"] < 20 and found["metrics"]["precision"] > 0.7
    assert found["request"]["reference"]["preprocessing"] == "theirs, as stored"
    (made,) = in_tmp.glob("reference-*.npz")
    before = made.stat().st_mtime_ns
    assert main([*asked, "evaluation.k=4"]) == 0 and made.stat().st_mtime_ns == before
    (theirs / "0.png").unlink()  # another folder is another reference
    assert main(asked) == 0 and len(list(in_tmp.glob("reference-*.npz"))) == 2
    capsys.readouterr()


def test_images_of_another_size_are_refused_in_one_line(in_tmp, capsys):
    ours = write_digits(in_tmp / "ours", "train", 5)
    (in_tmp / "theirs").mkdir()
    Image.new("L", (8, 9)).save(in_tmp / "theirs" / "a.png")
    for samples, reference, says in (
        ("theirs", "ours", "measures images of shape (1, 8, 8), the data has (1, 9, 8)"),
        ("ours", "theirs", "images of shape (1, 9, 8), the samples have (1, 8, 8)"),
    ):
        asked = [f"samples={samples}", "evaluation=digits", f"evaluation.reference={reference}"]
        assert main(["evaluate", *asked]) in (2, 65)
        said = capsys.readouterr().err
        assert (says in said or "one image is no distribution" in said) and said.count("\n") == 1
    assert sorted(path.name for path in in_tmp.iterdir()) == ["ours", "theirs"] and len(list(ours.iterdir())) == 5


def test_every_checkpoint_of_a_run_is_measured_and_drawn(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    pattern = f"checkpoints={tmp_path / 'run' / 'checkpoints' / '*'}"
    assert main(["evaluate", pattern, "metrics=[fid]", "evaluation.num_samples=100", *WAYS]) == 0
    shown = capsys.readouterr().out
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    rows = [f"run, {16 * int(name.removeprefix('step-'))} images, model" for name in names]
    assert len(rows) == 2 and shown.index(rows[0]) < shown.index(rows[1]) < shown.index("real against")
    history = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    measured = [Path(entry["request"]["checkpoint"]["path"]).name for entry in history]
    assert measured == names
    with Image.open(tmp_path / "run" / "results.png") as picture:
        assert picture.width > 300
    assert main(["evaluate", pattern, "metrics=[fid]", "evaluation.num_samples=100", *WAYS]) == 0
    assert capsys.readouterr().out == shown


def test_the_best_checkpoint_is_kept_and_can_be_sampled(run, tmp_path, capsys):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["evaluation"]["FID-digits"] for record in records if "evaluation" in record}
    assert sorted(scores) == [4, 8, 10]
    best = min(scores, key=scores.__getitem__)
    (kept,) = (run / "best").iterdir()
    assert kept.name == f"step-{best:012d}"
    assert json.loads((kept / "evaluation.json").read_text())["value"] == scores[best]
    assert not (run / "evaluation").exists()
    assert main(["sample", f"checkpoint={run / 'best'}", "num_images=3", f"out={tmp_path / 'out'}"]) == 0
    request = json.loads((tmp_path / "out" / "samples.json").read_text())["request"]
    assert Path(request["checkpoint"]["path"]).parent.name == "best"


def test_features_stay_on_request(run, tmp_path):
    asked = (f"checkpoint={run}", f"out={tmp_path / 'a.json'}", "keep_features=true", "range_size=30", *WAYS)
    assert main(["evaluate", *asked]) == 0
    (folder,) = tmp_path.glob("a.features-*")
    assert sorted(file.name for file in folder.glob("0*")) == [f"{number:06d}.safetensors" for number in range(3)]


def test_a_stop_while_real_images_are_measured_keeps_the_features_of_the_samples(run, tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    asked = ("evaluate", f"checkpoint={run}", f"out={out}", "metrics=[fid,vlb]", "likelihood_images=2", *WAYS)

    def stopped(*arguments, **options):
        raise Preempted("stopped by signal")

    with monkeypatch.context() as patch:
        patch.setattr("diffussm.commands.measuring.measure_images", stopped)
        assert main(asked) == 75
    assert list(tmp_path.glob("a.features-*/0*.safetensors")) and not out.exists()
    monkeypatch.setattr("diffussm.evaluation.generate.Generator.generate", lambda *_: pytest.fail("drawn again"))
    assert main(asked) == 0
    assert {"metrics", "image_metrics"} < results(out).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl"]


def test_samples_that_have_lost_a_file_are_not_there(run, drawn, tmp_path, capsys):
    for form, name in (("png", "000149.png"), ("npz", "samples.npz"), ("tar", "shard-000002.tar")):
        shutil.copytree(drawn / form, tmp_path / form)
        asked = ("num_images=150", "labels=balanced", "range_size=64", f"format={form}", f"out={tmp_path / form}")
        assert main(["sample", f"checkpoint={run}", *WAYS, *asked]) == 0
        (tmp_path / form / name).unlink()
        assert main(["sample", f"checkpoint={run}", *WAYS, *asked]) == 73
        assert f"{tmp_path / form / name}: is gone: delete" in capsys.readouterr().err


def test_the_inception_score_of_sorted_samples_comes_with_a_remark(in_tmp, monkeypatch, capsys):
    monkeypatch.setattr("diffussm.commands.measuring.SPLIT_SIZE", 100)
    images, labels = Digits().images[:300].permute(0, 2, 3, 1).numpy(), np.arange(300) // 30
    remark = "IS is of chunks of 100 images, and these are in the order of their classes"
    for name, order in (("sorted", labels), ("mixed", labels[::-1].reshape(10, 30).T.ravel())):
        np.savez(f"{name}.npz", arr_0=images, labels=order)
        assert main(["evaluate", f"samples={name}.npz", "evaluation=digits"]) == 0
        assert (remark in " ".join(capsys.readouterr().err.split())) == (name == "sorted")


def test_samples_of_an_earlier_version_are_known(run, drawn, tmp_path, capsys):
    asked = ["sample", f"checkpoint={run}", "num_images=4", f"out={tmp_path / 'out'}"]
    assert main(asked) == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert not {"labels", "format", "range_size", "num_processes"} & record["request"].keys()
    earlier = {key: record[key] for key in ("request", "weights", "complete")}
    (tmp_path / "out" / "samples.json").write_text(json.dumps(earlier))
    assert main(asked) == 0
    assert "these 4 images are there already" in capsys.readouterr().out
