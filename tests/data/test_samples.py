"""Samples as files: what is written is read back in every format, and what is no sample is refused in one line."""

import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.data.sample_files import NPZ, NpzFile, PngFiles, TarFiles
from diffussm.data.samples import RECORD, open_samples
from diffussm.runtime.errors import DataError, RunDirectoryError, StorageError
from diffussm.runtime.run_dir import write_json

RANGES = [range(5), range(5, 10), range(10, 12)]
LABELS = [index % 3 for index in range(12)]


def pixels(channels=3, count=12):
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, 6, 4), generator=generator, dtype=torch.uint8)


def write(form, path, images, labels=LABELS):
    path.mkdir()
    files = {
        "png": lambda: PngFiles(path),
        "tar": lambda: TarFiles(path),
        "npz": lambda: NpzFile(path, path / "pieces", tuple(images.shape[1:])),
    }[form]()
    for number, part in reversed(list(enumerate(RANGES))):  # in any order
        chosen = None if labels is None else [labels[index] for index in part]
        files.write(number, part, images[part.start : part.stop], chosen)
    files.finish(RANGES, labels)
    write_json(path / RECORD, {"labels": labels if form == "png" else None, "complete": True})
    return files


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
@pytest.mark.parametrize("form", ["png", "npz", "tar"])
def test_what_is_written_is_read_back(tmp_path, form, labels, channels):
    images = pixels(channels)
    write(form, tmp_path / "out", images, labels)
    Image.new("RGB", (50, 50)).save(tmp_path / "out" / "grid.png")
    samples = open_samples(tmp_path / "out", channels)
    assert len(samples) == 12 and samples.image_shape == (channels, 6, 4)
    assert torch.equal(torch.stack([samples[index][0] for index in range(12)]), images)
    assert [samples[index][1] for index in range(12)] == (labels or [-1] * 12)
    write(form, tmp_path / "again", images, labels)
    other = images.clone()
    other[7, 0, 0, 0] ^= 1
    write(form, tmp_path / "other", other, labels)
    again, other = (open_samples(tmp_path / name, channels).sha256 for name in ("again", "other"))
    assert samples.sha256 == again != other


def test_numpy_reads_the_npz_and_so_does_who_expects_adms(tmp_path):
    write("npz", tmp_path / "out", pixels())
    with np.load(tmp_path / "out" / NPZ) as arrays:
        assert arrays["arr_0"].shape == (12, 6, 4, 3) and arrays["arr_0"].dtype == np.uint8
        assert (
            np.array_equal(arrays["arr_0"], pixels().permute(0, 2, 3, 1)) and arrays["labels"].tolist() == LABELS
        )
    with zipfile.ZipFile(tmp_path / "out" / NPZ) as archive:
        assert archive.testzip() is None
    np.savez(tmp_path / "adm.npz", pixels().permute(0, 2, 3, 1).numpy(), np.array(LABELS))  # arr_0 and arr_1
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels().permute(0, 2, 3, 1).numpy())
    for name, labels in (("adm.npz", LABELS), ("small.npz", None)):
        samples = open_samples(tmp_path / name, 3)
        assert samples.labels == labels and torch.equal(samples[5][0], pixels()[5])


def test_tar_files_hold_an_image_and_its_class_side_by_side(tmp_path):
    write("tar", tmp_path / "out", pixels())
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    with tarfile.open(tmp_path / "out" / names[1]) as archive:
        assert archive.getnames()[:4] == ["000005.png", "000005.cls", "000006.png", "000006.cls"]
        assert archive.extractfile("000006.cls").read() == b"0"
    assert len(open_samples(tmp_path / "out" / names[2], 3)) == 2


@pytest.mark.parametrize("form", ["png", "npz", "tar"])
def test_a_range_that_went_missing_is_named_at_the_end(tmp_path, form):
    files = write(form, tmp_path / "out", pixels())
    gone = {"png": "000007.png", "npz": "pieces/000001.pixels", "tar": "shard-000001.tar"}[form]
    (tmp_path / "out" / gone).unlink()
    with pytest.raises((RunDirectoryError, StorageError), match=gone.rpartition("/")[2]):
        files.finish(RANGES, LABELS)


def test_folders_are_taken_as_they_are_flat_or_by_class(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(np.full((4, 4, 3), 10 * label + index, np.uint8)).save(
                tmp_path / "classes" / name / f"{index}.png"
            )
    samples = open_samples(tmp_path / "classes", 3)
    assert samples.labels == [0, 0, 1, 1]
    assert [int(samples[index][0].max()) for index in range(4)] == [0, 1, 10, 11]
    assert open_samples(tmp_path / "classes" / "dog", 3).labels is None


def damaged(path, kind):
    """Something in a folder, a file or beside one that is no set of samples."""
    image = Image.new("RGB", (4, 4))
    if kind == "sizes":
        image.save(path / "a.png")
        Image.new("RGB", (5, 4)).save(path / "b.png")
    elif kind == "colour":
        image.save(path / "a.png")
    elif kind == "broken":
        image.save(path / "a.png")
        (path / "b.png").write_text("no image")
    elif kind == "unfinished":
        write_json(path / RECORD, {"complete": False})
    elif kind == "statistics":
        np.savez(path / "x.npz", mu=np.zeros(3))
    elif kind == "floats":
        np.savez(path / "x.npz", arr_0=np.zeros((2, 4, 4, 3)))
    elif kind == "objects":
        np.savez(path / "x.npz", arr_0=np.array([{}, {}], dtype=object))
    elif kind == "cut":
        np.savez(path / "x.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
        (path / "x.npz").write_bytes((path / "x.npz").read_bytes()[:100])
    elif kind == "tar":
        (path / "x.tar").write_text("no archive" * 100)
    elif kind == "record":
        (path / RECORD).write_text("[]")


REFUSALS = [
    ("sizes", 3, "b.png is 5x4, the first 4x4: give one size"),
    ("colour", 1, "images of 3 channels, evaluation.extractor measures 1"),
    ("broken", 3, "b.png: not a readable image"),
    ("unfinished", 3, "not all images are there yet: run the same"),
    ("statistics", 3, "has no arr_0"),
    ("floats", 3, "arr_0 is float64"),
    ("objects", 3, "no plain array of numbers"),
    ("cut", 3, "not samples"),
    ("tar", 3, "no whole tar file"),
    ("record", 3, "samples.json is damaged"),
    ("empty", 3, "no images"),
]


@pytest.mark.parametrize(("kind", "channels", "says"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_what_is_no_set_of_samples_is_refused(tmp_path, kind, channels, says):
    damaged(tmp_path, kind)
    path = next((file for file in tmp_path.iterdir() if file.suffix in (".npz", ".tar")), tmp_path)
    with pytest.raises(DataError, match=r"samples|not a readable") as refused:
        samples = open_samples(path, channels)
        samples.sha256  # noqa: B018  (looks at all of them)
        [samples[index] for index in range(len(samples))]
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_an_image_of_another_size_is_refused_when_it_is_read(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for index, width in enumerate((4, 5)):
            Image.new("RGB", (width, 4)).save(tmp_path / f"{index}.png")
            archive.add(tmp_path / f"{index}.png", f"{index}.png")
    with pytest.raises(DataError, match=r"image 1 is \(3, 4, 5\), the first \(3, 4, 4\)"):
        open_samples(tmp_path / "x.tar", 3)[1]


def test_a_record_that_is_no_json_of_ours_is_damage(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"complete": True, "labels": ["a"]}))
    with pytest.raises(DataError, match="labels are no integers"):
        open_samples(tmp_path, 3)
