"""`diffussm stats`: ADM's layout, the committed reference reproduced, equal bytes, refusals before any work."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data.damaged import write_configs
from data.photographs import crop, encoded

import diffussm.commands.stats  # noqa: F401  (before parts that it imports are replaced)
from diffussm.cli import main
from diffussm.data.decode import center_crop, decode
from diffussm.data.images import Digits, ImageFolder
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.features import DIGITS_WEIGHTS, DigitsCNN, Features
from diffussm.evaluation.reference import Reference, measure_reference, read_request, save_reference
from diffussm.runtime.errors import DataError
from diffussm.runtime.seeding import make_generator

COMMITTED = DIGITS_WEIGHTS.with_name("digits_reference.npz")
STATS = ("stats", "data=digits", "num_workers=0", "device=cpu")


class Colours:
    """An extractor of 16x16 RGB: pool is the mean colour, spatial the first row."""

    name, sha256, image_shape = "colours", "c0ffee", (3, 16, 16)

    def __init__(self, **settings):
        self.settings = settings

    def __call__(self, images):
        values = images.float()
        return Features(values.mean(dim=(2, 3)), values[:, :, 0].flatten(1), values[:, :, 0, 0])

    def to(self, device):
        return self


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_the_committed_reference_of_the_digits_is_reproduced(in_tmp, capsys):
    assert main([*STATS, "to=digits.npz"]) == 0
    with np.load("digits.npz", allow_pickle=False) as ours, np.load(COMMITTED) as theirs:
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            assert ours[key].dtype == np.float64
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-9 * np.abs(theirs[key]).max())
        assert ours["arr_0"].dtype == np.uint8 and sorted(rows(ours["arr_0"])) == sorted(rows(theirs["arr_0"]))
        assert rows(ours["arr_0"]) != rows(theirs["arr_0"])  # in a random order, not that of classes
        assert ours["count"] == 1437 and str(ours["extractor_sha256"]) == DigitsCNN.pretrained().sha256
        assert str(ours["preprocessing"]) == "digits train, value * 255 / 16 rounded"
        assert str(ours["preprocessing_sha256"]) == hashlib.sha256(b"value * 255 / 16 rounded").hexdigest()
    shown = " ".join(capsys.readouterr().out.split())
    assert "statistics of 1,437 images, by digits images 1,437 of 8x8x1" in shown


def test_an_evaluation_takes_the_file(in_tmp):
    assert main([*STATS, "to=digits.npz", "num_images=100"]) == 0
    evaluation = Evaluation(DigitsCNN.pretrained(), "digits.npz", num_samples=10)
    assert evaluation.reference.images.shape == (100, 1, 8, 8)
    known = {image.numpy().tobytes() for image in Digits().images}
    assert all(image.numpy().tobytes() in known for image in evaluation.reference.images)
    assert evaluation.record()["reference"]["preprocessing"] == "digits train, value * 255 / 16 rounded"
    committed = Reference(COMMITTED)
    assert np.allclose(evaluation.reference.pool[1], committed.pool[1])  # of all images, not of the hundred


def test_equal_requests_give_equal_bytes_and_the_answer_is_kept(in_tmp, capsys):
    assert main([*STATS, "to=a.npz"]) == 0
    assert main([*STATS, "to=below/b.npz", "num_workers=2"]) == 0
    content = Path("a.npz").read_bytes()
    assert content == Path("below/b.npz").read_bytes()
    time = Path("a.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*STATS, "to=a.npz"]) == 0
    assert "a.npz: holds these statistics already" in capsys.readouterr().out
    for other, says in (("seed=1", "seed"), ("num_images=7", "num_images"), ("data.split=held_out", "data, prep")):
        assert main([*STATS, "to=a.npz", other]) == 73
        assert f"to=a.npz: holds statistics of another request (other {says}" in capsys.readouterr().err
    assert main([*STATS, "to=a.npz", "num_images=20000"]) == 0  # there are no more
    assert (Path("a.npz").read_bytes(), Path("a.npz").stat().st_mtime_ns) == (content, time)
    assert sorted(path.name for path in in_tmp.rglob("*")) == ["a.npz", "b.npz", "below"]


def test_another_seed_stores_others_of_the_same_statistics(in_tmp):
    for seed in (0, 1):
        assert main([*STATS, f"to={seed}.npz", "num_images=50", f"seed={seed}", "batch_size=33"]) == 0
    with np.load("0.npz") as a, np.load("1.npz") as b:
        assert sorted(rows(a["arr_0"])) != sorted(rows(b["arr_0"]))
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-6, atol=1e-6)


def make_photographs(folder: Path, count: int = 40) -> Path:
    for index in range(count):
        (folder / str(index % 2)).mkdir(parents=True, exist_ok=True)
        (folder / str(index % 2) / f"{index:02d}.png").write_bytes(encoded(crop(index), "PNG"))
    return folder


@pytest.mark.parametrize("num_images", [10, 30, 1000])
def test_unreadable_images_are_listed_and_others_take_their_place(in_tmp, monkeypatch, capsys, num_images):
    monkeypatch.setattr("diffussm.build.evaluating.construct", lambda node, key: Colours())
    folder = make_photographs(Path("photographs"))
    damaged = ["0/00.png", "0/04.png", "1/05.png", "1/39.png"]
    for name in damaged:
        (folder / name).write_bytes(b"")
    command = ["stats", "data=image_folder", "data.path=photographs", "data.resolution=16", "num_workers=2"]
    command += ["batch_size=7", "to=p.npz", f"num_images={num_images}"]
    assert main(command) == 65
    said = capsys.readouterr().err.splitlines()[-1]
    assert "images cannot be read, more than data.max_bad_fraction=0.01 allows" in said
    assert not Path("p.npz").exists()
    assert main([*command, "data.max_bad_fraction=0.1"]) == 0
    records = [json.loads(line) for line in Path("p.bad_files.jsonl").read_text().splitlines()]
    assert sorted(record["file"] for record in records) == damaged
    assert "left out 4 unreadable images, listed in p.bad_files.jsonl" in " ".join(capsys.readouterr().out.split())
    order = torch.randperm(40, generator=make_generator(0, "reference images")).tolist()
    source = ImageFolder(folder, 16)
    wanted = [source[index][0] for index in order if source.name_of(index) not in damaged][:num_images]
    assert any(source.name_of(index) in damaged for index in order[:30])
    with np.load("p.npz") as arrays:
        stored = arrays["arr_0"]
        assert arrays["count"] == 36 and np.array_equal(stored, torch.stack(wanted).permute(0, 2, 3, 1))
        sound = [path for path in sorted(folder.rglob("*.png")) if path.stat().st_size]
        means = [center_crop(decode(path), 16).mean(axis=(0, 1)) for path in sound]
        assert np.allclose(arrays["mu"], np.mean(means, axis=0), atol=1e-4)
        assert np.allclose(arrays["sigma"], np.cov(np.array(means).T), atol=1e-2)
        assert arrays["mu_s"].shape == (48,)
        pixels = "image_folder, upright, 8 bits of RGB, transparency over white, ADM's centre crop to 16x16"
        assert str(arrays["preprocessing"]) == pixels


def test_statistics_of_other_arithmetic_are_another_request(in_tmp, monkeypatch, capsys):
    make_photographs(Path("photographs"), 4)
    command = ["stats", "data=image_folder", "data.path=photographs", "data.resolution=16", "num_workers=0"]
    for settings, code in (({}, 0), ({"precision": "bf16"}, 73), ({}, 0)):
        extractor = Colours(**settings)
        monkeypatch.setattr("diffussm.build.evaluating.construct", lambda node, key, made=extractor: made)
        assert main([*command, "to=p.npz"]) == code
    assert "holds statistics of another request (other extractor)" in capsys.readouterr().err


def test_the_same_preprocessing_of_other_images_has_the_same_hash(in_tmp):
    hashes = []
    for option in ("data.split=train", "data.split=held_out"):
        assert main([*STATS, option, "to=x.npz"]) == 0
        with np.load("x.npz") as arrays:
            hashes.append((str(arrays["preprocessing_sha256"]), str(arrays["data_sha256"])))
        Path("x.npz").unlink()
    assert hashes[0][0] == hashes[1][0] and hashes[0][1] != hashes[1][1]


def test_what_is_there_and_not_ours_is_left_alone(in_tmp, capsys):
    np.savez("theirs.npz", mu=np.zeros(3))
    Path("text.npz").write_text("precious")
    Path("folder.npz").mkdir()
    before = {path: path.read_bytes() for path in in_tmp.iterdir() if path.is_file()}
    for name in ("theirs", "text", "folder"):
        assert main([*STATS, f"to={name}.npz"]) == 73
        assert f"to={name}.npz: exists and is not ours" in capsys.readouterr().err
    assert main([*STATS, "to=text.npz/x.npz"]) == 73
    assert "to=text.npz/x.npz: text.npz is a file: choose another file" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in in_tmp.iterdir() if path.is_file()} == before


def test_images_of_another_shape_and_latents_are_refused(in_tmp, capsys):
    configs = write_configs(in_tmp / "configs")
    before = sorted(in_tmp.rglob("*"))
    fake = ["stats", "data=fake", "data.resolution=16", "to=x.npz"]
    assert main(fake) == 2
    said = capsys.readouterr().err
    assert "evaluation.extractor: measures images of shape (1, 8, 8), the data has (3, 16, 16): choose" in said
    assert main(["stats", f"--config-dir={configs}", "data=coarse", "to=x.npz"]) == 2
    assert "data: holds latents, and statistics are of images" in capsys.readouterr().err
    assert sorted(in_tmp.rglob("*")) == before


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match=r"1 image.* could be read: statistics need at least 2"):
        measure_reference([torch.zeros(1, 3, 16, 16).byte()], Colours(), 10, torch.device("cpu"))
    with pytest.raises(DataError, match="0 image"):
        measure_reference([], Colours(), 10, torch.device("cpu"))


def test_arrays_are_stored_as_numpy_stores_them(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array("text"), "c": np.zeros((3, 4), np.uint8)}
    save_reference(tmp_path / "x.npz", arrays, {"seed": 1})
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # two runs may be fast
        assert archive.testzip() is None and archive.namelist() == ["a.npy", "b.npy", "c.npy", "request.npy"]
    with np.load(tmp_path / "x.npz", allow_pickle=False) as loaded:
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    assert read_request(tmp_path / "x.npz") == {"seed": 1} and read_request(tmp_path / "nowhere.npz") is None
