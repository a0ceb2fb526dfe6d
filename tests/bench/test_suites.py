"""Groups are measured whole; what does not fit is skipped with its reason; every comparison can happen."""

import dataclasses
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffussm.bench import evaluating, loading, scaling, suites, training, workload
from diffussm.bench.suites import COMPARISONS, SUITES, run_suites
from diffussm.bench.workload import Measurement, Setup, Skip, Subject, Workload, measure_group
from diffussm.config import BENCH_SUITES
from diffussm.data.images import ImageFolder

TINY = Setup(
    lengths=(16, 64),
    batch_size=2,
    hidden_size=64,
    d_state=4,
    depth=2,
    repetitions=2,
    seconds=600.0,  # never what ends a measurement of this size, on however busy a machine
    call_limit_seconds=600.0,
    memory_limit_gib=1.0,
    device=torch.device("cpu"),
    precision="fp32",
    compile=False,
)


def linear(name="linear", width=8) -> Subject:
    return Subject(
        name,
        lambda device: (nn.Linear(width, width, bias=False), [torch.randn(4, width, requires_grad=True)]),
    )


DATA_SUBJECTS = (loading.LATENTS, loading.FOLDER, loading.TORCHVISION)
EVALUATION_SUBJECTS = (
    evaluating.FEATURES, evaluating.CHANNELS_LAST, evaluating.FIDELITY, evaluating.DISTANCE, evaluating.SQRTM,
)  # fmt: skip


def test_the_configuration_names_the_suites_there_are():
    assert set(BENCH_SUITES) == {*SUITES, "data", "trainer", "evaluation", "scaling"}


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "xl"])
def test_every_subject_is_measured_at_every_length_and_phase(suite):
    maker, phases, _ = SUITES[suite]
    results = list(run_suites([suite], TINY, lambda line: None))
    names = [subject.name for subject in maker(TINY, 16)]
    assert [(m.length, m.phase, m.subject) for m in results] == [
        (length, phase, name) for length in TINY.lengths for phase in phases for name in names
    ]
    for measurement in results:
        assert measurement.timing.seconds > 0 and measurement.timing.repetitions == 2
        assert measurement.peak_bytes > 0


def test_every_comparison_names_subjects_of_its_suite():
    for comparison in COMPARISONS:
        if comparison.suite not in SUITES:
            known = {*DATA_SUBJECTS, *EVALUATION_SUBJECTS, *scaling.SUBJECTS, training.TRAINER, training.BARE, ""}
            assert {comparison.subject, comparison.against} <= known
            continue
        maker, phases, most = SUITES[comparison.suite]
        names = {subject.name for subject in maker(TINY, 16)}
        assert {comparison.subject, comparison.against} <= names | {""}
        assert comparison.phase in phases and all(length <= most for length in comparison.goals or ())


def test_subjects_of_one_length_see_the_same_number_of_tokens():
    for suite in ("layer", "convolution"):
        maker, *_ = SUITES[suite]
        shapes = {tuple(subject.build(TINY.device)[1][0].shape) for subject in maker(TINY, 64)}
        assert shapes == {(2, 64, 64)}


def test_a_training_step_reaches_parameters_and_inputs_and_leaves_no_gradients():
    module, inputs = linear().build(TINY.device)
    seen = []
    for tensor in (module.weight, *inputs):
        tensor.register_hook(lambda grad: seen.append(grad.shape))
    training = Workload(module, inputs, TINY)
    training.run("training step")
    assert sorted(seen) == [(4, 8), (8, 8)]
    assert module.weight.grad is None and inputs[0].grad is None
    training.run("forward")
    assert len(seen) == 2


def test_gates_that_begin_at_zero_are_opened():
    module, inputs = linear().build(TINY.device)
    nn.init.zeros_(module.weight)
    assert Workload(module, inputs, TINY).module.weight.abs().min() > 0


def test_work_is_counted_for_forward_and_three_times_for_training():
    for phase, passes in (("forward", 1), ("training step", 3)):
        (measurement,) = measure_group("test", phase, 4, [linear()], TINY)
        assert measurement.flops == passes * 2 * 4 * 8 * 8 and measurement.parameters == 64


def test_what_does_not_fit_is_skipped_and_the_rest_measured():
    large = linear("large", width=2**15)  # 4 GiB of weights, and as much to set them
    skip, measurement = measure_group("test", "forward", 4, [large, linear()], TINY)
    assert isinstance(skip, Skip) and "would need 8.0 GiB, memory_limit_gib=1" in skip.reason
    assert isinstance(measurement, Measurement) and measurement.subject == "linear"


def test_what_may_take_too_long_is_skipped_by_the_length_before(monkeypatch):
    monkeypatch.setitem(suites.SUITES, "gemm", (lambda setup, length: [linear()], ("forward",), 2**20))
    timing = workload.Timing(seconds=10.0, spread=0.0, repetitions=1)
    monkeypatch.setattr(workload, "alternate", lambda calls, *_: dict.fromkeys(calls, timing))
    setup = dataclasses.replace(TINY, lengths=(64, 16, 256), call_limit_seconds=159.0)
    results = list(run_suites(["gemm"], setup, lambda line: None))
    assert [type(result) for result in results] == [Measurement, Skip, Skip]
    assert [result.length for result in results] == [16, 64, 256]
    assert "may take 160 s, call_limit_seconds=159" in results[1].reason


def test_the_suite_data_counts_what_is_loaded_and_leaves_nothing_behind(monkeypatch, tmp_path):
    for name, value in {"NUM_LATENTS": 16, "LATENT_BATCH": 8, "LATENT_BATCHES": 3}.items():
        monkeypatch.setattr(loading, name, value)
    for name, value in {"NUM_PHOTOGRAPHS": 4, "PHOTOGRAPH_BATCH": 2, "PHOTOGRAPH_BATCHES": 2}.items():
        monkeypatch.setattr(loading, name, value)
    monkeypatch.setattr(loading.tempfile, "tempdir", str(tmp_path))
    results = list(run_suites(["data"], TINY, lambda line: None))
    assert [(m.subject, m.length, m.items) for m in results] == list(
        zip(DATA_SUBJECTS, (32 * 32, 256 * 256, 256 * 256), (24, 4, 4), strict=True)
    )
    assert all(m.phase == "loading" and m.timing.repetitions == 2 for m in results)
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()


def test_both_pipelines_read_the_same_pixels(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "NUM_PHOTOGRAPHS", 4)
    loading.make_photographs(tmp_path)
    ours = ImageFolder(tmp_path, loading.RESOLUTION)
    for index, path in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        with Image.open(path) as image:
            assert image.size == loading.PHOTOGRAPH_SIZE
            theirs = np.asarray(loading._crop_as_adm(image.convert("RGB")))
        assert np.array_equal(ours[index][0].permute(1, 2, 0).numpy(), theirs)


def test_the_trainer_is_measured_against_a_bare_loop():
    results = list(run_suites(["trainer"], TINY, lambda line: None))
    assert [(m.subject, m.items) for m in results] == [
        ("trainer", TINY.batch_size),
        ("bare loop", TINY.batch_size),
    ]
    assert all(m.timing.seconds > 0 and m.length == training.TOKENS for m in results)


def test_the_suite_evaluation_compares_equal_work(monkeypatch):
    for name, value in {"RESOLUTION": 64, "BATCH": 2, "DIM": 64}.items():
        monkeypatch.setattr(evaluating, name, value)
    setup = dataclasses.replace(TINY, repetitions=1)
    results = list(run_suites(["evaluation"], setup, lambda line: None))
    assert [(m.subject, m.items) for m in results] == list(zip(EVALUATION_SUBJECTS, (4, 4, 4, 0, 0), strict=True))
    features = [call() for call in evaluating.extractions(evaluating._Images(2), TINY.device).values()]
    assert torch.equal(features[0], features[2])
    torch.testing.assert_close(features[1], features[0], rtol=1e-3, atol=1e-5)
    ours, theirs = (call() for call in evaluating.distances(TINY.device).values())
    assert ours == pytest.approx(theirs, abs=1e-6) and ours > 0.1


def test_without_scipy_its_distance_is_skipped(monkeypatch):
    monkeypatch.setattr(evaluating, "DIM", 8)
    monkeypatch.setattr(evaluating, "extractions", lambda data, device: {evaluating.FEATURES: lambda: None})
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    _, skip, measurement = run_suites(["evaluation"], TINY, lambda line: None)
    assert isinstance(skip, Skip) and "pip install scipy" in skip.reason
    assert measurement.subject == evaluating.DISTANCE
