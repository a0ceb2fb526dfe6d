"""What every source keeps to, and those of Hugging Face and of noise."""

import json
import pickle
import sys

import pytest
import torch
from photographs import crop, encoded
from torch.utils.data import DataLoader

from diffussm.data.decode import center_crop, decode
from diffussm.data.fake import Fake
from diffussm.data.huggingface import HuggingFace
from diffussm.data.images import Digits, ImageFolder, Photographs
from diffussm.runtime.errors import BadImage, ConfigError, DataError


def make_folder(path):
    for name in ("flower", "temple"):
        (path / name).mkdir(parents=True)
        for index in range(3):
            crop(index).save(path / name / f"{index}.jpg")
    return path


def make_rows(count: int = 6, **columns: list):
    datasets = pytest.importorskip("datasets")
    contents = [encoded(crop(index), "JPEG") for index in range(count)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["temple", "flower"])}
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    rows["label"] = [index % 2 for index in range(count)]
    features = datasets.Features({**kinds, **{name: datasets.Value("int64") for name in columns}})
    return datasets.Dataset.from_dict({**rows, **columns}, features=features), contents


@pytest.fixture
def saved(tmp_path):
    rows, contents = make_rows()
    rows.save_to_disk(tmp_path / "rows")
    return tmp_path / "rows", contents


@pytest.fixture(params=["digits", "image_folder", "flat", "fake", "unlabelled_fake", "huggingface"])
def source(request, tmp_path):
    if request.param == "digits":
        return Digits()
    if request.param == "image_folder":
        return ImageFolder(make_folder(tmp_path / "folder"), resolution=16)
    if request.param == "flat":
        return ImageFolder(make_folder(tmp_path / "folder") / "temple", resolution=16)
    if request.param == "huggingface":
        return HuggingFace(request.getfixturevalue("saved")[0], resolution=16)
    return Fake(num_images=50, num_classes=7 if request.param == "fake" else None, resolution=16)


def test_a_source_keeps_the_contract(source, tmp_path):
    classes = source.num_classes
    assert classes is None or classes >= 1
    assert len(source.class_names) == len(set(source.class_names)) == (classes or 0)
    assert 0 <= source.max_bad_fraction <= 1 and isinstance(source.horizontal_flip, bool)
    assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint
    assert source.fingerprint["image_shape"] == list(source.image_shape)
    assert str(tmp_path) not in json.dumps(source.fingerprint)
    assert (source.fingerprint.get("crop") == "adm_center v1") == isinstance(source, Photographs)
    names = [source.name_of(index) for index in range(len(source))]
    assert len(set(names)) == len(source) > 0 and not any(name.startswith("/") for name in names)
    labels = set()
    for index in range(len(source)):
        image, label = source[index]
        assert image.shape == source.image_shape and image.dtype == torch.uint8 and image.is_contiguous()
        assert type(label) is int
        labels.add(label)
    assert labels <= set(range(classes)) if classes else labels == {-1}
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_source_can_go_to_another_process(source):
    here = [source[index] for index in range(6 if len(source) > 5 else 3)]
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint and again.class_names == source.class_names
    there = DataLoader(source, num_workers=2, sampler=range(len(here)), batch_size=None)
    for index, ((image, label), (theirs, their_label)) in enumerate(zip(here, there, strict=True)):
        assert torch.equal(image, theirs) and label == their_label
        assert torch.equal(image, again[index][0]) and label == again[index][1]


def test_shares_and_sizes_that_cannot_be_are_refused(tmp_path):
    make_folder(tmp_path)
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"max_bad_fraction={share}: must lie in 0\.\.1"):
            ImageFolder(tmp_path, max_bad_fraction=share)
    assert ImageFolder(tmp_path, max_bad_fraction=1).max_bad_fraction == 1
    with pytest.raises(ValueError, match="resolution=0"):
        ImageFolder(tmp_path, resolution=0)


def test_noise_is_a_function_of_the_index():
    source = Fake(num_images=10, num_classes=3, resolution=64)
    assert torch.equal(source[4][0], Fake(num_images=20, num_classes=None, resolution=64)[4][0])
    assert not torch.equal(source[4][0], source[5][0])
    assert len(source[0][0].unique()) == 256 and abs(source[0][0].float().mean() - 127.5) < 3
    assert [source[index][1] for index in range(10)] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("key", ["num_images", "num_classes", "resolution"])
def test_noise_of_no_size_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}=0: must be at least 1"):
        Fake(**{key: 0})


def test_rows_are_decoded_and_cropped_as_files_are(saved):
    path, contents = saved
    source = HuggingFace(path, resolution=16)
    assert source.class_names == ["temple", "flower"]
    for index, content in enumerate(contents):
        image, label = source[index]
        assert torch.equal(image, torch.from_numpy(center_crop(decode(content), 16)).permute(2, 0, 1))
        assert label == index % 2
    unlabelled = HuggingFace(path, label_column=None, resolution=16)
    assert unlabelled.num_classes is None and unlabelled[0][1] == -1


def test_a_split_is_chosen_of_several(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, _ = make_rows()
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows")
    assert len(HuggingFace(tmp_path / "splits", split="test")) == 2
    for split in (None, "val"):
        with pytest.raises(ConfigError, match=rf"data\.split={split}: .*splits has train, test: choose one"):
            HuggingFace(tmp_path / "splits", split=split)
    with pytest.raises(ConfigError, match=r"data\.split=train: .*rows has no splits: set it to null"):
        HuggingFace(tmp_path / "rows", split="train")


def test_columns_that_cannot_be_are_named(tmp_path):
    rows, _ = make_rows(number=list(range(6)))
    rows.save_to_disk(tmp_path / "rows")
    for options, says in (
        ({"image_column": "img"}, r"data\.image_column=img: no such column: has image, label, number"),
        ({"image_column": "label"}, r"data\.image_column=label: holds ClassLabel, not Image"),
        ({"label_column": "class"}, r"data\.label_column=class: no such column: class_encode_column\('class'\)"),
        ({"label_column": "number"}, r"data\.label_column=number: holds Value, not ClassLabel: class_encode"),
    ):
        with pytest.raises(ConfigError, match=says):
            HuggingFace(tmp_path / "rows", **options)


def test_rows_without_label_or_image_are_found(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, contents = make_rows()
    labels = [0, 1, -1, None, 1, 0]
    images = [{"bytes": content, "path": None} for content in contents]
    images[1], images[2] = None, {"bytes": b"text", "path": "picture.jpg"}
    images[3], images[4] = {"bytes": b"", "path": None}, {"bytes": b"", "path": "picture.jpg"}
    features = rows.features
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(
        tmp_path / "rows"
    )
    with pytest.raises(DataError, match=r"data\.label_column=label: 2 of 6 images have no label"):
        HuggingFace(tmp_path / "rows")
    source = HuggingFace(tmp_path / "rows", label_column=None, resolution=16)
    for index, reason in ((1, "no image in this row"), (2, "damaged"), (3, "empty"), (4, "empty")):
        with pytest.raises(BadImage, match=f"row {index}: .*{reason}"):
            source[index]
    assert source[0][0].shape == (3, 16, 16) and source.fingerprint["num_images"] == 6


def test_the_fingerprint_of_rows_follows_their_content(saved, tmp_path):
    path, _ = saved
    fingerprint = HuggingFace(path).fingerprint
    path.rename(tmp_path / "moved")
    assert HuggingFace(tmp_path / "moved").fingerprint == fingerprint
    rows, _ = make_rows()
    relabelled = rows.map(lambda row: {"label": 1 - row["label"]})
    for number, other in enumerate((rows.select([2, 1, 0, 3, 4, 5]), relabelled, rows.select(range(5)))):
        other.save_to_disk(tmp_path / str(number))
        assert HuggingFace(tmp_path / str(number)).fingerprint != fingerprint


def test_rows_are_opened_where_they_are_first_used(saved, monkeypatch):
    datasets = pytest.importorskip("datasets")
    source = HuggingFace(saved[0], resolution=16)
    reference = source[3]
    calls, load = [], datasets.load_from_disk
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: calls.append(path) or load(path))
    again = pickle.loads(pickle.dumps(source))
    assert calls == [] and again.num_classes == 2 and calls == []
    assert torch.equal(again[3][0], reference[0]) and calls == [str(saved[0])]


def test_what_datasets_has_not_written_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"nowhere: no such directory"):
        HuggingFace(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.path=.*: not what save_to_disk writes") as caught:
        HuggingFace(make_folder(tmp_path / "folder"))
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffussm\[huggingface\]'"):
        HuggingFace(tmp_path)
