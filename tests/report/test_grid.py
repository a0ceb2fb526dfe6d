"""Grids: rows of any length in one picture, each with its label."""

import numpy as np
import torch
from PIL import Image

from diffussm.report.grid import save_rows


def test_shorter_rows_are_filled_with_white(tmp_path):
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 48, 48) * 40
    save_rows([images[:3], images[3:]], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        cells = np.array(picture)[25::50, 25::50, 0]
    assert cells.tolist() == [[0, 40, 80], [120, 160, 255]]


def test_labels_stand_in_front_of_their_rows(tmp_path):
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    save_rows([images, images, images], tmp_path / "grid.png", ["church_outdoor", "", "a"])
    with Image.open(tmp_path / "grid.png") as picture:
        margin = np.array(picture)[:, : picture.width - 100, 0]
    ink = [(255 - row.astype(int)).sum() for row in margin.reshape(3, 50, -1)]
    assert ink[0] > ink[2] > ink[1] == 0
