"""Batches are a function of (seed, step): any start, any worker count, every image once per epoch."""

import json
from itertools import islice
from typing import ClassVar

import pytest
import torch

from diffussm.data.images import Digits
from diffussm.data.latents import sample_posterior
from diffussm.data.loader import BatchLoader
from diffussm.runtime.errors import BadImage, ConfigError, DataError
from diffussm.runtime.seeding import draw_normal, make_generator


class Numbers:
    """Images that show their own index; those whose index is in `bad` cannot be read."""

    num_classes, image_shape, fingerprint = 100, (1, 1, 2), {}

    def __init__(self, length, bad=(), max_bad_fraction=0.5, horizontal_flip=False):
        self.length, self.bad, self.max_bad_fraction = length, set(bad), max_bad_fraction
        self.horizontal_flip = horizontal_flip

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage(f"{index}.png", "truncated")
        return torch.tensor([[[index, 0]]], dtype=torch.uint8), index


class Latents:
    """A latent set in memory, of both mirror images."""

    num_classes, image_shape, latent_shape, fingerprint = 3, (3, 16, 16), (2, 4, 4), {}
    horizontal_flip, max_bad_fraction, has_posterior = True, 0.0, True
    moments = torch.randn(2, 11, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    seen: ClassVar[list] = []

    def __len__(self):
        return self.moments.shape[1]

    def latents(self, indices, flips, noise):
        return sample_posterior(self.moments[flips.long(), indices], noise, 0.5, 0.1)

    def labels(self, indices):
        return indices % 3


def indices(loader, start, count):
    return [batch.labels.tolist() for batch in islice(loader.starting_at(start), count)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in ("images", "labels", "noise"):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_every_image_once_per_epoch_at_any_batch_size(batch_size):
    loader = BatchLoader(Numbers(10), batch_size, seed=0, with_labels=True)
    seen = [index for batch in indices(loader, 0, 70) for index in batch]
    for epoch in range(len(seen) // 10):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20] != seen[20:30]


def test_any_step_can_be_the_first():
    loader = BatchLoader(Numbers(10), 4, seed=0, with_labels=True)
    assert indices(loader, 0, 9)[5:] == indices(loader, 5, 4)


def test_the_order_depends_on_the_seed_alone():
    orders = [indices(BatchLoader(Numbers(10), 10, seed, with_labels=True), 0, 1) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_what_comes_is_the_documented_function_of_seed_and_step():
    """Runs of any age continue: position p is item p mod n of epoch p div n, a flip is a draw below a half."""
    for step, batch in enumerate(
        islice(BatchLoader(Numbers(10, horizontal_flip=True), 7, 3, True).starting_at(0), 6)
    ):
        order = [torch.randperm(10, generator=make_generator(3, "epoch", epoch)).tolist() for epoch in range(5)]
        expected = [order[p // 10][p % 10] for p in range(7 * step, 7 * step + 7)]
        flipped = torch.rand(7, generator=make_generator(3, "flip", step)) < 0.5
        assert batch.labels.tolist() == expected
        shown = [[0, index] if flip else [index, 0] for index, flip in zip(expected, flipped, strict=True)]
        assert batch.images[:, 0, 0].tolist() == shown and batch.noise is None


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("source", [Digits(), Numbers(23, bad={3, 4}, horizontal_flip=True), Latents()])
def test_workers_do_not_change_what_comes(source, num_workers):
    noise_shape = None if isinstance(source, Latents) else (4, 2, 2)

    def batches(num_workers):
        loader = BatchLoader(source, 16, 3, True, num_workers, noise_shape=noise_shape, warn=str)
        return list(islice(loader.starting_at(2), 7))

    assert_equal(batches(num_workers), batches(0))


def test_flips_mirror_half_of_the_images_by_step():
    loader = BatchLoader(Numbers(200, horizontal_flip=True), 100, seed=0, with_labels=True)
    batch = next(loader.starting_at(1))
    flipped = batch.images[:, 0, 0, 1] > 0
    assert 30 < flipped.sum() < 70
    shown = torch.where(flipped, batch.images[:, 0, 0, 1], batch.images[:, 0, 0, 0])
    assert shown.tolist() == batch.labels.tolist()
    again = list(islice(loader.starting_at(0), 2))[1]
    assert torch.equal(batch.images, again.images)


def test_posterior_noise_is_drawn_by_step_where_an_autoencoder_takes_it():
    loader = BatchLoader(Numbers(50), 6, seed=5, with_labels=False, noise_shape=(4, 3, 3))
    first, second = islice(loader.starting_at(8), 2)
    expected = torch.stack(
        [torch.randn((4, 3, 3), generator=make_generator(5, "posterior", 8, sample)) for sample in range(6)]
    )
    assert torch.equal(first.noise, expected) and not torch.equal(second.noise, expected)


def test_latent_sets_give_x_0_with_stored_flips_and_the_same_noise():
    batch = next(BatchLoader(Latents(), 8, seed=5, with_labels=True).starting_at(3))
    order = torch.cat([torch.randperm(11, generator=make_generator(5, "epoch", epoch)) for epoch in (2, 3)])
    chosen = order[2:10]  # positions 24 to 31
    flips = torch.rand(8, generator=make_generator(5, "flip", 3)) < 0.5
    noise = draw_normal(5, "posterior", 3, range(8), (2, 4, 4))
    mean, log_variance = Latents.moments[flips.long(), chosen].float().chunk(2, dim=1)
    assert flips.any() and not flips.all()
    assert batch.noise is None and batch.images.dtype == torch.float32
    assert torch.allclose(batch.images, (mean + (log_variance / 2).exp() * noise - 0.1) * 0.5, atol=1e-6)
    assert torch.equal(batch.labels, chosen % 3)


def test_latent_sets_without_posterior_are_given_no_noise():
    class Means(Latents):
        has_posterior = False

        def latents(self, indices, flips, noise):
            assert noise is None
            return super().latents(indices, flips, noise)

    batch = next(BatchLoader(Means(), 8, seed=5, with_labels=True).starting_at(3))
    assert batch.images.shape == (8, 2, 4, 4)


def test_unlabelled_batches_for_unconditional_models():
    loader = BatchLoader(Digits(), 4, seed=0, with_labels=False)
    assert next(loader.starting_at(0)).labels is None
    source = Numbers(10)
    source.num_classes = None
    with pytest.raises(ConfigError, match=r"model\.num_classes=null"):
        BatchLoader(source, 4, seed=0, with_labels=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_image_stands_in_for_one_that_is_not(tmp_path, num_workers):
    bad, replacement = {3, 4, 9}, {3: 5, 4: 5, 9: 0}
    listed, notes = tmp_path / "bad_files.jsonl", []

    def loader(source):
        return BatchLoader(source, 4, 0, True, num_workers, bad_files=listed, warn=notes.append)

    whole = [[replacement.get(i, i) for i in batch] for batch in indices(loader(Numbers(10)), 0, 10)]
    assert not listed.exists() and not notes
    assert indices(loader(Numbers(10, bad)), 0, 10) == whole
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == ["3.png", "4.png", "9.png"]
    assert {line["reason"] for line in lines} == {"truncated"}
    assert len(notes) == 3 and "3.png: not a readable image (truncated)" in " ".join(notes)

    assert (
        indices(loader(Numbers(10, bad)), 4, 6) == whole[4:]
    )  # resumed: nothing changes, nothing is listed twice
    assert [json.loads(line) for line in listed.read_text().splitlines()] == lines and len(notes) == 3


def test_bad_images_of_earlier_starts_count(tmp_path):
    listed = tmp_path / "bad_files.jsonl"
    listed.write_text('{"file": "old.png", "reason": "empty"}\n{"file": "half')
    loader = BatchLoader(Numbers(10, {3, 4}, 0.2), 10, 0, True, bad_files=listed, warn=str)
    for _ in range(2):  # the same command again ends in the same way
        with pytest.raises(
            DataError, match=r"^3 of 10 images .*max_bad_fraction=0\.2 .*old\.png: .*bad_files\.jsonl"
        ):
            next(loader.starting_at(0))
    names = [json.loads(line)["file"] for line in listed.read_text().splitlines()]
    assert names[0] == "old.png" and sorted(names[1:]) == ["3.png", "4.png"]


@pytest.mark.fault("G8")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("length", "bad", "fraction", "said"),
    [
        (1, {0}, 0.5, "1 of 1 images cannot be read, more than data.max_bad_fraction=0.5 allows (0.png: not a"),
        (1, {0}, 1.0, "1 of 1 images cannot be read (0.png: not a readable image (truncated))"),
        (40, set(range(40)), 1.0, "40 of 40 images cannot be read ("),
        (40, set(range(40)), 0.1, "5 of 40 images cannot be read, more than data.max_bad_fraction=0.1 allows ("),
        (40, {7}, 0.0, "1 of 40 images cannot be read, more than data.max_bad_fraction=0 allows (7.png: not a"),
    ],
)  # fmt: skip
def test_too_many_bad_images_end_the_run_in_one_line(length, bad, fraction, said, num_workers):
    loader = BatchLoader(Numbers(length, bad, fraction), 16, 0, True, num_workers, warn=str)
    with pytest.raises(DataError) as caught:
        indices(loader, 0, 10)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value) and "raise data.max_bad_fraction" in str(caught.value)


def test_as_many_bad_images_as_allowed_are_allowed():
    assert indices(BatchLoader(Numbers(40, {1, 2, 3, 4}, 0.1), 16, 0, True, warn=str), 0, 10)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_other_trouble_with_the_data_is_not_passed_over(num_workers):
    class Missing(Numbers):
        def __getitem__(self, index):
            raise DataError("data.path=here: gone")

    with pytest.raises(DataError, match=r"^data\.path=here: gone$"):
        indices(BatchLoader(Missing(10), 4, 0, True, num_workers), 0, 1)
