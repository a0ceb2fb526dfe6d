"""A folder of photographs with everything wrong that `inspect` has to find, and stand-ins for what it decodes."""

from pathlib import Path

import torch
from data.photographs import crop, encoded
from einops import reduce, repeat
from PIL import Image
from torch import Tensor

from diffussm.runtime.errors import ConfigError, DataError

COUNTS = {"a flower": 40, "b temple": 30, "c rare": 3}
SIZE, SMALL = (60, 48), (40, 24)
NUM_SMALL = NUM_GREY = 10
DAMAGE = {  # by the file it takes the place of: content, and what is said of it
    "a flower/000.jpg": (b"", "empty"),
    "a flower/001.jpg": (b"<html>404</html>", "damaged, or in none of the formats BMP, GIF"),
    "a flower/002.jpg": (encoded(crop(900), "JPEG")[:-200], "truncated"),
    "a flower/003.jpg": (encoded(crop(900), "PNG")[:60], ""),
    "b temple/000.jpg": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels"),
    "b temple/001.jpg": (encoded(Image.new("L", (900, 2)), "PNG"), "more than 100 times the other"),
    "b temple/002.jpg": (encoded(Image.new("1", (12_000, 12_000)), "PNG"), "12000x12000 pixels are more than"),
    "b temple/003.jpg": (None, "No such file"),  # a link to nowhere
}


def make_folder(root: Path) -> Path:
    """73 files in three classes, 8 of them damaged; of the others 10 are small, 10 grey, 2 blank, 2 copies."""
    for number, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = crop(100 * number + index, *SIZE)
            if number == 0 and 4 <= index < 4 + NUM_SMALL:
                image = image.resize(SMALL)
            if number == 1 and 4 <= index < 4 + NUM_GREY:
                image = image.convert("L")
            (root / name / f"{index:03d}.jpg").write_bytes(encoded(image, "PNG" if index % 2 else "JPEG"))
    for index in (20, 21):
        (root / "b temple" / f"0{index}.jpg").write_bytes(encoded(Image.new("RGB", SIZE, (index, 9, 9)), "PNG"))
    original = root / "a flower" / "030.jpg"
    for copy in (root / "a flower" / "031.jpg", root / "c rare" / "002.jpg"):
        copy.write_bytes(original.read_bytes())
    for name, (content, _) in DAMAGE.items():
        (root / name).unlink()
        if content is None:
            (root / name).symlink_to("nowhere.jpg")
        else:
            (root / name).write_bytes(content)
    return root


class Coarse:
    """An autoencoder whose latents are the means of 4x4 pixels."""

    is_stochastic = False

    def __init__(self, version: int = 1) -> None:
        self.fingerprint = {"kind": "Coarse", "sha256": 64 * str(version)}

    def to(self, device: torch.device) -> "Coarse":
        return self

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        if height % 4:
            raise ConfigError(f"data.resolution={height}: must be a multiple of 4")
        return channels, height // 4, width // 4

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return reduce(images.float() / 127.5 - 1, "b c (h p) (w q) -> b c h w", "mean", p=4, q=4)

    def to_pixels(self, latents: Tensor) -> Tensor:
        pixels = (127.5 * latents + 128).clamp(0, 255).to(torch.uint8)
        return repeat(pixels, "b c h w -> b c (h p) (w q)", p=4, q=4)


class CoarseLatents:
    """A latent set of Coarse in memory, with both mirror images."""

    num_classes, class_names = 2, ["left", "right"]
    image_shape, latent_shape = (3, 16, 16), (3, 4, 4)
    horizontal_flip, max_bad_fraction, has_posterior = True, 0.0, True

    def __init__(self, length: int = 20, spread: float = 0.9) -> None:
        self.length, self.spread = length, spread
        self.fingerprint = {"source": "latents", "num_images": length}
        self.manifest = {
            "dtype": "fp16",
            "scale": 0.5,
            "shift": 0.0,
            "num_bad_files": 3,
            "source": {"source": "image_folder"},
            "autoencoder": {"kind": "Coarse", "sha256": 64 * "1"},
            "spread": {"mean": 0.0, "std": 0.9},
        }

    def __len__(self) -> int:
        return self.length

    def latents(self, indices: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        ramps = torch.linspace(-1, 1, 4).expand(len(indices), 3, 4, 4)
        return torch.where(flips[:, None, None, None], ramps.flip(-1), ramps) + noise

    def labels(self, indices: Tensor) -> Tensor:
        return indices % 2

    def check_autoencoder(self, fingerprint: dict) -> None:
        if fingerprint != self.manifest["autoencoder"]:
            raise DataError("data.path=set: latents of another autoencoder")

    def check_spread(self) -> float:
        if self.spread > 5:
            raise DataError("data.path=set: scaled latents have a standard deviation of 9, and diffusion wants 1")
        return self.spread


def write_configs(root: Path) -> Path:
    """A configuration directory that knows the stand-ins."""
    for name, options in (("autoencoder/coarse", "version: 1"), ("data/coarse", "length: 20\nspread: 0.9")):
        target = "Coarse" if name.startswith("auto") else "CoarseLatents"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.yaml").write_text(f"_target_: data.damaged.{target}\n{options}\n")
    return root
