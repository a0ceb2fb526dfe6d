"""Image i is a function of (seed, i): the same pixels in any batch, in any order, from every sampler."""

from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf

from diffussm.build import System
from diffussm.compose import compose, group_options

SMALL = ("model.hidden_size=16", "model.depth=1", "model.d_state=4", "sampling.seed=3")
SAMPLERS = [name for name in group_options("sampler") if name != "none"]
INDICES = [0, 1, 2, 3, 4, 5, 6, 11, 10**6]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """How a sum is split among threads depends on the size of a batch, and so does its rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def perturb(model: torch.nn.Module) -> None:
    """Random weights everywhere, so that nothing is multiplied by an initial zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.requires_grad_(False).eval()


def make_generator(sampler: str, batch_size: int, experiment: str | None = None, *overrides: str):
    flow = sampler.startswith("flow")
    experiment = experiment or ("digits_flow" if flow else "digits")
    config = compose(
        "train",
        [f"experiment={experiment}", f"sampler={sampler}", "sampler.num_steps=4", *SMALL, *overrides],
    )
    assert config.guidance.scale != 1 or overrides
    system = System(config, (1, 8, 8), torch.device("cpu"))
    perturb(system.model)
    config = OmegaConf.merge(config, {"sampling": {"batch_size": batch_size}})
    return system.generator(system.model, config)


def draw(generator, indices):
    """Pixels and labels by index."""
    return {
        index: (image, None if batch.labels is None else int(label))
        for batch in generator.generate(indices)
        for index, image, label in zip(
            batch.indices, batch.images, batch.images if batch.labels is None else batch.labels, strict=True
        )
    }


def assert_same(ours, expected):
    """The same labels, and pixels that differ in at most 0.1 % of places, there by one grey level."""
    assert ours.keys() <= expected.keys()
    assert all(label == expected[index][1] for index, (_, label) in ours.items())
    mine, theirs = (torch.stack([drawn[index][0] for index in ours]).int() for drawn in (ours, expected))
    difference = (mine - theirs).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() <= 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_index_and_the_seed_alone(sampler):
    whole = draw(make_generator(sampler, batch_size=len(INDICES)), INDICES)
    images = torch.stack([image for image, _ in whole.values()])
    assert images.float().std() > 20 and len(images.flatten(1).unique(dim=0)) == len(INDICES)
    for batch_size, indices in ((1, INDICES), (3, INDICES[::-1]), (7, [11, 4, 0, 10**6, 2, 5, 1]), (7, [3])):
        assert_same(draw(make_generator(sampler, batch_size), indices), whole)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_noise_of_every_step_belongs_to_its_image(sampler):
    eta = ["sampler.eta=1.0"] if sampler == "ddim" else ["sampler.variance=beta"]
    make = lambda batch_size: make_generator(sampler, batch_size, "digits_unconditional", *eta)  # noqa: E731
    whole = draw(make(len(INDICES)), INDICES)
    assert_same(draw(make(2), INDICES[::-1]), whole)


@pytest.mark.parametrize("sampler", ["ddpm", "flow_heun"])
def test_another_seed_gives_other_images(sampler):
    ours = draw(make_generator(sampler, 5), INDICES[:5])
    other = draw(make_generator(sampler, 5, None, "sampling.seed=4"), INDICES[:5])
    assert all(not torch.equal(ours[index][0], other[index][0]) for index in ours)
