"""Pictures inside a page: small copies as data: addresses, so that the page is whole by itself."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SHARP_BELOW = 64  # pixels; what is smaller is kept as it is and enlarged without smoothing
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """What an <img> needs.

    Attributes:
        address: data:image/...
        alt: what it shows, in words.
        is_sharp: whether its pixels are to be seen when it is enlarged.
    """

    address: str
    alt: str
    width: int
    height: int
    is_sharp: bool


def embed(path: Path, alt: str, most: int) -> Picture:
    """A picture of at most `most` pixels along each side; larger ones are reduced, and JPEG: for looking only."""
    with Image.open(path) as image:
        image.load()
        is_small = max(image.size) <= most
        shown = image if is_small else image.convert("RGB")
        shown.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if is_small:
        shown.save(buffer, format="PNG", optimize=True)
    else:
        shown.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    kind = "png" if is_small else "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(address, alt, shown.width, shown.height, is_sharp=max(shown.size) < SHARP_BELOW)
