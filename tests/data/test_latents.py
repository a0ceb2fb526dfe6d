"""Latent sets: what is read is what was encoded, damage is named, and memory stays with the system."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data.stand_ins import PatchProjection, crop_photographs, damage
from torch import Tensor

from diffussm.data.encoding import Encoding
from diffussm.data.images import ImageFolder
from diffussm.data.latents import LatentSet, sample_posterior
from diffussm.data.loader import BatchLoader
from diffussm.runtime.errors import DataError, RunDirectoryError, StorageError
from diffussm.runtime.seeding import draw_normal, make_generator


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageFolder:
    folder = tmp_path_factory.mktemp("photographs")
    crop_photographs(folder, 40)
    damage(folder)
    return ImageFolder(folder, 32, max_bad_fraction=0.1)


def encode(source, autoencoder, path: Path, **options) -> LatentSet:
    encoding = Encoding(source, autoencoder, path, **{"batch_size": 3, "shard_size": 8, **options})
    encoding.open()
    try:
        return encoding.run()
    finally:
        encoding.close()


@pytest.fixture(scope="module")
def encoded(photographs, tmp_path_factory) -> LatentSet:
    return encode(photographs, PatchProjection(), tmp_path_factory.mktemp("latents") / "set")


@pytest.fixture(scope="module")
def readable(photographs) -> tuple[Tensor, list[int]]:
    """Images and labels without the damaged ones."""
    chosen = [index for index in range(40) if index not in (2, 17, 23)]
    images, labels = zip(*(photographs[index] for index in chosen), strict=True)
    return torch.stack(images), list(labels)


def test_latents_are_those_of_the_images_with_both_flips_and_posterior_noise(encoded, readable):
    images, labels = readable
    autoencoder = PatchProjection()
    indices = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    flips, noise = torch.arange(37) % 3 == 0, torch.randn(37, 4, 4, 4)
    expected = torch.where(flips[:, None, None, None], images[indices].flip(-1), images[indices])
    for given in (noise, None):
        torch.testing.assert_close(
            encoded.latents(indices, flips, given), autoencoder.to_latents(expected, given), atol=5e-3, rtol=2e-3
        )
    assert encoded.latents(indices, flips, noise).dtype == torch.float32
    assert encoded.labels(indices).tolist() == [labels[index] for index in indices]
    assert encoded.labels([0, 36]).dtype == torch.int64
    assert (encoded.image_shape, encoded.latent_shape, len(encoded)) == ((3, 32, 32), (4, 4, 4), 37)
    assert (encoded.num_classes, encoded.class_names) == (2, ["china", "flower"])
    assert encoded.name_of(7) == "shards/000001.npy row 0"  # the first shard lacks a bad image
    for outside in (-1, 37):
        with pytest.raises(IndexError):
            encoded.latents([outside], flips[:1], None)


def test_fp32_is_exact(photographs, readable, tmp_path):
    images, _ = readable
    found = encode(photographs, PatchProjection(), tmp_path / "set", dtype="fp32")
    expected = PatchProjection().to_latents(images)
    torch.testing.assert_close(found.latents(range(37), torch.zeros(37, dtype=torch.bool), None), expected)


def test_an_autoencoder_without_posterior_stores_its_latents_alone(photographs, readable, tmp_path):
    images, _ = readable
    autoencoder = PatchProjection(posterior=False)
    found = encode(photographs, autoencoder, tmp_path / "set", dtype="fp32")
    assert found.manifest["posterior"] is False
    assert np.load(tmp_path / "set/shards/000000.npy").shape == (7, 2, 4, 4, 4)
    expected = (autoencoder.encode(images) - autoencoder.shift) * autoencoder.scale
    flips = torch.zeros(37, dtype=torch.bool)
    for noise in (None, torch.randn(37, 4, 4, 4)):
        torch.testing.assert_close(found.latents(range(37), flips, noise), expected)
    assert found.check_spread() == pytest.approx(found.manifest["spread"]["std"], rel=0.1)


def test_the_manifest_tells_what_the_set_is(encoded, photographs):
    manifest = json.loads((encoded.path / "manifest.json").read_text())
    assert manifest["source"] == json.loads(json.dumps(photographs.fingerprint))
    assert manifest["autoencoder"] == PatchProjection().fingerprint
    assert (manifest["num_images"], manifest["num_bad_files"]) == (37, 3)
    assert [shard["count"] for shard in manifest["shards"]] == [7, 8, 6, 8, 8]
    bad = [json.loads(line) for line in (encoded.path / "bad_files.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in bad] == ["china/002.png", "china/017.png", "flower/003.png"]
    assert all(entry["reason"] for entry in bad)
    assert str(encoded.path.parent) not in json.dumps(manifest)
    rows = np.concatenate([np.load(path) for path in sorted(encoded.path.glob("shards/*.npy"))]).astype(np.float64)
    mean, variance = np.split(rows, 2, axis=2)[0], np.exp(np.split(rows, 2, axis=2)[1])
    x_0 = (mean - 0.1) * 2
    assert manifest["spread"]["mean"] == pytest.approx(x_0.mean())
    assert manifest["spread"]["std"] == pytest.approx((x_0.var() + (variance * 4).mean()) ** 0.5)
    assert encoded.check_spread() == pytest.approx(manifest["spread"]["std"], rel=0.1)


class Counting(PatchProjection):
    """Counts the images that it encodes."""

    count = 0

    def encode(self, images):
        self.count += len(images)
        return super().encode(images)


def test_a_set_without_mirror_images_takes_half_the_space(photographs, encoded, tmp_path):
    source = ImageFolder(photographs.root, 32, horizontal_flip=False, max_bad_fraction=0.1)
    autoencoder = Counting()
    plain = encode(source, autoencoder, tmp_path / "set")
    assert autoencoder.count == 37 and plain.manifest["flips"] is False and encoded.manifest["flips"] is True
    assert np.load(plain.path / "shards/000000.npy").shape == (7, 1, 8, 4, 4)
    noise, none = torch.randn(37, 4, 4, 4), torch.zeros(37, dtype=torch.bool)
    assert torch.equal(plain.latents(range(37), none, noise), encoded.latents(range(37), none, noise))
    assert plain.check_spread() == pytest.approx(plain.manifest["spread"]["std"], rel=0.1)
    assert (plain.horizontal_flip, encoded.horizontal_flip) == (False, True)
    assert LatentSet(encoded.path, horizontal_flip=False).horizontal_flip is False
    with pytest.raises(ValueError, match=r"^horizontal_flip=true: .* holds no mirror images: set it to null, or"):
        LatentSet(plain.path, horizontal_flip=True)
    batch = next(BatchLoader(plain, 37, seed=0, with_labels=True).starting_at(0))
    order = torch.randperm(37, generator=make_generator(0, "epoch", 0))
    expected = draw_normal(0, "posterior", 0, range(37), (4, 4, 4))
    assert torch.equal(batch.images, plain.latents(order, none, expected))


def test_a_set_that_does_not_tell_of_mirror_images_has_them(encoded, tmp_path):
    shutil.copytree(encoded.path, tmp_path / "set")
    manifest = {key: value for key, value in encoded.manifest.items() if key != "flips"}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    assert LatentSet(tmp_path / "set", horizontal_flip=True).horizontal_flip is True


def test_the_manifest_tells_with_what_shards_were_encoded(photographs, encoded, tmp_path):
    usual = {"torch": torch.__version__, "device": "cpu", "batch_size": 3, "autoencoder.batch_size": 8}
    assert encoded.manifest["encoding"] == {"precision": "fp32", "tile": None}
    assert encoded.manifest["encoded_with"] == [usual]
    shutil.copytree(encoded.path, tmp_path / "set")
    for name in ("manifest.json", "shards/000000.json", "shards/000003.json"):
        (tmp_path / "set" / name).unlink()
    found = encode(photographs, PatchProjection(), tmp_path / "set", batch_size=5)
    assert found.manifest["encoded_with"] == [{**usual, "batch_size": 5}, usual]


def test_a_set_can_be_sent_to_another_process_and_says_who_it_is_wherever_it_lies(encoded, tmp_path):
    flips, noise = torch.tensor([True, False]), torch.randn(2, 4, 4, 4)
    before = encoded.latents([5, 30], flips, noise)
    message = pickle.dumps(encoded)
    assert len(message) < 10_000
    assert torch.equal(pickle.loads(message).latents([5, 30], flips, noise), before)
    shutil.copytree(encoded.path, tmp_path / "moved")
    assert LatentSet(tmp_path / "moved").fingerprint == encoded.fingerprint
    assert encoded.fingerprint["image_shape"] == [3, 32, 32]


@pytest.mark.parametrize("name", ["shards/000003.npy", "labels.npy"])
def test_truncated_missing_and_flipped_files_are_named(encoded, tmp_path, name):
    shutil.copytree(encoded.path, tmp_path / "set")
    file = tmp_path / "set" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if name != "labels.npy":  # which is small, and always looked at
        LatentSet(tmp_path / "set")
    with pytest.raises(DataError, match=f"{name}: damaged: expected SHA-256"):
        LatentSet(tmp_path / "set", verify=name != "labels.npy")
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{name}: truncated: expected {len(whole)} bytes, found {len(whole) - 1}"):
        LatentSet(tmp_path / "set")
    file.unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        LatentSet(tmp_path / "set")
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match=f"{name}: damaged"):
        damaged = LatentSet(tmp_path / "set")
        damaged.labels([27])
        damaged.latents([27], torch.tensor([False]), None)


def test_damaged_manifests_and_other_directories_are_named(encoded, tmp_path):
    with pytest.raises(DataError, match="no latent set"):
        LatentSet(tmp_path)
    (tmp_path / "request.json").write_text("{}")
    with pytest.raises(DataError, match="has not ended"):
        LatentSet(tmp_path)
    whole = json.loads((encoded.path / "manifest.json").read_text())
    for change in ({"shards": [{}]}, {"latent_shape": [4, 4]}, {"dtype": "fp8"}, {"labels": None}, {"scale": "2"}):
        (tmp_path / "manifest.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError, match=r"manifest.json: damaged"):
            LatentSet(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(DataError, match="format_version 99, this diffussm reads 1"):
        LatentSet(tmp_path)


@pytest.mark.fault("G15")
def test_another_autoencoder_is_refused_with_both_sides_named(encoded):
    encoded.check_autoencoder(PatchProjection().fingerprint)
    with pytest.raises(DataError, match=r"scale: 2\.0 there, 3\.0 here"):
        encoded.check_autoencoder(PatchProjection(scale=3.0).fingerprint)
    with pytest.raises(DataError, match=r"sha256: \w+ there, \w+ here"):
        encoded.check_autoencoder(PatchProjection(seed=1).fingerprint)
    with pytest.raises(DataError, match=r"kind: patches there, identity here"):
        encoded.check_autoencoder({"kind": "identity"})


def test_a_wrong_spread_is_refused(photographs, encoded, tmp_path):
    wide = encode(photographs, PatchProjection(scale=200.0), tmp_path / "wide")
    with pytest.raises(DataError, match=r"standard deviation of .* scale=200"):
        wide.check_spread()
    shutil.copytree(encoded.path, tmp_path / "set")
    for shard in (tmp_path / "set" / "shards").glob("*.npy"):
        rows = np.load(shard)
        rows[:, :, :4] *= np.float16(1.5)
        np.save(shard, rows)
    with pytest.raises(DataError, match=r"manifest.json says"):
        LatentSet(tmp_path / "set").check_spread()


def test_posteriors_are_sampled_in_float32():
    moments, noise = torch.randn(3, 8, 4, 4).half(), torch.randn(3, 4, 4, 4)
    before = moments.clone()
    mean, log_variance = moments.float().chunk(2, dim=1)
    expected = (mean + (log_variance / 2).exp() * noise - 0.1) * 0.5
    torch.testing.assert_close(sample_posterior(moments, noise, 0.5, 0.1), expected)
    torch.testing.assert_close(sample_posterior(moments, None, 0.5, 0.1), (mean - 0.1) * 0.5)
    wide = moments.float()
    sample_posterior(wide, noise, 0.5, 0.1)
    assert torch.equal(moments, before) and torch.equal(wide, before.float())


class Threads(PatchProjection):
    """Counts the threads that it may use."""

    def encode(self, images):
        self.counted = torch.get_num_threads()
        return super().encode(images)


def test_a_cpu_encodes_with_one_thread_whose_roundings_are_the_same_everywhere(photographs, tmp_path):
    autoencoder, before = Threads(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encode(photographs, autoencoder, tmp_path / "set")
        assert (autoencoder.counted, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


class Broken(PatchProjection):
    """Overflows where an image is dark."""

    def encode(self, images):
        dark = images.flatten(1).float().mean(dim=1) < 100
        return super().encode(images).masked_fill(dark[:, None, None, None], torch.inf)


class TooLarge(PatchProjection):
    def encode(self, images):
        return super().encode(images) * 1e6


def test_latents_that_are_not_finite_are_refused_with_the_image_named(photographs, tmp_path):
    with pytest.raises(DataError, match=r"china/006.png: the autoencoder gives latents that are not finite"):
        encode(photographs, Broken(), tmp_path / "set")
    assert list((tmp_path / "set" / "shards").iterdir()) == []
    large = encode(photographs, TooLarge(), tmp_path / "large")
    assert np.isfinite(np.load(large.path / "shards/000000.npy")).all()


@pytest.mark.fault("G8")
def test_too_many_bad_images_stop_the_work_with_counts(photographs, tmp_path):
    strict = ImageFolder(photographs.root, 32, max_bad_fraction=0.05)
    with pytest.raises(DataError, match=r"3 of 40 images cannot be read so far.*max_bad_fraction=0.05"):
        encode(strict, PatchProjection(), tmp_path / "set")
    listed = (tmp_path / "set" / "bad_files.jsonl").read_text()
    assert [json.loads(line)["file"] for line in listed.splitlines()][-1] == "flower/003.png"
    assert len(list((tmp_path / "set" / "shards").glob("*.json"))) == 2
    assert len(encode(photographs, PatchProjection(), tmp_path / "set")) == 37  # the fraction was raised


def test_bad_images_of_finished_shards_count_after_a_restart(photographs, tmp_path):
    strict = ImageFolder(photographs.root, 32, max_bad_fraction=0.05)  # two of 40
    for _ in range(2):  # the second time, one of three is in a shard that is finished
        with pytest.raises(DataError, match=r"3 of 40 images cannot be read so far"):
            encode(strict, PatchProjection(), tmp_path / "set")
        listed = (tmp_path / "set" / "bad_files.jsonl").read_text().splitlines()
        assert [json.loads(line)["file"] for line in listed] == [
            "china/002.png",
            "china/017.png",
            "flower/003.png",
        ]
    assert len(list((tmp_path / "set" / "shards").glob("*.json"))) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_has_been_mended_is_in_the_set(photographs, tmp_path, num_workers):
    folder = Path(shutil.copytree(photographs.root, tmp_path / "images"))
    strict, lax = (ImageFolder(folder, 32, max_bad_fraction=fraction) for fraction in (0.05, 0.1))
    with pytest.raises(DataError, match=r"mend those in .*bad_files\.jsonl and run it again"):
        encode(strict, PatchProjection(), tmp_path / "set", num_workers=num_workers)
    first, second = ((tmp_path / "set" / "shards" / f"00000{shard}.json") for shard in (0, 1))
    assert first.exists() and second.exists()
    before = second.stat().st_mtime_ns
    shutil.copy(folder / "china" / "003.png", folder / "china" / "002.png")
    autoencoder, seen = Counting(), []
    encoding = Encoding(strict, autoencoder, tmp_path / "set", batch_size=3, shard_size=8, num_workers=num_workers)
    encoding.open()
    assert encoding.num_done == 16
    latents = encoding.run(seen.append)
    encoding.close()
    assert autoencoder.count == 2 * (8 + 6 + 8 + 8) and second.stat().st_mtime_ns == before
    assert min(seen) == -8 + 3 and max(seen) + encoding.num_done == 40
    assert len(latents) == 38 and latents.manifest["num_bad_files"] == 2
    anew = encode(lax, PatchProjection(), tmp_path / "anew")
    assert anew.fingerprint == latents.fingerprint
    before = {path: path.stat().st_mtime_ns for path in latents.path.rglob("*")}
    shutil.copy(folder / "china" / "003.png", folder / "china" / "017.png")
    encode(strict, autoencoder, latents.path)  # what is complete stays
    kept = latents.path / "manifest.json", *(latents.path / "shards").iterdir()
    assert all(path.stat().st_mtime_ns == before[path] for path in kept[1:])
    assert LatentSet(latents.path).fingerprint == anew.fingerprint


def test_nothing_readable_is_no_set(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    source = ImageFolder(tmp_path / "images", 32, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        encode(source, PatchProjection(), tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_what_was_finished_stays(photographs, encoded, tmp_path, monkeypatch):
    def sync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")

    left = 6
    monkeypatch.setattr("os.fsync", sync)
    with pytest.raises(StorageError, match="No space left on device"):
        encode(photographs, PatchProjection(), tmp_path / "set")
    assert not list((tmp_path / "set").rglob(".*.tmp"))
    finished = list((tmp_path / "set" / "shards").glob("*.json"))
    assert finished and not (tmp_path / "set" / "manifest.json").exists()
    left = 1000
    assert encode(photographs, PatchProjection(), tmp_path / "set").fingerprint == encoded.fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"autoencoder": PatchProjection(seed=1)}, "autoencoder.sha256"),
        ({"autoencoder": PatchProjection(scale=3.0)}, "autoencoder.scale: 2.0 there, 3.0 here"),
        ({"source": {"resolution": 24}}, r"image_shape: \[3, 32, 32\] there, \[3, 24, 24\] here"),
        ({"autoencoder": PatchProjection(tile=32)}, "encoding.tile: None there, 32 here"),
        ({"dtype": "fp32"}, "dtype: fp16 there, fp32 here"),
        ({"source": {"horizontal_flip": False}}, "flips: True there, False here"),
        ({"shard_size": 4}, "shard_size: 8 there, 4 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_request_is_refused_with_both_sides_named(photographs, encoded, options, says):
    before = {path: path.stat().st_mtime_ns for path in encoded.path.rglob("*")}
    options = dict(options)
    of_source = {"resolution": 32, **options.pop("source", {})}
    source = ImageFolder(photographs.root, **of_source, max_bad_fraction=0.1)
    with pytest.raises(RunDirectoryError, match=says):
        encode(source, options.pop("autoencoder", PatchProjection()), encoded.path, **options)
    assert {path: path.stat().st_mtime_ns for path in encoded.path.rglob("*")} == before


def make_sparse_set(path: Path, num_shards: int, shard_size: int) -> None:
    """A set of 256-pixel latents whose shards take no room on the disk."""
    row = (2, 8, 32, 32)
    (path / "shards").mkdir(parents=True)
    shards = []
    for number in range(num_shards):
        file = path / "shards" / f"{number:06d}.npy"
        np.save(file, np.zeros((0, *row), np.float16))
        with file.open("r+b") as stream:
            description = {"descr": "<f2", "fortran_order": False, "shape": (shard_size, *row)}
            np.lib.format.write_array_header_1_0(stream, description)
            size = stream.tell() + shard_size * int(np.prod(row)) * 2
            stream.truncate(size)
        shards.append({"count": shard_size, "size": size, "sha256": ""})
    np.save(path / "labels.npy", np.zeros(num_shards * shard_size, np.int64))
    manifest = {
        "format_version": 1, "source": {}, "autoencoder": {}, "scale": 1.0, "shift": 0.0, "dtype": "fp16",
        "image_shape": [3, 256, 256], "latent_shape": [4, 32, 32], "posterior": True, "spread": {"std": 1.0},
        "num_classes": None, "class_names": [], "shards": shards,
        "labels": {
            "size": (path / "labels.npy").stat().st_size,
            "sha256": hashlib.sha256((path / "labels.npy").read_bytes()).hexdigest(),
        },
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))


def private_memory() -> float:
    """MiB of this process that are its own: what is mapped from files can be dropped at any time."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) / 1024


def read_steps(latents: LatentSet, seed: int, num_steps: int, batch_size: int, results) -> None:
    """Make batches as a loader's worker does, and tell the private memory after every tenth."""
    torch.set_num_threads(1)
    memory = []
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(seed * num_steps + step)
        indices = torch.randint(len(latents), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.latent_shape, generator=generator)
        latents.latents(indices, noise[:, 0, 0, 0] > 0, noise)
        if step % 10 == 9:
            memory.append(private_memory())
    results.put(memory)


def measure_private_memory(latents: LatentSet, num_steps: int, batch_size: int) -> list[list[float]]:
    """Of two processes that read at the same time, after every tenth step, in MiB."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    readers = [
        fork.Process(target=read_steps, args=(latents, seed, num_steps, batch_size, results)) for seed in (0, 1)
    ]
    for reader in readers:
        reader.start()
    memory = [results.get() for _ in readers]
    for reader in readers:
        reader.join()
    return memory


@pytest.mark.fault("G20")
@pytest.mark.parametrize(("num_steps", "batch_size"), [(120, 64), pytest.param(3000, 8, marks=pytest.mark.slow)])
def test_a_set_larger_than_memory_is_read_within_bounds(tmp_path, figure, num_steps, batch_size):
    make_sparse_set(tmp_path / "set", num_shards=48, shard_size=4096)
    latents = LatentSet(tmp_path / "set")
    size = sum(file.stat().st_size for file in (tmp_path / "set/shards").iterdir()) / 2**30
    assert size > 6
    before = private_memory()  # of the tests, which the readers begin with
    for memory in measure_private_memory(latents, num_steps, batch_size):
        growth = max(memory[-4:]) - max(memory[4:8])
        more = max(memory) - before
        figure(f"{size:.0f} GiB, {num_steps} steps: {more:.0f} MiB for it, of which {growth:.1f} came in the end")
        assert more < 100
        assert growth < 8  # 40 MiB and more have been read between
