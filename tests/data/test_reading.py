"""Reading a data set once: every image in its order, by any number of workers, bad ones told of."""

import pytest
import torch

from diffussm.data.images import Digits
from diffussm.data.reading import in_batches, read_images
from diffussm.runtime.errors import BadImage


class Some(Digits):
    """The digits, of which some cannot be read."""

    def __getitem__(self, index):
        if index % 5 == 1:
            raise BadImage(f"digit {index}", "truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 8, 30])
def test_images_come_in_the_order_that_is_asked_for(num_workers, length):
    source, bad = Some(), []
    indices = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:length].tolist()
    batches = list(read_images(source, in_batches(indices, 4), num_workers, bad.extend))
    assert [index for batch in batches for index in batch.indices] == [i for i in indices if i % 5 != 1]
    assert [one.name for one in bad] == [f"digit {i}" for i in indices if i % 5 == 1]
    for batch in batches:
        assert torch.equal(batch.images, source.images[batch.indices])
        assert batch.labels == source.labels[batch.indices].tolist()


def test_too_many_bad_ones_end_it_where_they_are_told_of():
    def refuse(bad):
        if bad:
            raise bad[0]

    with pytest.raises(BadImage, match="digit 1"):
        list(read_images(Some(), in_batches(range(20), 4), 2, refuse))
