"""Image sources: real digits, folders with and without classes, ADM's crop, and files that are no images."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.data.images import Digits, ImageFolder, center_crop
from diffussm.runtime.errors import DataError


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


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (300, 64), (1000, 777), (10, 30), (127, 128)])
def test_crop_has_the_asked_size_at_any_size(size):
    assert center_crop(Image.new("RGB", size), 64).shape == (64, 64, 3)


def test_crop_is_adms():
    """Halve by averaging while twice the target fits, then bicubic, then the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    halved = image.resize((45, 18), Image.Resampling.BOX)  # 37 >= 2 * 16, 18 < 2 * 16
    scaled = np.array(halved.resize((40, 16), Image.Resampling.BICUBIC))  # 16 / 18 of 45 and of 18
    assert np.array_equal(center_crop(image, 16), scaled[:, 12:28])


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for index in range(2):
        with pytest.raises(DataError, match=r"(text\.png|empty\.jpg): not a readable image"):
            ImageFolder(tmp_path, resolution=8)[index]


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
