"""Randomness is a function of (seed, purpose, index)."""

import torch

from diffussm.runtime.seeding import SampleNoise, derive_seed, make_generator


def test_streams_differ_by_every_argument_and_repeat_exactly():
    seeds = {
        derive_seed(0, "step", 1), derive_seed(1, "step", 1), derive_seed(0, "flip", 1), derive_seed(0, "step", 2),
        derive_seed(0, "step", 12), derive_seed(0, "step", 1, 2),
    }  # fmt: skip
    assert len(seeds) == 6
    assert derive_seed(0, "step", 1) == 2111436579075594638  # a change here silently changes every run
    assert torch.equal(
        torch.rand(3, generator=make_generator(0, "x")), torch.rand(3, generator=make_generator(0, "x"))
    )


def test_sample_noise_does_not_depend_on_the_batch():
    together = SampleNoise(5, [3, 4, 9], (2, 2), torch.device("cpu"))
    alone = SampleNoise(5, [9], (2, 2), torch.device("cpu"))
    for _ in range(3):
        assert torch.equal(together()[2:], alone())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    SampleNoise(0, range(3), (4,), torch.device("cpu"))()
    assert torch.equal(torch.get_rng_state(), before)
