"""The digits evaluator on fixed weights: what it says of real, damaged and collapsed images."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, relu

from diffussm.build import PACKAGE_PREFIX
from diffussm.compose import CONFIG_DIR
from diffussm.data.images import Digits
from diffussm.evaluation.evaluator import Evaluation, Reference, table
from diffussm.evaluation.features import DIGITS_WEIGHTS, DigitsCNN
from diffussm.evaluation.generate import Generated, Generator, balanced_labels
from diffussm.evaluation.streams import GeneratedStream
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import DataError, DivergedError
from diffussm.runtime.work_list import WorkList

REFERENCE = DIGITS_WEIGHTS.with_name("digits_reference.npz")


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return Evaluation(DigitsCNN.pretrained(), REFERENCE, num_samples=1000, class_agreement=True)


def measure(evaluation, images, labels=None):
    return evaluation._measure([Generated(range(len(images)), images, labels)], torch.device("cpu"))


def test_real_digits_score_well_and_damage_costs_more_the_worse_it_is(evaluation):
    held_out = Digits("held_out")
    real = measure(evaluation, held_out.images, held_out.labels)
    assert real["FID-digits"] < 10 and real["class_agreement"] > 0.95
    assert real["precision"] > 0.8 and real["recall"] > 0.8 and real["IS"] > 8.5
    generator = torch.Generator().manual_seed(0)
    fids = [real["FID-digits"]]
    for sigma in (16, 64, 128):
        noise = sigma * torch.randn(held_out.images.shape, generator=generator)
        fids.append(measure(evaluation, (held_out.images + noise).clamp(0, 255).byte())["FID-digits"])
    assert fids == sorted(fids) and fids[-1] > 150
    noise = torch.randint(0, 256, (500, 1, 8, 8), generator=generator, dtype=torch.uint8)
    assert measure(evaluation, noise)["FID-digits"] > 200


def test_collapse_to_one_class_is_seen(evaluation):
    digits = Digits()
    threes = measure(evaluation, digits.images[digits.labels == 3])
    assert threes["FID-digits"] > 200 and threes["recall"] < 0.5 and threes["IS"] < 2


def test_real_against_real_is_the_held_out_split(evaluation):
    held_out = Digits("held_out")
    expected = {**measure(evaluation, held_out.images, held_out.labels), "num_samples": 360}
    assert evaluation.real_against_real(torch.device("cpu")) == pytest.approx(expected, rel=1e-6)


def test_reference_statistics_are_those_of_the_training_split(evaluation):
    features = DigitsCNN.pretrained()(Digits().images)
    for (mu, sigma), values in (
        (evaluation.reference.pool, features.pool), (evaluation.reference.spatial, features.spatial)
    ):  # fmt: skip
        assert np.allclose(mu, values.double().mean(0), atol=1e-5)
        assert np.allclose(sigma, np.cov(values.double().numpy(), rowvar=False), atol=1e-4)
    assert torch.equal(evaluation.reference.images, Digits().images)


def test_spatial_features_are_nhwc():
    network, images = DigitsCNN.pretrained(), Digits("held_out").images[:3]
    x = relu(conv2d(images.float() / 127.5 - 1, network.conv1.weight, network.conv1.bias, padding=1))
    x = relu(conv2d(x, network.conv2.weight, network.conv2.bias, padding=1, stride=2))
    x = relu(conv2d(x, network.conv3.weight, network.conv3.bias, padding=1))
    features = network(images)
    assert torch.allclose(features.spatial, x[:, :7].permute(0, 2, 3, 1).reshape(3, -1), atol=1e-5)
    assert torch.allclose(features.pool, x.mean((2, 3)), atol=1e-5)
    assert torch.allclose(features.logits, features.pool @ network.classifier.weight.T, atol=1e-5)


def perfect_generator(batch_size, num_classes=10) -> Generator:
    """Draws the real image that a sample's noise and label point to."""
    digits = Digits()

    def sample(x_T, y, noise):
        chosen = []
        for latent, label in zip(x_T, y, strict=True):
            candidates = (digits.labels == label).nonzero().flatten()
            chosen.append(candidates[int(latent.abs().sum() * 1e6) % len(candidates)])
        return digits.images[torch.stack(chosen)]

    return Generator(sample, lambda x: x, (1, 8, 8), num_classes, 0, batch_size, torch.device("cpu"))


def run(evaluation, generator, path, advance=lambda done: None):
    processes = Processes()
    work = WorkList(path, evaluation.num_samples, 256, ".safetensors")
    work.open("the same", processes)
    try:
        stream = GeneratedStream(generator, evaluation.num_samples)
        return evaluation.run(stream, work, processes.undertake(), torch.device("cpu"), advance)
    finally:
        work.close()


def test_results_do_not_depend_on_the_batch_size(evaluation, tmp_path):
    results = [run(evaluation, perfect_generator(size), tmp_path / str(size)) for size in (64, 1000)]
    for result in results:
        assert result["num_samples"] == 1000 and result.pop("images_per_second") > 0
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0]["FID-digits"] < 6 and results[0]["class_agreement"] > 0.99


def test_progress_is_told_of_every_image(evaluation, tmp_path):
    seen = []
    run(evaluation, perfect_generator(200), tmp_path, seen.append)
    assert seen == [200, 256, 456, 512, 712, 768, 968, 1000]


def test_labels_are_balanced_shuffled_and_a_function_of_the_index():
    labels = balanced_labels(0, range(1000), 10)
    assert torch.bincount(labels).tolist() == [100] * 10
    assert labels[:30].tolist() != sorted(labels[:30].tolist())
    assert torch.equal(balanced_labels(0, [17, 503], 10), labels[[17, 503]])


def test_the_record_names_everything_and_is_json(evaluation):
    record = json.loads(json.dumps(evaluation.record()))
    assert len(record["extractor"]["sha256"]) == len(record["reference"]["sha256"]) == 64
    assert record["reference"]["preprocessing"].startswith("scikit-learn digits")
    assert {"diffussm", "torch", "python"} <= set(record["versions"])


def test_shipped_evaluator_is_small_and_where_the_configuration_says():
    assert DIGITS_WEIGHTS.stat().st_size < 300_000 and REFERENCE.stat().st_size < 300_000
    assert (
        f"{PACKAGE_PREFIX}evaluation/{REFERENCE.name}" in (CONFIG_DIR / "evaluation" / "digits.yaml").read_text()
    )


def test_damaged_files_are_named(tmp_path):
    for content in (b"", b"PK\x03\x04 not an archive", b"\x80\x04pickle"):
        (tmp_path / "reference.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"reference\.npz"):
            Reference(tmp_path / "reference.npz")
        with pytest.raises(DataError, match=r"reference\.npz"):
            DigitsCNN.pretrained(tmp_path / "reference.npz")
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        Reference(tmp_path / "nowhere.npz")


def test_table_is_aligned_and_shows_dashes():
    text = table(
        {"a": {"FID": 1.23456, "num_samples": 10}, "longer": {"FID": None, "IS": 12.34, "num_samples": 2000}}
    )
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a", "10", "1.235", "-"] and lines[2].split() == ["longer", "2,000", "-", "12.3"]


def test_samples_that_are_not_finite_are_an_error():
    generator = Generator(
        lambda x_T, y, noise: x_T * float("nan"), lambda x: x, (1, 8, 8), None, 0, 4, torch.device("cpu")
    )
    with pytest.raises(DivergedError, match=r"samples 0\.\.3 are not finite"):
        next(generator.generate(range(8)))
