"""Batches are a function of (seed, step): any start, any worker count, every image once per epoch."""

from itertools import islice

import pytest
import torch
from PIL import Image

from diffussm.data.images import Digits, ImageFolder
from diffussm.data.loader import BatchLoader
from diffussm.runtime.errors import ConfigError, DataError


class Numbers:
    """Images that show their own index."""

    num_classes, image_shape, horizontal_flip, fingerprint = 100, (1, 1, 2), False, {}

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([[[index, 0]]], dtype=torch.uint8), index


def indices(loader, start, count):
    return [batch.labels.tolist() for batch in islice(loader.starting_at(start), count)]


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


def test_workers_do_not_change_what_comes():
    digits = Digits()
    reference = list(islice(BatchLoader(digits, 16, 3, with_labels=True).starting_at(2), 4))
    workers = list(islice(BatchLoader(digits, 16, 3, with_labels=True, num_workers=2).starting_at(2), 4))
    for a, b in zip(reference, workers, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_flips_mirror_half_of_the_images_by_step():
    source = Numbers(200)
    source.horizontal_flip = True
    loader = BatchLoader(source, 100, seed=0, with_labels=True)
    batch = next(loader.starting_at(1))
    flipped = batch.images[:, 0, 0, 1] > 0
    assert 30 < flipped.sum() < 70
    shown = torch.where(flipped, batch.images[:, 0, 0, 1], batch.images[:, 0, 0, 0])
    assert shown.tolist() == batch.labels.tolist()
    again = list(islice(loader.starting_at(0), 2))[1]
    assert torch.equal(batch.images, again.images)


def test_unlabelled_batches_for_unconditional_models():
    loader = BatchLoader(Digits(), 4, seed=0, with_labels=False)
    assert next(loader.starting_at(0)).labels is None
    source = Numbers(10)
    source.num_classes = None
    with pytest.raises(ConfigError, match=r"model\.num_classes=null"):
        BatchLoader(source, 4, seed=0, with_labels=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_is_one_line_from_any_process(tmp_path, num_workers):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    loader = BatchLoader(ImageFolder(tmp_path, 8), 2, seed=0, with_labels=False, num_workers=num_workers)
    with pytest.raises(DataError, match=r"bad\.png: not a readable image") as caught:
        next(loader.starting_at(0))
    assert "\n" not in str(caught.value)
