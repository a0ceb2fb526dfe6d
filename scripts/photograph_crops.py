"""Cut crops of 32x32 from the colour photographs that ship within scikit-learn and scikit-image.

    python scripts/photograph_crops.py DIR        # writes DIR/train and DIR/held_out; needs diffussm[photographs]

Of every picture, reduced to half its size, the right quarter is held out: no training crop shows any of it.
"""

import sys
from pathlib import Path

import skimage
import sklearn.datasets
from PIL import Image

PICTURES = {
    Path(sklearn.datasets.__file__).parent / "images": ("china.jpg", "flower.jpg"),
    Path(skimage.__file__).parent / "data": (
        "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg",
    ),
}  # fmt: skip
SIDE, STRIDE = 32, 8  # of training crops, which overlap; held-out ones do not


def cut(picture: Image.Image, left: int, right: int, stride: int, to: Path, stem: str) -> int:
    """Save the crops between two columns; returns how many there are."""
    count = 0
    for top in range(0, picture.height - SIDE + 1, stride):
        for x in range(left, right - SIDE + 1, stride):
            picture.crop((x, top, x + SIDE, top + SIDE)).save(to / f"{stem}_{top:03}_{x:03}.png")
            count += 1
    return count


def main(root: Path) -> None:
    train, held_out = root / "train", root / "held_out"
    counts = [0, 0]
    for directory, names in PICTURES.items():
        for name in names:
            with Image.open(directory / name) as file:
                picture = file.convert("RGB").reduce(2)
            edge = picture.width * 3 // 4
            for index, (to, left, right, stride) in enumerate(
                ((train, 0, edge, STRIDE), (held_out, edge, picture.width, SIDE))
            ):
                to.mkdir(parents=True, exist_ok=True)
                counts[index] += cut(picture, left, right, stride, to, Path(name).stem)
    print(f"{root}: {counts[0]:,} crops to train with, {counts[1]:,} held out")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: photograph_crops.py DIR")
    main(Path(sys.argv[1]))
