"""Grids of images as one PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from diffussm.runtime.run_dir import write_atomically

MIN_CELL = 48  # pixels; smaller images are enlarged by a whole factor, without interpolation


def save_grid(
    images: UInt8[Tensor, "N C H W"], columns: int, path: Path, row_labels: Sequence[str] | None = None
) -> None:
    """Write images row by row as a PNG, each row with its label in front; N must fill the rows."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    scale = max(1, -(-MIN_CELL // images.shape[-1]))
    cells = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    cells = pad(cells, (1, 1, 1, 1), value=255)
    grid = rearrange(cells, "(row col) c h w -> (row h) (col w) c", col=columns)
    picture = Image.fromarray(grid.numpy())
    if row_labels is not None:
        picture = _with_labels(picture, row_labels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_rows(
    rows: Sequence[UInt8[Tensor, "n C H W"]], path: Path, row_labels: Sequence[str] | None = None
) -> None:
    """Write rows of images, which may differ in length, as `save_grid` does."""
    columns = max(len(row) for row in rows)
    blank = rows[0].new_full((1, *rows[0].shape[1:]), 255)
    padded = [torch.cat([row, blank.expand(columns - len(row), -1, -1, -1)]) for row in rows]
    save_grid(torch.cat(padded), columns, path, row_labels)


def _with_labels(picture: Image.Image, labels: Sequence[str]) -> Image.Image:
    row_height = picture.height // len(labels)
    font = ImageFont.load_default(size=min(row_height // 2, 24))
    margin = 16 + int(max(font.getlength(label) for label in labels))
    canvas = Image.new("RGB", (picture.width + margin, picture.height), "white")
    canvas.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        draw.text((margin / 2, (row + 0.5) * row_height), label, fill="black", font=font, anchor="mm")
    return canvas
