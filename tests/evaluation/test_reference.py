"""References: ADM's files and parts of them are read as they are; others, and hostile ones, are refused."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffussm.evaluation.features import DIGITS_WEIGHTS, DigitsCNN
from diffussm.evaluation.reference import FREE_BYTES, Reference
from diffussm.runtime.errors import ConfigError, DataError

COMMITTED = DIGITS_WEIGHTS.with_name("digits_reference.npz")
MOMENTS = {"mu": np.zeros(4, np.float32), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)


def write(path: Path, **arrays) -> Reference:
    np.savez(path, **arrays)
    return Reference(path)


def test_adms_layout_is_read_as_it_is(tmp_path):
    labels = np.array([5, 7])
    reference = write(tmp_path / "adm.npz", arr_0=IMAGES, arr_1=labels, **MOMENTS)
    assert reference.images.shape == (2, 3, 4, 6)
    assert np.array_equal(reference.images.permute(0, 2, 3, 1), IMAGES)
    assert reference.pool[0].dtype == np.float32 and len(reference.spatial[0]) == 3
    assert reference.preprocessing == "unknown" and reference.held_out is None


def test_parts_of_the_layout_are_references_too(tmp_path):
    only_moments = write(tmp_path / "a.npz", mu=MOMENTS["mu"], sigma=MOMENTS["sigma"])
    assert only_moments.images is None and only_moments.spatial is None and only_moments.pool is not None
    only_images = write(tmp_path / "b.npz", arr_0=IMAGES)
    assert only_images.pool is None and only_images.images is not None


SENSELESS = [
    ({"arr_1": IMAGES}, "has neither mu and sigma nor arr_0"),
    ({"mu": MOMENTS["mu"]}, "has only one of mu and sigma"),
    ({"mu_s": MOMENTS["mu_s"], "sigma_s": MOMENTS["sigma_s"], "arr_0": IMAGES}, "has mu_s and sigma_s, but no mu"),
    ({"mu": np.zeros(4), "sigma": np.eye(5)}, "are not of one size"),
    ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "is not finite"),
    ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "not numbers with a point"),
    ({"arr_0": IMAGES / 255}, "images must be uint8"),
    ({"arr_0": IMAGES[0]}, "images must be uint8"),
]


@pytest.mark.parametrize(("arrays", "says"), SENSELESS)
def test_files_that_make_no_sense_are_named_with_the_reason(tmp_path, arrays, says):
    with pytest.raises(DataError, match=f"^evaluation.reference=.*x.npz: not a reference file: .*{says}") as error:
        write(tmp_path / "x.npz", **arrays)
    assert "\n" not in str(error.value)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hostile-was-here"),)


def npy(shape: str, dtype: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(path: str, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


def test_hostile_archives_are_refused_and_nothing_runs_or_grows(in_tmp):
    objects = io.BytesIO()
    np.save(objects, np.array([Hostile()], dtype=object), allow_pickle=True)
    mu = npy("(4,)", "<f8", bytes(32))
    archive("pickle.npz", mu=objects.getvalue(), sigma=mu)
    archive("bare.npz", mu=pickle.dumps(Hostile()), sigma=mu)
    archive("huge.npz", mu=npy("(10 ** 15,)", "<f8"), sigma=mu)
    archive("vast.npz", mu=mu, sigma=npy("(1000000000, 1000000000)", "<f8", bytes(64)))
    archive("negative.npz", arr_0=npy("(-1, 8, 8, 3)", "|u1"))
    archive("short.npz", arr_0=npy("(2, 8, 8, 3)", "|u1", bytes(10)))
    bomb = npy(f"({2 * FREE_BYTES // 64}, 8, 8, 1)", "|u1", bytes(2 * FREE_BYTES))
    archive("bomb.npz", zipfile.ZIP_DEFLATED, arr_0=bomb)
    archive("header.npz", mu=npy("(" * 5000, "<f8"), sigma=mu)
    with zipfile.ZipFile("twice.npz", "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            file.writestr("mu.npy", mu)
    whole = COMMITTED.read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    Path("flipped.npz").write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    files = sorted(in_tmp.glob("*.npz"))
    assert len(files) == 11
    for path in files:
        with pytest.raises(DataError, match=rf"^evaluation\.reference=.*{path.name}: not a reference file: "):
            Reference(path)
    assert not Path("hostile-was-here").exists()


def test_images_that_pack_well_are_no_bomb(tmp_path):
    """The digits unpack to five times their size, and a small file may unpack to whatever it likes."""
    np.savez_compressed(tmp_path / "black.npz", arr_0=np.zeros((1000, 32, 32, 3), np.uint8))
    assert Reference(tmp_path / "black.npz").images.shape == (1000, 3, 32, 32)


def test_another_extractors_statistics_are_refused_naming_both_sides(tmp_path):
    reference = write(tmp_path / "x.npz", **MOMENTS)
    with pytest.raises(ConfigError, match=r"x\.npz: statistics of 4 pool features, digits has 64: choose"):
        reference.refuse_extractor(DigitsCNN.pretrained())
    with np.load(COMMITTED) as whole:
        arrays = {**whole, "extractor": np.array("digits"), "extractor_sha256": np.array("abc")}
    with pytest.raises(ConfigError, match=r"statistics of digits with SHA-256 abc, this digits has [0-9a-f]{64}:"):
        write(tmp_path / "y.npz", **arrays).refuse_extractor(DigitsCNN.pretrained())
    Reference(COMMITTED).refuse_extractor(DigitsCNN.pretrained())


def test_other_sizes_and_preprocessing_are_refused_naming_both_sides(tmp_path):
    reference = Reference(COMMITTED)
    reference.refuse_images((1, 8, 8), "whatever, for this file does not tell")
    with pytest.raises(ConfigError, match=r"images of shape \(1, 8, 8\), the data has \(3, 16, 16\): choose"):
        reference.refuse_images((3, 16, 16))
    known = {
        "preprocessing": np.array("image_folder, cropped to 4x6"),
        "preprocessing_sha256": np.array("0" * 64),
    }
    with pytest.raises(
        ConfigError, match="made from image_folder, cropped to 4x6; the data is prepared otherwise: b"
    ):
        write(tmp_path / "x.npz", arr_0=IMAGES, **known).refuse_images((3, 4, 6), "by squeezing")
