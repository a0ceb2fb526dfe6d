"""Averages of the weights against slow sums in float64, over stops and resumes, and rebuilt after the run."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL_RUN
from test_trainer import StopAfter, fingerprint, make_trainer
from torch import nn

from diffussm.build import load_weights
from diffussm.cli import main
from diffussm.runtime.errors import ConfigError, Preempted, RunDirectoryError, StorageError
from diffussm.training import posthoc
from diffussm.training.checkpoint import find_checkpoint, seal
from diffussm.training.ema import ModelAverages, average_names, power_gamma

TRACKED = [0.05, 0.1]
SHORT = ("trainer.total_images=320", "trainer.save_every_images=160", "trainer.log_every_images=320")
POWER = (*SHORT, "trainer.ema_power=[0.05,0.1]")


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_has_the_relative_standard_deviation(sigma_rel):
    gamma = power_gamma(sigma_rel)
    assert gamma >= 0
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-12)
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    profile = tau**gamma / (tau**gamma).sum()
    mean = (profile * tau).sum()
    assert (profile * (tau - mean).square()).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, math.nan])
def test_a_sigma_rel_without_gamma_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel=.*at most 0\.28"):
        power_gamma(sigma_rel)


def tracked(num_updates: int, power: list[float], weight=lambda t: float(t)) -> tuple[nn.Module, ModelAverages]:
    """Averages of one weight, which is `weight(t)` in update t."""
    model = nn.Linear(1, 1, bias=False)
    averages = ModelAverages(model, [0.9], power)
    for t in range(1, num_updates + 1):
        nn.init.constant_(model.weight, weight(t))
        averages.update(model)
    return model, averages


def value(averages: ModelAverages, name: str) -> float:
    return averages.state()[name]["weight"].item()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_power_average_is_the_slow_sum_and_the_closed_form_of_a_line(sigma_rel):
    T, p = 300, power_gamma(sigma_rel) + 1
    _, averages = tracked(T, [sigma_rel])
    slow = 0.0
    for t in range(1, T + 1):
        beta = (1 - 1 / t) ** p
        slow = beta * slow + (1 - beta) * t
    assert value(averages, f"ema_power_{sigma_rel}") == pytest.approx(slow, rel=1e-5)
    # Update t counts for (t/T)^p - ((t-1)/T)^p, so that the mean is T - sum_{t<T} (t/T)^p: about p / (p+1) T.
    assert slow == pytest.approx(T - sum((t / T) ** p for t in range(1, T)), rel=1e-9)
    assert slow == pytest.approx(p / (p + 1) * T + 0.5, rel=1e-3)


def test_averages_of_fp32_weights_are_fp32_and_take_buffers_along():
    model = nn.BatchNorm1d(2)
    averages = ModelAverages(model, [0.9, 0.5], TRACKED)
    model.running_mean.fill_(3)
    averages.update(model)
    assert list(averages.state()) == average_names([0.9, 0.5], TRACKED)
    assert average_names([0.9], [0.05]) == ["ema_0.9", "ema_power_0.05"]
    for state in averages.state().values():
        assert state["weight"].dtype == torch.float32 and torch.equal(state["running_mean"], model.running_mean)
    assert not any(parameter.requires_grad for parameter in averages.first.parameters())


def test_averages_over_stops_are_exactly_those_of_the_weights(tmp_path):
    """Of every decay and profile: the same updates in the same order, as if the run had never stopped."""
    overrides = (*POWER, "trainer.ema_decays=[0.998,0.5]")
    whole = make_trainer(tmp_path / "whole", *overrides)
    history, update = [], whole.averages.update

    def record(model):
        update(model)
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    whole.averages.update = record
    whole.run()
    for steps in (3, 1, 9):
        with pytest.raises(Preempted):
            make_trainer(tmp_path / "run", *overrides, stop=StopAfter(steps)).run()
    trainer = make_trainer(tmp_path / "run", *overrides)
    trainer.run()
    assert trainer.averages.num_updates == len(history) == 20
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    checkpoint = find_checkpoint(tmp_path / "run")
    betas = {f"ema_{decay}": lambda t, decay=decay: decay for decay in (0.998, 0.5)}
    for sigma_rel in TRACKED:
        gamma = power_gamma(sigma_rel)
        betas[f"ema_power_{sigma_rel}"] = lambda t, gamma=gamma: (1 - 1 / t) ** (gamma + 1)
    assert checkpoint.ema_names == list(betas)
    for name, beta in betas.items():
        found = checkpoint.tensors(name)
        for key, tensor in found.items():
            expected = history[0][key].double()
            for t, weights in enumerate(history[1:], start=2):
                expected = beta(t) * expected + (1 - beta(t)) * weights[key].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def profiles(num_times: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = torch.arange(1, num_times + 1, dtype=torch.float64).repeat_interleave(2) / num_times
    return times, torch.tensor([power_gamma(sigma_rel) for sigma_rel in TRACKED] * num_times, dtype=torch.float64)


def test_inner_products_are_the_integrals_of_profiles():
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def profile(t, gamma):
        return torch.where(tau < t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)

    for t_a, gamma_a, t_b, gamma_b in [(1, 2, 1, 5), (0.3, 2, 1, 5), (1, 2, 0.3, 5), (0.7, 6, 0.2, 16.0)]:
        slow = (profile(t_a, gamma_a) * profile(t_b, gamma_b)).mean().item()
        arguments = [torch.tensor(float(x), dtype=torch.float64) for x in (t_a, gamma_a, t_b, gamma_b)]
        assert posthoc.inner_product(*arguments).item() == pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize("num_times", [1, 2, 8, 64])
@pytest.mark.parametrize("sigma_rel", TRACKED)
def test_a_stored_profile_is_made_of_itself(num_times, sigma_rel):
    coefficients, deviation = posthoc.fit(*profiles(num_times), power_gamma(sigma_rel))
    expected = torch.zeros_like(coefficients)
    expected[-2 + TRACKED.index(sigma_rel)] = 1
    assert torch.allclose(coefficients, expected, atol=1e-6) and deviation < 1e-6


def test_more_snapshots_come_closer_and_coefficients_sum_to_one():
    deviations = []
    for num_times in (2, 4, 8, 16, 32):
        coefficients, deviation = posthoc.fit(*profiles(num_times), power_gamma(0.15))
        assert coefficients.sum().item() == pytest.approx(1, abs=1e-9)
        deviations.append(deviation)
    assert deviations == sorted(deviations, reverse=True) and deviations[-1] < 0.005 < deviations[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Twenty updates, with snapshots at every other one, and an average of another length to compare with."""
    path = tmp_path_factory.mktemp("ema") / "run"
    overrides = (*SHORT, "trainer.ema_power=[0.05,0.1,0.15]", "trainer.ema_snapshot_every_images=32")
    make_trainer(path, *overrides).run()
    return path


def without(path: Path, copy: Path, name: str) -> Path:
    """A run that has not tracked one of its averages."""
    for folder in (*path.glob("checkpoints/step-*"), *path.glob("ema_snapshots/step-*")):
        there = copy / folder.relative_to(path)
        there.mkdir(parents=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"][f"{name}.safetensors"]
        (there / "manifest.json").write_text(json.dumps(seal(manifest)))
        for file in manifest["files"]:
            (there / file).symlink_to(folder / file)
    return copy


def test_snapshots_are_kept_at_their_times(run):
    found = sorted(run.glob("ema_snapshots/step-*"))
    assert [int(path.name.removeprefix("step-")) for path in found] == list(range(2, 21, 2))
    averages = {f"ema_power_{sigma_rel}.safetensors" for sigma_rel in (0.05, 0.1, 0.15)}
    assert {path.name for path in found[0].iterdir()} == {"manifest.json", "snapshot.json", *averages}
    assert json.loads((found[0] / "snapshot.json").read_text()) == {"images": 32, "ema_updates": 2}


def test_what_is_rebuilt_is_what_would_have_been_tracked(run, tmp_path):
    tracked_directly = find_checkpoint(run).tensors("ema_power_0.15")
    checkpoint = find_checkpoint(without(run, tmp_path / "run", "ema_power_0.15"))
    rebuilt = posthoc.reconstruct(checkpoint, "posthoc_0.15", pytest.fail, "weights")
    itself = posthoc.reconstruct(checkpoint, "posthoc_0.05", pytest.fail, "weights")
    nearest = min(checkpoint.ema_names, key=lambda name: distance(checkpoint.tensors(name), tracked_directly))
    assert distance(rebuilt, tracked_directly) < 0.1 * distance(checkpoint.tensors(nearest), tracked_directly)
    assert {tensor.dtype for tensor in rebuilt.values()} == {torch.float32}
    for name, tensor in checkpoint.tensors("ema_power_0.05").items():
        torch.testing.assert_close(itself[name], tensor, rtol=1e-6, atol=1e-7)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return math.sqrt(sum((ours[name] - theirs[name]).square().sum().item() for name in ours))


def test_sample_and_export_take_rebuilt_averages_and_say_what_is_wrong(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [f"checkpoint={run}", "device=cpu"]
    assert main(["sample", *common, "num_images=2", "sampling.weights=posthoc_0.13", "out=samples"]) == 0
    answer = json.loads(Path("samples/samples.json").read_text())
    assert answer["weights"] == "posthoc_0.13"
    assert (
        "tf32" not in answer["request"]["sampling"]
    )  # as in the requests of older results, which are still found
    export = ["export", f"checkpoint={run}", "layout=official"]
    assert main([*export, "weights=posthoc_0.13", "to=a.safetensors"]) == 0
    assert main([*export, "weights=ema_power_0.15", "to=b.safetensors"]) == 0
    ours, theirs = (safetensors.torch.load_file(f"{name}.safetensors") for name in "ab")
    assert 0 < distance(ours, theirs) < 1
    capsys.readouterr()
    for weights, message in [
        ("posthoc_wide", "sampling.weights=posthoc_wide: could not convert string to float"),
        ("posthoc_0.5", "sampling.weights=posthoc_0.5: sigma_rel=0.5: must be above 0 and at most 0.28"),
        ("posthoc_0.01", "give no such profile"),
        ("post", "sampling.weights=post: choose ema"),
    ]:
        assert main(["sample", *common, f"sampling.weights={weights}"]) == 2
        assert message in capsys.readouterr().err


def test_a_run_without_power_averages_has_nothing_to_rebuild_from(tmp_path):
    trainer = make_trainer(tmp_path, "trainer.total_images=32", "trainer.save_every_images=32")
    trainer.run()
    with pytest.raises(
        ConfigError, match=r"sampling\.weights=posthoc_0\.1: .* no power averages.*trainer\.ema_power"
    ):
        load_weights(find_checkpoint(tmp_path), trainer.model, "posthoc_0.1")


def test_a_damaged_snapshot_is_passed_over_and_later_ones_do_not_count(run, tmp_path):
    copy = without(run, tmp_path / "run", "ema_power_0.15")
    damaged = copy / "ema_snapshots" / "step-000000000004" / "ema_power_0.1.safetensors"
    damaged.unlink()
    damaged.write_bytes(b"garbage")
    middle = next(path for path in sorted(copy.glob("checkpoints/step-*")) if path.name.endswith("10"))
    notes: list[str] = []
    found = posthoc.find_snapshots(find_checkpoint(middle), notes.append)
    assert [snapshot.update for snapshot in found[::2]] == [2, 6, 8, 10]
    assert len(notes) == 1 and str(damaged) in notes[0]


def test_a_snapshot_that_cannot_be_written_costs_itself_only(tmp_path):
    trainer = make_trainer(tmp_path, *POWER, "trainer.ema_snapshot_every_images=160")
    said = []

    def full(*arguments):
        raise StorageError("disk full")

    trainer.snapshots.save = full
    trainer.averages.update(trainer.model)
    trainer._save_snapshot(said.append)
    assert said == ["going on without this snapshot of averages: disk full"]


def test_an_average_begins_with_its_run(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, *SHORT, stop=StopAfter(2)).run()
    with pytest.raises(RunDirectoryError, match=r"and not ema_power_0\.05, ema_power_0\.1: an average begins"):
        make_trainer(tmp_path, *POWER).run()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.ema_power=[0.3]",
            "trainer.ema_power=[0.3]: needs different numbers, each above 0 and at most 0.28",
        ),
        ("trainer.ema_power=[0.1,0.1]", "needs different numbers"),
        ("trainer.ema_snapshot_every_images=1k", "trainer.ema_snapshot_every_images=1000: keeps the averages of"),
        ("trainer.ema_snapshot_every_images=0", "must be at least 1, or null"),
    ],
)
def test_what_cannot_be_tracked_is_refused(in_tmp, capsys, override, message):
    assert main(["train", *SMALL_RUN, override]) == 2
    assert message in capsys.readouterr().err and not any(in_tmp.iterdir())
