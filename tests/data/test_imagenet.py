"""ImageNet: its 1,000 names in order, found below either path, and a readable difference if any is missing."""

import shutil

import pytest
from photographs import crop

from diffussm.data import imagenet
from diffussm.data.imagenet import CLASSES, ImageNet
from diffussm.data.images import ImageFolder
from diffussm.runtime.errors import DataError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """All classes with an image each in train/, the first two in val/."""
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / f"{name}_1.JPEG").touch()
    crop(0).save(tmp_path / "train" / CLASSES[7] / f"{CLASSES[7]}_1.JPEG")
    for name in CLASSES[:2]:
        shutil.copytree(tmp_path / "train" / name, tmp_path / "val" / name)
    monkeypatch.setitem(imagenet.NUM_IMAGES, "train", 1000)
    return tmp_path


def test_the_names_are_the_thousand_in_order():
    assert len(set(CLASSES)) == 1000 and list(CLASSES) == sorted(CLASSES)
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in CLASSES)
    # tench, goldfish, tabby, toilet tissue: labels that everyone knows
    assert [CLASSES.index(name) for name in ("n01440764", "n01443537", "n02123045", "n15075141")] == [
        0,
        1,
        281,
        999,
    ]


def test_a_complete_split_is_found_below_either_path(root):
    source = ImageNet(root, resolution=16)
    assert source.num_classes == 1000 and source.class_names == list(CLASSES) and len(source) == 1000
    image, label = source[7]
    assert label == 7 and image.shape == (3, 16, 16) and image.float().std() > 0
    assert ImageNet(root / "train", resolution=16).fingerprint == source.fingerprint
    assert source.fingerprint != ImageFolder(root / "train", resolution=16).fingerprint


def test_what_differs_is_said_and_can_be_accepted(root):
    for name in CLASSES[:2]:
        shutil.rmtree(root / "train" / name)
    (root / "train" / CLASSES[5]).rename(root / "train" / "tench")
    with pytest.raises(DataError) as caught:
        ImageNet(root, resolution=16)
    assert str(caught.value) == (
        f"data.path={root / 'train'}: ImageNet-1k train has 1,000 classes and 1,000 images, here 998 and 998: "
        f"missing n01440764 n01443537 {CLASSES[5]}: not of it tench; set data.check=false to use it as it is"
    )
    source = ImageNet(root, resolution=16, check=False)
    assert source.num_classes == 998 and source.class_names[-1] == "tench"


def test_missing_images_count_too(root, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(
        DataError, match=r"1,000 classes and 1,281,167 images, here 1,000 and 1,000; set data\.check="
    ):
        ImageNet(root, resolution=16)


def test_of_many_names_the_first_are_shown(root):
    with pytest.raises(DataError) as caught:
        ImageNet(root, split="val", resolution=16)
    said = str(caught.value)
    assert f"val has 1,000 classes and 50,000 images, here 2 and 2: missing {CLASSES[2]} " in said
    assert said.count("n0") == 5 and "and 993 more" in said and "\n" not in said
    assert ImageNet(root, split="val", resolution=16, check=False).fingerprint["split"] == "val"
