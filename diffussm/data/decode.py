"""From image files to RGB pixels, and from pixels to the square that models see: the same for every source."""

import contextlib
import errno
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from diffussm.runtime.errors import BadImage, DataError

# Whoever changes what comes out of `decode` or `center_crop` raises this: it tells data sets apart.
DECODING_VERSION = 1
CROP = f"adm_center v{DECODING_VERSION}"
# And changes these words too: they tell statistics apart.
PREPROCESSING = "upright, 8 bits of RGB, transparency over white, ADM's centre crop"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # and no EPS: Pillow has programs run it
MAX_PIXELS = 2**27  # half a gigabyte when decoded
MIN_SIDE = 2
MAX_ASPECT = 100  # the crop of a thread would first have it scaled to gigabytes
UPRIGHT = {  # how an image of this EXIF orientation has to be turned
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(content: bytes | Path, name: str | None = None) -> Image.Image:
    """The picture in an image file (of an animation, the first), upright, as RGB of 8 bits.

    CMYK, grey and palettes become RGB by Pillow's `convert`, as in ADM's preprocessing, which differs in three
    rare cases. EXIF orientation is honoured here. Of 16 bits the upper 8 remain; Pillow does so for colour, but
    would clip grey. Transparency is laid over white, where `convert` would drop it: what has alpha 0 may have
    any colour, often black, that nobody was meant to see.

    Args:
        name: what to call it in errors; a path is its own name.

    Raises:
        BadImage: what cannot be decoded, has more than MAX_PIXELS (a decompression bomb, perhaps), a side
            shorter than MIN_SIDE, or sides more than MAX_ASPECT apart.
        DataError: a file that the system does not give; a link to nothing is a bad image.
    """
    try:
        with _open(content) as image:
            _check_size(*image.size)
            image.load()
            return _to_rgb(_turn_upright(image))
    except MemoryError:
        raise
    except Exception as error:
        if _is_of_the_storage(error) and not _is_dangling(content):
            # To leave the image out, which may be intact, would lose it for good.
            raise DataError(
                f"{name or _default_name(content)}: {_reason(content, error)}: mend it, and run it again"
            ) from error
        # Pillow's decoders raise nearly everything on damaged bytes.
        raise BadImage(name or _default_name(content), _reason(content, error)) from error


@dataclass(frozen=True)
class Header:
    """What an image file says of itself: its format and mode as Pillow names them, and its size upright."""

    format: str
    mode: str
    width: int
    height: int


def read_header(content: bytes | Path) -> Header:
    """The header of what `decode` can decode; no pixels are read."""
    with _open(content) as image:
        width, height = image.size[::-1] if _orientation(image) >= 5 else image.size
        return Header(str(image.format), image.mode, width, height)


@contextlib.contextmanager
def _open(content: bytes | Path) -> Iterator[Image.Image]:
    """Without Pillow's warnings: what cannot be used ends in an error, and the rest is fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            yield image


def center_crop(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """ADM's crop: halve by box filter while twice the target fits, bicubic to it, cut out the centre."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels: the shorter side must have at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


def _turn_upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data says nothing about the picture, which is intact
        return 1
    return orientation if orientation in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("pixels of 32 bits, whose range is not known")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _is_of_the_storage(error: Exception) -> bool:
    """Whether the system did not give the bytes; damaged ones may lead a decoder to places that no file has."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW)


def _is_dangling(content: bytes | Path) -> bool:
    return isinstance(content, Path) and content.is_symlink() and not content.exists()


def _default_name(content: bytes | Path) -> str:
    return f"{len(content)} bytes" if isinstance(content, bytes) else str(content)


def _reason(content: bytes | Path, error: Exception) -> str:
    """One short line that is the same on every machine: no addresses, no paths."""
    if isinstance(error, UnidentifiedImageError):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        return f"damaged, or in none of the formats {', '.join(sorted(FORMATS))}" if size else "empty"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, in more words
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:100]
