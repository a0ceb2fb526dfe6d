"""`diffussm inspect`: exact counts of everything that is wrong, pictures that show it, and nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data.damaged import COUNTS, DAMAGE, NUM_GREY, NUM_SMALL, SIZE, SMALL, Coarse, make_folder, write_configs
from PIL import Image

from diffussm.cli import main
from diffussm.data.images import Digits, ImageFolder
from diffussm.data.inspection import Classes, choose_by_class, examine, labels_of
from diffussm.data.roundtrip import psnr, there_and_back

NUM_FILES = sum(COUNTS.values())
NUM_SOUND = NUM_FILES - len(DAMAGE)
QUICK = ("seconds=0", "num_workers=0", "device=cpu")
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of photographs, and a configuration directory."""
    root = tmp_path_factory.mktemp("inspect")
    make_folder(root / "photographs")
    write_configs(root / "configs")
    return root


def arguments(place: Path, *more: str) -> list[str]:
    images = ["data=image_folder", f"data.path={place / 'photographs'}", "data.resolution=32"]
    return ["inspect", f"--config-dir={place / 'configs'}", *images, *QUICK, *more]


def facts(out: str = "out") -> dict:
    return json.loads(Path(out, "inspect.json").read_text())


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_everything_that_is_wrong_is_counted(place, in_tmp, capsys, num_workers):
    assert main(arguments(place, "out=out", f"num_workers={num_workers}", "batch_size=7")) == 0
    found = facts()
    assert found["complete"] is True and found["classes"]["images"] == COUNTS
    images = found["images"]
    assert (images["examined"], images["unreadable"]) == (NUM_FILES, len(DAMAGE))
    assert images["smaller_than_resolution"] == NUM_SMALL
    assert images["sizes"]["width"] == {"min": SMALL[0], "median": SIZE[0], "max": SIZE[0]}
    assert images["sizes"]["height"] == {"min": SMALL[1], "median": SIZE[1], "max": SIZE[1]}
    assert images["formats"] == {"JPEG": 33, "PNG": 32} and images["modes"] == {"RGB": 55, "L": NUM_GREY}
    assert images["grey"]["count"] == NUM_GREY and images["grey"]["first"][0] == "b temple/004.jpg"
    assert images["blank"] == {"count": 2, "first": ["b temple/020.jpg", "b temple/021.jpg"]}
    assert images["copies"] == {
        "count": 2,
        "of_another_class": 1,
        "first": [["a flower/031.jpg", "a flower/030.jpg"], ["c rare/002.jpg", "a flower/030.jpg"]],
    }
    shown = said(capsys)
    for promise in (
        "classes 3, of 3 (c rare) to 40 (a flower) images",
        "unreadable 8, listed in out/bad_files.jsonl a flower/000.jpg: empty",
        "and 3 more",
        "sizes width 40 to 60 (median 60), height 24 to 48 (median 48)",
        "problems 6",
        "8 of 73 images (11.0 %) cannot be read, more than data.max_bad_fraction=0.01 allows",
        "classes are unequal: 40 images of a flower, 3 of c rare",
        "10 of 65 images (15.4 %) are smaller than 32x32",
        "10 of 65 images (15.4 %) are grey in a set of colour (b temple/004.jpg,",
        "2 of 65 images (3.1 %) show one colour all over",
        "2 of 65 images (3.1 %) copy others, pixel by pixel, 1 of them under another class",
        "loader not timed: too many images cannot be read",
    ):
        assert promise in shown
    assert len(found["problems"]) == 6 and str(place) not in json.dumps(found)


def test_damaged_files_are_listed_with_their_reasons(place, in_tmp):
    assert main(arguments(place, "out=out")) == 0
    records = [json.loads(line) for line in Path("out/bad_files.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == sorted(DAMAGE)
    for record in records:
        assert DAMAGE[record["file"]][1] in record["reason"] and len(record["reason"]) > 4


def test_the_same_request_looks_anew_and_says_the_same(place, in_tmp):
    command = arguments(place, "autoencoder=coarse", "data.max_bad_fraction=0.2", "num_images=20")
    assert main(command) == 0
    (out,) = Path("inspect").iterdir()
    names = ["bad_files.jsonl", "inspect.json", "reconstructions.png", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "samples.png").unlink()
    write_facts = json.loads(before["inspect.json"]) | {"complete": False}  # as if it had been killed
    (out / "inspect.json").write_text(json.dumps(write_facts))
    assert main([*command, "num_workers=2"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "seed=1"]) == 0 and len(list(Path("inspect").iterdir())) == 2


def test_a_sample_is_looked_at_and_another_seed_takes_another(place, in_tmp, capsys):
    seen = []
    for seed in (0, 0, 1):
        assert main(arguments(place, "out=out", "examined=20", f"seed={seed}")) == 0
        seen.append(facts()["images"])
        assert seen[-1]["examined"] == 20 and "examined 20 random ones" in said(capsys)
        for path in Path("out").iterdir():
            path.unlink()
    assert seen[0] == seen[1] != seen[2]
    assert main(arguments(place, "out=out", "examined=null")) == 0
    assert facts()["images"]["examined"] == NUM_FILES and "examined all" in said(capsys)


def test_a_sound_data_set_has_no_problems_and_a_row_for_every_class(in_tmp, capsys):
    assert main(["inspect", "data=digits", *QUICK, "seconds=0.01", "num_images=30", "out=out"]) == 0
    found = facts()
    assert found["problems"] == [] and Path("out/bad_files.jsonl").read_bytes() == b""
    assert found["loader"]["per_second"] > 0 and (
        found["loader"]["num_workers"],
        found["loader"]["batch_size"],
    ) == (0, 32)
    shown = said(capsys)
    assert "problems none found" in shown and "images per second with no workers" in shown
    with Image.open("out/samples.png") as grid:
        assert grid.height == 10 * 50 and grid.width > 3 * 50  # ten rows of three, their labels in front
        pixels = np.array(grid)[:, -150:]
    digits, threes = Digits(), []
    for column in range(3):
        cell = pixels[3 * 50 + 1 : 4 * 50 - 1, column * 50 + 1 : (column + 1) * 50 - 1, 0]
        threes.append(torch.from_numpy(cell[::6, ::6].copy()))
    for three in threes:
        matches = (digits.images[:, 0] == three).flatten(1).all(dim=1)
        assert matches.any() and (digits.labels[matches] == 3).all()


def test_images_without_classes_make_a_square(place, in_tmp, capsys):
    flat = place / "photographs" / "b temple"
    command = ["inspect", "data=image_folder", f"data.path={flat}", "data.resolution=32", *QUICK, "num_images=9"]
    assert main([*command, "out=out", "data.max_bad_fraction=1"]) == 0
    assert "classes none: train with model.num_classes=null" in said(capsys)
    with Image.open("out/samples.png") as grid:
        assert grid.size == (3 * 66, 3 * 66)  # cells of 32, enlarged to 64
    assert facts()["classes"] == {"num_classes": None, "images": {}}


def test_psnr_of_reconstructions_is_that_of_the_formula(place, in_tmp, capsys):
    options = ("out=out", "autoencoder=coarse", "data.max_bad_fraction=0.2", "num_images=12", "batch_size=5")
    assert main(arguments(place, *options)) == 0
    source = ImageFolder(place / "photographs", 32)
    grid = np.array(Image.open("out/reconstructions.png"))
    rows = [grid[row * 66 : (row + 1) * 66, -8 * 66 :] for row in range(4)]
    cells = [[row[1:65:2, 66 * i + 1 : 66 * i + 65 : 2].astype(float) for i in range(8)] for row in rows]
    pairs = [*zip(cells[0], cells[1], strict=True), *zip(cells[2][:4], cells[3][:4], strict=True)]
    decibels = [20 * np.log10(255 / np.sqrt(np.mean((image - decoded) ** 2))) for image, decoded in pairs]
    found = facts()["autoencoder"]
    assert found["images"] == 12 and found["psnr"]["mean"] == pytest.approx(np.mean(decibels))
    assert found["psnr"]["worst"] == pytest.approx(min(decibels)) and decibels[:8] == sorted(decibels)[:8]
    names = {source.name_of(index): index for index in range(len(source))}
    worst = source[names[found["worst_image"]]][0].permute(1, 2, 0).numpy()
    assert np.array_equal(worst, cells[0][0])
    decoded = worst.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).repeat(4, axis=0).repeat(4, axis=1)
    assert np.abs(decoded - cells[1][0]).max() <= 1
    shown = said(capsys)
    assert f"PSNR {np.mean(decibels):.1f} dB on average of 12 images, {min(decibels):.1f} dB at worst" in shown
    assert "autoencoder Coarse, latents 3x8x8" in shown


def test_lossless_and_lossy_autoencoders_are_told_apart():
    images = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    assert psnr(images, images).tolist() == 6 * [float("inf")]
    assert psnr(images[:1] * 0, images[:1] * 0 + 1).item() == pytest.approx(48.1308, abs=1e-4)
    flat = images[:, :, :1, :1].expand(-1, -1, 8, 8)
    advanced = []
    lossless = there_and_back(Coarse(), flat, 4, torch.device("cpu"), advanced.append)
    assert lossless.record()["psnr"] == {"mean": None, "worst": None} and lossless.problems() == []
    assert advanced == [4, 2]
    (problem,) = there_and_back(Coarse(), images, 4, torch.device("cpu")).problems()
    assert "the autoencoder loses much, PSNR 1" in problem


def test_a_latent_set_is_summarised_timed_and_decoded(place, in_tmp, capsys):
    configs = f"--config-dir={place / 'configs'}"
    command = ["inspect", configs, "data=coarse", *QUICK, "seconds=0.01", "num_images=3"]
    assert main([*command, "out=plain"]) == 0
    assert sorted(path.name for path in Path("plain").iterdir()) == ["inspect.json"]
    shown = said(capsys)
    for promise in (
        "data latents, 20 of 3x4x4, fp16, of images 3x16x16",
        "encoded by Coarse 111111111111, scale 0.5, shift 0",
        "made from image_folder, 3 unreadable images left out",
        "classes 2, of 10 (left) to 10 (left) images",
        "standard deviation 0.90 of some latents, 0.90 of all",
        "latents per second",
        "problems none found",
    ):
        assert promise in shown
    assert main([*command, "autoencoder=coarse", "out=decoded"]) == 0
    pixels = np.array(Image.open("decoded/samples.png"))
    ramp = (127.5 * np.linspace(-1, 1, 4) + 128).clip(0, 255).astype(np.uint8).repeat(12)
    top, bottom = pixels[25, -3 * 50 :, 0], pixels[75, -3 * 50 :, 0]
    for cell in range(3):
        assert np.array_equal(top[50 * cell + 1 : 50 * cell + 49], ramp)
        assert np.array_equal(bottom[50 * cell + 1 : 50 * cell + 49], ramp[::-1])
    assert main([*command, "autoencoder=coarse", "autoencoder.version=2", "out=other"]) == 65
    assert "latents of another autoencoder" in capsys.readouterr().err and not Path("other").exists()
    assert main([*command, "data.spread=9", "out=wide"]) == 0
    assert "standard deviation of 9" in facts("wide")["problems"][0]


def test_classes_without_images_are_found_without_reading_any():
    class Source:
        num_classes, class_names = 3, ["a", "b", "c"]

        def __len__(self):
            return 4

        def label(self, index):
            return 2 * (index % 2)

    labels = labels_of(Source())
    classes = Classes.of(Source(), labels)
    assert classes.counts == {"a": 2, "b": 0, "c": 2} and classes.empty == ["b"]
    (problem,) = classes.problems()
    assert problem.startswith("1 of 3 classes have no images (b)")


def test_pictures_are_of_every_class_or_of_some_at_random():
    labels = torch.arange(40) // 10
    chosen = choose_by_class(labels, 10, 12, seed=0)
    assert list(chosen) == [0, 1, 2, 3]
    assert all(sorted(indices) == list(range(10 * label, 10 * label + 10)) for label, indices in chosen.items())
    assert chosen[0] != sorted(chosen[0])
    few = [tuple(choose_by_class(labels, 2, 12, seed)) for seed in range(8)]
    assert all(len(labels) == 2 and labels == tuple(sorted(labels)) for labels in few) and len(set(few)) > 1
    assert len(choose_by_class(labels, 10, 3, seed=0)) == 3


def test_examination_tells_its_progress(place):
    source, advanced = ImageFolder(place / "photographs", 32), []
    found = examine(source, range(20), 6, 0, advanced.append)
    assert sum(advanced) == found.num_examined == 20 and found.num_readable == 16


def test_what_is_not_ours_is_left_alone(place, in_tmp, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("precious")
    assert main(arguments(place, "out=mine")) == 73
    assert "out=mine: exists and is not ours" in capsys.readouterr().err
    assert main(arguments(place, "out=mine/thesis.tex")) == 73
    assert "mine/thesis.tex is a file" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    assert main(arguments(place, "out=ours", "examined=3")) == 0
    before = Path("ours/inspect.json").read_bytes()
    assert main(arguments(place, "out=ours", "examined=4")) == 73
    assert "out=ours: holds another inspection" in capsys.readouterr().err
    assert Path("ours/inspect.json").read_bytes() == before


def test_shapes_that_the_autoencoder_does_not_take_are_refused_first(place, in_tmp, capsys):
    assert main(arguments(place, "autoencoder=coarse", "data.resolution=30")) == 2
    assert "data.resolution=30: must be a multiple of 4" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []
