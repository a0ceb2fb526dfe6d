"""Image sources: real digits, folders with and without classes, links, and files that are no images."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.data.images import Digits, ImageFolder
from diffussm.data.packed import PackedStrings
from diffussm.runtime.errors import BadImage, DataError


def test_digits_are_the_real_ones_and_the_splits_share_none():
    train, held_out = Digits("train"), Digits("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.images.shape == (1437, 1, 8, 8) and train.images.dtype == torch.uint8
    assert train.images.max() == 255 and len(train.images.unique()) == 17
    assert set(train.labels.tolist()) == set(held_out.labels.tolist()) == set(range(10))
    from sklearn.datasets import load_digits

    everything = sorted(
        map(tuple, np.rint(load_digits().images * 255 / 16).astype(int).reshape(1797, 64).tolist())
    )
    ours = sorted(map(tuple, torch.cat([train.images, held_out.images]).flatten(1).tolist()))
    assert ours == everything


def test_the_split_is_a_function_of_its_seed():
    assert torch.equal(Digits().images, Digits().images)
    assert not torch.equal(Digits().images, Digits(split_seed=1).images)


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for index in range(3):
            color = (100 * label + index, 0, 255)
            Image.new("RGB", (40 + index, 50), color).save(tmp_path / name / "deeper" / f"{index}.png")
    return tmp_path


def test_class_folders_become_labels_in_order_of_name(folder):
    source = ImageFolder(folder, resolution=16)
    assert source.num_classes == 2 and source.class_names == ["cat", "dog"] and len(source) == 6
    image, label = source[4]
    assert label == 1 and image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [101, 0, 255]


def test_a_flat_folder_has_no_classes(folder):
    source = ImageFolder(folder / "cat" / "deeper", resolution=16)
    assert source.num_classes is None and len(source) == 3 and source[0][1] == -1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (20, 20)).save(tmp_path / f"image.{suffix}")
    assert ImageFolder(tmp_path, resolution=8)[0][0].shape == (3, 8, 8)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    source = ImageFolder(tmp_path, resolution=8)
    for index, name in enumerate(["empty.jpg", "text.png"]):
        with pytest.raises(BadImage, match=rf"^{name}: not a readable image") as caught:
            source[index]
        assert caught.value.name == source.name_of(index) == name


def test_folders_that_cannot_be_data_are_refused(tmp_path, folder):
    with pytest.raises(DataError, match=r"data\.path=.*nowhere: no such directory"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no images"):
        ImageFolder(tmp_path / "void")
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with pytest.raises(DataError, match="both images and folders"):
        ImageFolder(folder)


def test_identity_autoencoder_inverts_itself_on_every_value():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    autoencoder = IdentityAutoencoder()
    latents = autoencoder.to_latents(images)
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(autoencoder.to_pixels(latents), images)
    assert autoencoder.to_pixels(torch.tensor([[[[-9.0, 9.0, 0.0]]]])).flatten().tolist() == [0, 255, 128]


def test_16_bits_are_scaled_and_hidden_or_empty_folders_are_no_classes(tmp_path):
    for name in (".hidden", "empty", "real"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "real" / "deep.png")
    Image.new("RGB", (8, 8)).save(tmp_path / ".hidden" / "stray.png")
    source = ImageFolder(tmp_path, resolution=8)
    assert source.class_names == ["real"] and len(source) == 1
    assert source[0][0].unique().tolist() == [128]


def test_the_fingerprint_follows_the_names_not_the_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(folder, elsewhere)
    before = ImageFolder(folder, resolution=8).fingerprint
    assert ImageFolder(elsewhere, resolution=8).fingerprint == before
    (elsewhere / "dog").rename(elsewhere / "zebra")
    assert ImageFolder(elsewhere, resolution=8).fingerprint != before


def test_names_are_paths_below_the_folder_in_order(folder):
    source = ImageFolder(folder, resolution=8)
    names = [source.name_of(index) for index in range(len(source))]
    assert names == [f"{label}/deeper/{index}.png" for label in ("cat", "dog") for index in range(3)]
    assert source.name_of(-1) == "dog/deeper/2.png" and source[-1][1] == 1
    with pytest.raises(IndexError):
        source[6]


def test_labels_follow_classes_of_any_size(tmp_path):
    for label, count in enumerate([3, 1, 2]):
        (tmp_path / f"class{label}").mkdir()
        for index in range(count):
            Image.new("L", (4, 4), 50 * label + index).save(tmp_path / f"class{label}" / f"{index}.bmp")
    source = ImageFolder(tmp_path, resolution=4)
    assert [(int(image[0, 0, 0]), label) for image, label in source] == [
        (0, 0), (1, 0), (2, 0), (50, 1), (100, 2), (101, 2),
    ]  # fmt: skip


def test_links_are_followed_and_circles_end(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (9, 9)).save(elsewhere / "far.png")
    (folder / "bird").symlink_to(elsewhere)  # a class folder
    (folder / "cat" / "more").symlink_to(elsewhere)  # a folder within one
    (folder / "cat" / "again").symlink_to(elsewhere)
    (folder / "cat" / "deeper" / "circle").symlink_to(folder / "cat")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "dog" / "near.png").symlink_to(elsewhere / "far.png")
    source = ImageFolder(folder, resolution=8)
    assert source.class_names == ["bird", "cat", "dog"]
    counts = [sum(source.label(index) == label for index in range(len(source))) for label in range(3)]
    assert counts == [1, 3 + 1, 3 + 1]
    assert all(source[index][0].shape == (3, 8, 8) for index in range(len(source)))


def test_a_link_to_nowhere_is_a_bad_image_not_a_missing_one(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    source = ImageFolder(tmp_path, resolution=8)
    assert len(source) == 2
    with pytest.raises(BadImage, match=r"b\.png: .*No such file"):
        source[1]


def test_hidden_files_and_other_files_are_no_images(folder):
    for name in ("._0.png", ".DS_Store", "notes.txt", "0.png.part"):
        (folder / "cat" / "deeper" / name).write_bytes(b"")
    (folder / "cat" / ".thumbnails").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "cat" / ".thumbnails" / "0.png")
    (folder / "cat" / "folder.png").mkdir()
    assert len(ImageFolder(folder, resolution=8)) == 6


def test_folders_that_cannot_be_listed_are_named(folder):
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(DataError, match=r"loop: cannot be listed: Too many levels"):
        ImageFolder(folder)


def test_names_need_no_encoding(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff\xe4.png"))  # Latin-1 of old
    source = ImageFolder(tmp_path, resolution=8)
    assert source[0][0].shape == (3, 8, 8) and len(source.fingerprint["names_sha256"]) == 64


def test_a_million_names_take_little_memory_and_pickle_small(tmp_path):
    names = PackedStrings(b"n%08d/n%08d_%d.JPEG" % (i, i, i) for i in range(100_000))
    assert names[99_999] == b"n00099999/n00099999_99999.JPEG" and names[-100_000] == names[0]
    assert len(names) == 100_000 and len(pickle.dumps(names)) < 40 * len(names)
    assert len(PackedStrings([])) == 0 and list(map(bytes, PackedStrings([b"", b"a\0", b""]))) == [
        b"",
        b"a\0",
        b"",
    ]
    with pytest.raises(IndexError):
        names[100_000]
