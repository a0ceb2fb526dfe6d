"""Decoding: every kind of picture comes out as it is meant to be seen, and whatever is none says why."""

import io
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from photographs import crop, encoded, photographs
from PIL import Image, ImageOps

from diffussm.data import decode as module
from diffussm.data.decode import Header, center_crop, decode, read_header
from diffussm.runtime.errors import BadImage, DataError

PHOTOGRAPH = crop(0)


def png(width: int, height: int, depth: int, kind: int, pixels: bytes, **chunks: bytes) -> bytes:
    """A PNG file made by hand: what Pillow does not write. `kind` 0 is grey, 2 RGB; pixels are filtered rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    others = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + others + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def pixels(content: bytes | Path) -> np.ndarray:
    image = decode(content)
    assert image.mode == "RGB"
    return np.array(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PHOTOGRAPH, "JPEG", exif=exif)
    shown = decode(content)
    assert np.array_equal(shown, ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert shown.size == (PHOTOGRAPH.size if orientation < 5 else PHOTOGRAPH.size[::-1])


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 9])
def test_headers_tell_the_size_of_the_upright_picture(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PHOTOGRAPH.convert("L"), "JPEG", exif=exif)
    (tmp_path / "file").write_bytes(content)
    assert read_header(content) == read_header(tmp_path / "file") == Header("JPEG", "L", *decode(content).size)


@pytest.mark.filterwarnings("error")
def test_warnings_are_not_for_those_who_read_a_million_images(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = encoded(PHOTOGRAPH, "JPEG", exif=exif.tobytes()[:-9])
    with pytest.raises(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(damaged)).getexif()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTOGRAPH.width * PHOTOGRAPH.height - 1)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(encoded(PHOTOGRAPH, "PNG")))
    for content in (damaged, encoded(PHOTOGRAPH, "PNG")):
        assert read_header(content).width == decode(content).width


@pytest.mark.filterwarnings("error")
def test_nonsense_in_exif_does_not_cost_the_picture():
    for nonsense in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03",
    ):
        content = encoded(PHOTOGRAPH, "JPEG", exif=nonsense)
        assert np.array_equal(pixels(content), pixels(encoded(PHOTOGRAPH, "JPEG")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_what_adm_makes_of_them(mode):
    content = encoded(PHOTOGRAPH.convert(mode), "JPEG")
    assert np.array_equal(pixels(content), Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled_not_clipped(format):
    grey = np.array(PHOTOGRAPH.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 200)
    assert np.array_equal(pixels(encoded(deep, format)), np.repeat(grey[:, :, None], 3, axis=2))


def test_16_bits_of_colour_are_scaled_too():
    deep = np.array([[[0x12FF, 0x8000, 0xFFFF], [0, 255, 256]]] * 2, dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert pixels(png(2, 2, 16, 2, rows))[0].tolist() == [[0x12, 0x80, 0xFF], [0, 0, 1]]


def test_palettes_and_bitmaps_are_looked_up():
    palette = PHOTOGRAPH.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(encoded(palette, "PNG")), palette.convert("RGB"))
    bitmap = PHOTOGRAPH.convert("1")
    assert np.array_equal(pixels(encoded(bitmap, "PNG")), bitmap.convert("RGB"))


def test_transparency_is_laid_over_white():
    alpha = np.zeros((48, 60), dtype=np.uint8)
    alpha[:16], alpha[16:32] = 255, 51
    image = PHOTOGRAPH.copy()
    image.putalpha(Image.fromarray(alpha))
    shown, colours = pixels(encoded(image, "PNG")).astype(float), np.array(PHOTOGRAPH).astype(float)
    assert np.array_equal(shown[:16], colours[:16]) and (shown[32:] == 255).all()
    assert np.abs(shown[16:32] - (0.2 * colours[16:32] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB"])
def test_transparency_of_any_kind_is_laid_over_white(mode):
    image = PHOTOGRAPH.convert(mode)
    if mode == "LA":
        image.putalpha(0)
        content, hidden = encoded(image, "PNG"), np.ones((48, 60), dtype=bool)
    else:  # one colour is transparent
        key = image.getpixel((30, 20))
        content = encoded(image, "PNG", transparency=key)
        hidden = (np.array(image).reshape(48, 60, -1) == key).all(axis=2)
    shown, colours = pixels(content), np.array(image.convert("RGB"))
    assert hidden.any() and (shown[hidden] == 255).all()
    assert np.array_equal(shown[~hidden], colours[~hidden])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_picture_and_outlives_its_file(format):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    shown = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    assert np.abs(center_crop(shown, 8) - np.array([255, 0, 0])).max() <= 2


def test_a_path_is_its_own_name_and_bytes_take_one(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(PHOTOGRAPH, "JPEG"))
    assert np.array_equal(pixels(path), pixels(path.read_bytes()))
    path.write_bytes(b"")
    for content, name, known_as in ((path, None, str(path)), (path, "picture", "picture"), (b"", "key", "key")):
        with pytest.raises(BadImage) as caught:
            decode(content, name)
        assert (caught.value.name, caught.value.reason) == (known_as, "empty")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.name, again.reason, str(again)) == (known_as, "empty", str(caught.value))


BAD = {
    "empty": (b"", "empty"),
    "text": (b"<html>404</html>", "damaged, or in none of the formats BMP, GIF, JPEG, PNG,"),
    "truncated": (encoded(PHOTOGRAPH, "JPEG")[:-100], "image file is truncated"),
    "truncated webp": (encoded(PHOTOGRAPH, "WEBP")[:-200], ""),
    "header only": (encoded(PHOTOGRAPH, "PNG")[:60], ""),
    "overwritten": (encoded(PHOTOGRAPH, "PNG")[:400] + b"U" * 5000, "Truncated File Read"),
    "1x1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels: the shorter side must have at least 2"),
    "a line": (
        encoded(Image.new("L", (900, 2)), "PNG"),
        "900x2 pixels: one side is more than 100 times the other",
    ),
    "bomb": (png(12_000, 12_000, 8, 0, b""), "12000x12000 pixels are more than 134,217,728"),
    "larger bomb": (png(50_000, 50_000, 1, 0, b""), "more than 134,217,728 pixels"),
    "text bomb": (
        png(8, 8, 8, 0, bytes(72), zTXt=b"a\0\0" + zlib.compress(bytes(10**8))),
        "Decompressed data too",
    ),
    "floats": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "pixels of 32 bits"),
    "integers": (encoded(Image.new("I", (9, 9), 10**6), "TIFF"), "pixels of 32 bits"),
    "a program": (encoded(PHOTOGRAPH, "EPS"), "damaged, or in none of the formats"),
}


@pytest.mark.fault("G8")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_says_why_in_one_short_line(kind, tmp_path):
    content, reason = BAD[kind]
    (tmp_path / "file.jpg").write_bytes(content)
    for given in (content, tmp_path / "file.jpg"):
        with pytest.raises(BadImage) as caught:
            decode(given, "the name")
        assert reason in caught.value.reason and 0 < len(caught.value.reason) <= 100
        assert "\n" not in str(caught.value) and str(caught.value).startswith("the name: not a readable image (")
        assert " at 0x" not in caught.value.reason and str(tmp_path) not in caught.value.reason


def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr(module, "_turn_upright", fail)
    with pytest.raises(MemoryError):
        decode(encoded(PHOTOGRAPH, "JPEG"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
def test_damage_of_any_kind_gives_pixels_or_a_bad_image(format):
    sound, draws = encoded(PHOTOGRAPH, format), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(sound)
        for place in draws.integers(min(300, len(sound)), size=4):
            damaged[place] = draws.integers(256)
        try:
            assert decode(bytes(damaged[: draws.integers(1, 2 * len(sound))])).mode == "RGB"
        except BadImage as error:
            refused += 1
            assert error.reason and "\n" not in str(error)
    assert refused > 5


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (300, 64), (1000, 777), (10, 30), (127, 128)])
def test_crop_has_the_asked_size_at_any_size(size):
    assert center_crop(Image.new("RGB", size), 64).shape == (64, 64, 3)


def test_crop_is_adms():
    """Halve by averaging while twice the target fits, then bicubic, then the middle."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    halved = image.resize((45, 18), Image.Resampling.BOX)  # 37 >= 2 * 16, 18 < 2 * 16
    scaled = np.array(halved.resize((40, 16), Image.Resampling.BICUBIC))  # 16 / 18 of 45 and of 18
    assert np.array_equal(center_crop(image, 16), scaled[:, 12:28])


@pytest.mark.parametrize("resolution", [32, 64, 200, 256, 427, 500])
@pytest.mark.parametrize("index", [0, 1])
def test_crop_of_photographs_equals_slow_arithmetic(index, resolution):
    photograph = photographs()[index]
    assert np.array_equal(center_crop(photograph, resolution), slow_crop(np.array(photograph), resolution))


def slow_crop(image: np.ndarray, resolution: int) -> np.ndarray:
    while min(image.shape[:2]) >= 2 * resolution:
        image = slow_resize(image, image.shape[1] // 2, image.shape[0] // 2, box, 0.5)
    scale = resolution / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    image = slow_resize(image, width, height, bicubic, 2.0)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return image[top : top + resolution, left : left + resolution]


def slow_resize(image: np.ndarray, width: int, height: int, kernel, support: float) -> np.ndarray:
    """Along the rows, rounded to 8 bits, then along the columns."""
    rows = slow_pass(image, width, kernel, support)
    return slow_pass(rows.swapaxes(0, 1), height, kernel, support).swapaxes(0, 1)


def slow_pass(image: np.ndarray, size: int, kernel, support: float) -> np.ndarray:
    """(H, W, 3) to (H, size, 3): weighted means with weights in fixed point of 22 bits, as Pillow has them."""
    before = image.shape[1]
    if before == size:
        return image
    scale = before / size
    stretch = max(scale, 1.0)
    columns = []
    for place in range(size):
        center = (place + 0.5) * scale
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), before)
        weights = [kernel((x - center + 0.5) / stretch) for x in range(first, last)]
        fixed = [round_away(weight / sum(weights) * 2**22) for weight in weights]
        total = np.tensordot(image[:, first:last].astype(np.int64), fixed, (1, 0))
        columns.append(np.clip((total + 2**21) >> 22, 0, 255).astype(np.uint8))
    return np.stack(columns, axis=1)


def round_away(x: float) -> int:
    return int(math.copysign(0.5, x) + x)


def box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def test_a_file_that_the_system_does_not_give_is_no_bad_image(tmp_path):
    """It may be intact: left out, it would be lost for good."""
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}: .*: mend it, and run it again") as raised:
            decode(path)
        assert not isinstance(raised.value, BadImage)
    (tmp_path / "link.png").symlink_to("nowhere.png")
    with pytest.raises(BadImage, match="No such file"):
        decode(tmp_path / "link.png")
