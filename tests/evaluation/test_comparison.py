"""Metrics are the same for any batches, ranks and order; what is missing is left out, intervals are an option."""

import itertools

import numpy as np
import pytest
import torch

from diffussm.data.images import Digits
from diffussm.evaluation.comparison import Comparison
from diffussm.evaluation.evaluator import Evaluation, table
from diffussm.evaluation.features import DIGITS_WEIGHTS, DigitsCNN, Features
from diffussm.evaluation.generate import Generated
from diffussm.evaluation.observed import Observed
from diffussm.evaluation.reference import Reference

REFERENCE = DIGITS_WEIGHTS.with_name("digits_reference.npz")
CPU = torch.device("cpu")
ALL = {"FID-digits", "sFID-digits", "IS", "precision", "recall", "KID-digits", "density", "coverage"}


class Pixels:
    """An extractor that hardly computes: pool and logits are numbers in the image, of 2x2 RGB."""

    name, sha256, image_shape, settings = "pixels", "c0ffee", (3, 2, 2), {}
    dims = {"pool": 12, "spatial": 6, "logits": 3}  # noqa: RUF012

    def __call__(self, images):
        x = images.flatten(1).float()
        return Features(x, x[:, :6], x[:, :3] / 50)

    def to(self, device):
        return self


def pixels(count, seed=0):
    return torch.randint(
        0, 256, (count, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "pixels.npz"
    np.savez(path, arr_0=pixels(50, seed=1).permute(0, 2, 3, 1).numpy())
    return Comparison(Pixels(), Reference(path), k=3, class_agreement=False, intervals=False, extrapolate=False)


@pytest.mark.parametrize("count", [7, 100, 5003])
def test_any_number_of_ranks_and_any_batch_size_give_the_same(comparison, count):
    images, wanted = pixels(count), ["fid", "sfid", "is"]
    results = []
    for ranks, batch_size in itertools.product((1, 2, 3), (1, 32, 64)):
        if count == 5003 and batch_size == 1:
            batch_size = 5
        gathered = []
        for rank in range(ranks):
            mine = torch.arange(count)[rank::ranks].flip(0)  # in no particular order
            batches = [Generated(part.tolist(), images[part], None) for part in mine.split(batch_size)]
            gathered.append(comparison.observe(batches, CPU, wanted))
        # As another process would have it: by way of tensors.
        first, *others = [Observed.from_state(one.sums, one.kept, one.state()) for one in gathered[::-1]]
        for other in others:
            first.merge(other)
        assert first.count == count
        results.append(comparison.compare(first, CPU, wanted))
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-6, rel=1e-9)
    assert set(results[0]) == {"FID-pixels", "sFID-pixels", "IS"} and results[0]["FID-pixels"] > 0


def test_one_image_is_no_distribution(comparison):
    observed = comparison.observe([Generated([0], pixels(1), None)], CPU, ["fid"])
    assert observed.count == 1
    with pytest.raises(ValueError, match="at least 2 samples"):
        comparison.compare(observed, CPU, ["fid"])


def test_a_rank_without_images_changes_nothing(comparison):
    batch = Generated(range(9), pixels(9), None)
    full, empty = comparison.observe([batch], CPU), comparison.observe([], CPU)
    empty.merge(full)
    again = Observed.from_state(full.sums, full.kept, comparison.observe([], CPU).state())
    again.merge(empty)
    assert comparison.compare(again, CPU) == comparison.compare(full, CPU)
    assert full.count == 9 and comparison.observe([], CPU).count == 0  # merging left the source alone


def test_an_image_counts_once(comparison):
    batch = Generated([3, 4, 5, 6, 7, 8], pixels(6), None)
    twice = comparison.observe([batch, Generated([11, 5], pixels(2), None)], CPU)
    with pytest.raises(ValueError, match="image 5 was observed more than once"):
        comparison.compare(twice, CPU)


def test_statistics_of_the_reference_are_those_of_its_images_where_it_has_none(comparison):
    images = comparison.reference.images.flatten(1).double().numpy()
    mean, covariance = images.mean(axis=0), np.cov(images, rowvar=False)
    distance = comparison._frechet("pool", CPU)
    assert np.allclose(distance.mu, mean) and np.allclose(distance.sigma, covariance)


@pytest.fixture(scope="module")
def evaluation():
    return Evaluation(DigitsCNN.pretrained(), REFERENCE, num_samples=300, intervals=True, extrapolate=True)


def test_intervals_and_extrapolation_come_on_request_and_show_in_the_table(evaluation):
    images = Digits("held_out").images
    found = evaluation._measure([Generated(range(len(images)), images, None)], CPU)
    bounds = found.pop("intervals")
    assert set(bounds) == ALL and set(found) == ALL | {"FID-digits_inf"}
    for name, (low, high) in bounds.items():
        assert low <= found[name] <= high and low < high
    assert found["FID-digits_inf"] < found["FID-digits"]  # which has a bias upwards
    plain = Evaluation(DigitsCNN.pretrained(), REFERENCE, num_samples=300)
    del found["FID-digits_inf"]
    assert plain._measure([Generated(range(len(images)), images, None)], CPU) == pytest.approx(
        found, rel=1e-9, abs=1e-6
    )
    line = table({"real": {"num_samples": 360, "intervals": bounds, **found}}).splitlines()[1]
    assert f"{found['recall']:.3f} ±" in line


def test_only_what_a_metric_needs_is_gathered(evaluation):
    batch = [Generated(range(8), Digits("held_out").images[:8], None)]
    plain = Evaluation(DigitsCNN.pretrained(), REFERENCE, num_samples=300).comparison
    assert set(plain.observe(batch, CPU, ["fid"]).state()) == {"rows.index"} | {
        f"sums.pool.0.{key}" for key in ("count", "sum", "outer")
    }
    extrapolated = evaluation.comparison.observe(batch, CPU, ["fid"])
    assert [part.count for part in extrapolated.parts("pool")] == [2, 2, 2, 2]
    again = Observed.from_state(("pool",), ("pool",), extrapolated.state(), num_parts=4)
    assert again.statistics("pool").count == again.count == 8
    assert plain.observe(batch, CPU, ["precision"]).kept == ("pool",)
    assert evaluation.comparison.observe(batch, CPU, ["sfid"]).kept == ("spatial",)


@pytest.mark.parametrize(
    ("arrays", "available"),
    [
        (("mu", "sigma"), ("fid", "is")),
        (("mu", "sigma", "mu_s", "sigma_s"), ("fid", "sfid", "is")),
        (("arr_0",), ("fid", "sfid", "is", "precision", "recall", "kid", "density", "coverage")),
        (("mu", "sigma", "arr_0"), ("fid", "is", "precision", "recall", "kid", "density", "coverage")),
    ],
)
def test_what_a_reference_does_not_have_is_left_out(tmp_path, arrays, available):
    with np.load(REFERENCE) as whole:
        np.savez(tmp_path / "part.npz", **{name: whole[name] for name in arrays})
    evaluation = Evaluation(DigitsCNN.pretrained(), tmp_path / "part.npz", num_samples=100)
    assert evaluation.comparison.available == available
    found = evaluation._measure([Generated(range(100), Digits().images[:100], None)], CPU)
    assert [name.lower().removesuffix("-digits") for name in found] == sorted(
        available, key=[n.lower().removesuffix("-digits") for n in found].index
    )


def test_too_few_images_for_what_was_asked_are_refused():
    for options, says in (
        ({"intervals": True}, "intervals=true: needs at least 100 images, there are 50"),
        ({"extrapolate": True, "num_samples": 7}, "extrapolate=true: needs at least 8 images, there are 7"),
    ):
        with pytest.raises(ValueError, match=says):
            Evaluation(DigitsCNN.pretrained(), REFERENCE, **{"num_samples": 50, **options})
