"""The trainer's guarantees on a tiny real run: exact resume, accumulation, skipping, precision, logs."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN

from diffussm.build import System, build_source, build_trainer
from diffussm.compose import compose
from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.runtime.distributed import Interrupted, Processes
from diffussm.runtime.errors import DataError, DivergedError, Preempted, RunDirectoryError, StorageError
from diffussm.runtime.run_dir import RunDirectory
from diffussm.runtime.seeding import draw_normal
from diffussm.training.protocols import Periodic
from diffussm.training.trainer import Trainer


def make_trainer(path: Path, *overrides: str, stop=lambda: False, notes: list[str] | None = None) -> Trainer:
    config = compose("train", [*SMALL_RUN, *overrides, f"run_dir={path}"])
    run = RunDirectory(Path(config.run_dir))
    run.path.mkdir(parents=True, exist_ok=True)
    source = build_source(config.data, config.model)
    system = System(config, source.image_shape, torch.device("cpu"))
    trainer = build_trainer(system, source, run, Processes(), stop, (notes if notes is not None else []).append)
    trainer.periodic = [p for p in trainer.periodic if p.name != "samples"]
    return trainer


def fingerprint(path: Path) -> str:
    """SHA-256 over model, every EMA, optimiser tensors and step of the newest checkpoint."""
    newest = sorted((path / "checkpoints").iterdir())[-1]
    digest = hashlib.sha256()
    for file in sorted(newest.glob("*.safetensors")):
        digest.update(file.read_bytes())
    digest.update(str(json.loads((newest / "train_state.json").read_text())["step"]).encode())
    return digest.hexdigest()


# What depends on the machine, and on what else it does.
SPEED = {"images_per_second", "data_wait", "tflops_per_second", "mfu", "memory_gib"}


def records(path: Path) -> list[dict]:
    """What was measured, without what happened meanwhile."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in SPEED} for record in found if "event" not in record]


def events(path: Path) -> list[dict]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "event" in record]


class StopAfter:
    """Asks for a stop once it has been looked at so many times, as a signal between two steps would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self) -> bool:
        self.steps -= 1
        return self.steps <= 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "whole"
    make_trainer(path).run()
    return path


def test_golden_losses(uninterrupted):
    """A refactoring shows the same numbers; a change of what is trained changes them here on purpose."""
    losses = [record["loss"] for record in records(uninterrupted)]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_stop_and_resume_is_bit_exact(tmp_path, uninterrupted, steps):
    with pytest.raises(Preempted, match="stopped by signal"):
        make_trainer(tmp_path, stop=StopAfter(steps)).run()
    resumed = make_trainer(tmp_path)
    resumed.run()
    assert resumed.images == 128
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
    assert records(tmp_path) == records(uninterrupted)


# Ten losses of every one of few timesteps are soon seen, after which they decide what is drawn.
BY_MOMENTS = (
    "objective.timesteps=loss_second_moment",
    "diffusion=cosine",
    "diffusion.num_timesteps=4",
    "trainer.total_images=320",
)


@pytest.mark.parametrize("overrides", [BY_MOMENTS, ("experiment=digits_flow",)], ids=["by moments", "flow"])
def test_other_objectives_resume_bit_exactly(tmp_path, overrides):
    whole = make_trainer(tmp_path / "a", *overrides)
    whole.run()
    with pytest.raises(Preempted):
        make_trainer(tmp_path / "b", *overrides, stop=StopAfter(whole.step - 3)).run()
    resumed = make_trainer(tmp_path / "b", *overrides)
    resumed.run()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")
    if overrides is BY_MOMENTS:
        probabilities = resumed.objective.timesteps.probabilities
        assert probabilities.max() > 1.5 * probabilities.min()  # the history mattered
        assert torch.equal(probabilities, whole.objective.timesteps.probabilities)


def test_a_stop_while_no_batch_comes_loses_no_step(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path)

    def stalling(step, original=trainer.batches.starting_at):
        yield from itertools.islice(original(step), 3)
        raise Interrupted  # as the loader's poll does

    trainer.batches.starting_at = stalling
    with pytest.raises(Preempted, match="stopped by signal at 48 images"):
        trainer.run()
    make_trainer(tmp_path).run()
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


def test_a_resumed_run_records_it_and_keeps_what_happened_after_its_checkpoint(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, stop=StopAfter(4)).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 96, "event": "failed save"}\n{"images": 96, "loss": 1.0}\n')
    make_trainer(tmp_path).run()
    assert [(event["event"], event["images"]) for event in events(tmp_path)] == [
        ("failed save", 96),
        ("resume", 64),
    ]
    assert [record["images"] for record in records(tmp_path)] == [32, 64, 96, 128]


def test_where_the_run_is_is_reported_with_every_record_and_what_takes_long(tmp_path):
    trainer = make_trainer(tmp_path)
    reports = []
    trainer.report = reports.append
    trainer.run()
    assert [(facts["doing"], facts["images"]) for facts in reports] == [
        ("starting", 0),
        *((doing, images) for images in (32, 64, 96, 128) for doing in ("training", "saving")),
    ]
    assert reports[1]["images_per_second"] > 0 and reports[1]["eta_seconds"] > 0
    reports.clear()
    trainer._reported = -1e9  # long ago
    trainer._perform(Periodic("probe", 48, lambda model, images, undertaking: undertaking.check() or {}))
    assert [(facts["doing"], facts["images"]) for facts in reports] == [("probe", 128)]


def test_a_status_that_cannot_be_written_does_not_end_training(tmp_path):
    notes: list[str] = []
    trainer = make_trainer(tmp_path, notes=notes)
    (tmp_path / f".status.json.{socket.gethostname()}.{os.getpid()}.tmp").mkdir()
    trainer.run()
    assert trainer.images == 128 and any("status.json" in note for note in notes)


def test_a_crash_between_checkpoints_is_bit_exact_and_logs_nothing_twice(tmp_path, uninterrupted):
    crashing = make_trainer(tmp_path)
    crashing.stop = StopAfter(5)

    def crash(say):
        raise KeyboardInterrupt

    crashing.save = lambda say=None, save=crashing.save: crash(say) if crashing.images == 80 else save(say)
    with pytest.raises(KeyboardInterrupt):
        crashing.run()
    make_trainer(tmp_path).run()
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
    assert records(tmp_path) == records(uninterrupted)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, uninterrupted):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, stop=StopAfter(5)).run()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"garbage")
    notes: list[str] = []
    make_trainer(tmp_path, notes=notes).run()
    assert any("optimizer.safetensors" in note for note in notes)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


@pytest.mark.fault("G10")
@pytest.mark.parametrize("device_batch_size", [4, 5])
def test_accumulation_trains_on_the_same_samples_times_noise_and_drops(tmp_path, uninterrupted, device_batch_size):
    make_trainer(tmp_path, f"trainer.device_batch_size={device_batch_size}").run()
    for ours, whole in zip(records(tmp_path), records(uninterrupted), strict=True):
        for key, value in whole.items():
            assert ours[key] == pytest.approx(value, rel=1e-3), key


def test_the_loss_falls(tmp_path):
    make_trainer(tmp_path, "trainer.total_images=1600", "trainer.log_every_images=160").run()
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_log_records_are_complete(uninterrupted):
    for record in records(uninterrupted):
        assert set(record) == {
            "images", "step", "loss", "mse", "vb", "loss_q0", "loss_q1", "loss_q2", "loss_q3", "grad_norm",
            "learning_rate", "skipped_steps",
        }  # fmt: skip
        assert record["loss"] == pytest.approx(record["mse"] + record["vb"], rel=1e-5)
    assert [record["images"] for record in records(uninterrupted)] == [32, 64, 96, 128]


def test_log_records_say_how_fast_it_went(uninterrupted):
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["images_per_second"] > 0 and 0 <= record["data_wait"] <= 1 and record["memory_gib"] > 0
        assert record["mfu"] is None and record["tflops_per_second"] is None  # of a CPU
        assert set(record) >= SPEED


def test_averages_are_saved_and_differ_from_the_weights(uninterrupted):
    newest = sorted((uninterrupted / "checkpoints").iterdir())[-1]
    assert (newest / "model.safetensors").read_bytes() != (newest / "ema_0.998.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(tmp_path, uninterrupted, precision):
    trainer = make_trainer(tmp_path, f"trainer.precision={precision}")
    if precision == "fp16":  # the default scale overflows at first, by design, and skips a step or two
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    trainer.run()
    assert trainer.skipped_steps == 0
    for ours, exact in zip(records(tmp_path), records(uninterrupted), strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=0.02)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert all(text.startswith("float32") for text in manifest["model"].values())


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path / "a", "trainer.precision=fp16", stop=StopAfter(3)).run()
    make_trainer(tmp_path / "a", "trainer.precision=fp16").run()
    make_trainer(tmp_path / "b", "trainer.precision=fp16").run()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


@pytest.mark.fault("G12")
def test_loader_workers_killed_in_a_save_and_elsewhere_change_nothing(tmp_path, uninterrupted):
    notes: list[str] = []
    trainer = make_trainer(tmp_path, "trainer.num_workers=2", notes=notes)
    publish, step = trainer.checkpoints.save, trainer.run_step

    def kill_workers() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def save(*arguments):
        kill_workers()
        publish(*arguments)

    def run_step(batch):
        if trainer.step == 4:
            kill_workers()
        step(batch)

    trainer.checkpoints.save, trainer.run_step = save, run_step
    trainer.run()
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
    assert records(tmp_path) == records(uninterrupted)
    assert len(notes) >= 2 and all("killed by SIGKILL" in note for note in notes)


class PerfectLatents:
    """A latent set whose x_0 are the digits that the identity would have made."""

    def __init__(self, digits, trouble=None):
        self.digits, self.trouble, self.checked = digits, trouble, None
        self.num_classes, self.class_names, self.fingerprint = 10, list("0123456789"), digits.fingerprint
        self.image_shape = self.latent_shape = (1, 8, 8)
        self.horizontal_flip, self.max_bad_fraction = False, 0.0
        self.has_posterior = True

    def __len__(self):
        return len(self.digits)

    def latents(self, indices, flips, noise):
        assert noise.shape == (len(indices), 1, 8, 8) and not flips.any()
        return self.digits.images[indices].float() / 127.5 - 1

    def labels(self, indices):
        return self.digits.labels[indices]

    def check_autoencoder(self, fingerprint):
        self.checked = fingerprint

    def check_spread(self):
        if self.trouble:
            raise self.trouble


def build_on(path: Path, wrap) -> tuple[Trainer, PerfectLatents]:
    config = compose("train", [*SMALL_RUN, f"run_dir={path}"])
    source = wrap(build_source(config.data, config.model))
    system = System(config, source.image_shape, torch.device("cpu"))
    trainer = build_trainer(system, source, RunDirectory(path), Processes(), lambda: False, lambda line: None)
    trainer.periodic = []
    return trainer, source


def test_latents_that_are_ready_pass_the_autoencoder_by(tmp_path, uninterrupted):
    trainer, source = build_on(tmp_path, PerfectLatents)
    assert source.checked == {"kind": "identity"}
    trainer.run()
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


def test_latents_are_checked_before_anything_is_created(tmp_path):
    with pytest.raises(DataError, match="spread"):
        build_on(tmp_path / "run", lambda digits: PerfectLatents(digits, DataError("spread")))
    assert not (tmp_path / "run").exists()


def test_a_stochastic_autoencoder_gets_the_noise_of_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(IdentityAutoencoder, "is_stochastic", True)
    trainer = make_trainer(tmp_path, "trainer.device_batch_size=6", "trainer.total_images=16")
    seen = []

    def to_latents(images, noise, original=trainer.to_latents):
        seen.append((len(images), noise))
        return original(images, None)

    trainer.to_latents = to_latents
    trainer.run()
    assert [count for count, _ in seen] == [5, 5, 6]
    expected = draw_normal(0, "posterior", 0, range(16), (1, 8, 8))
    assert torch.equal(torch.cat([noise for _, noise in seen]), expected)


def poison(trainer: Trainer, steps: set[int]) -> None:
    original = trainer.to_latents
    trainer.to_latents = lambda *batch: original(*batch) * (float("nan") if trainer.step in steps else 1.0)


@pytest.mark.fault("G9")
def test_a_non_finite_step_is_skipped_counted_and_leaves_no_trace(tmp_path):
    trainer = make_trainer(tmp_path)
    poison(trainer, {2})
    trainer.run()
    assert trainer.skipped_steps == 1 and trainer.averages.num_updates == 7
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert records(tmp_path)[-1]["skipped_steps"] == 1
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [("skipped step", 3)]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.fault("G9")
def test_endless_non_finite_steps_end_the_run_and_save_nothing_bad(tmp_path):
    trainer = make_trainer(tmp_path, "trainer.total_images=1600")
    poison(trainer, set(range(3, 1000)))
    with pytest.raises(DivergedError, match=r"lower optimizer\.lr"):
        trainer.run()
    assert trainer.step <= 3 + 20
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


@pytest.mark.fault("G9")
def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    with torch.no_grad():
        next(trainer.averages.first.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(DivergedError, match="no longer finite"):
        trainer.save()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_gradients_are_clipped_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, "trainer.max_grad_norm=0.001")
    norms = []
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.run()
    assert norms and max(norms) <= 0.001 * 1.001


def test_a_failing_save_is_survived_twice_and_ends_the_run_the_third_time(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    said = []

    def full(*args):
        raise StorageError("disk full")

    trainer.checkpoints.save = full
    trainer.save(said.append)
    trainer.save(said.append)
    with pytest.raises(StorageError, match="disk full"):
        trainer.save(said.append)
    assert len(said) == 6  # each failure is retried once, and both are reported
    assert [(event["event"], event["message"]) for event in events(tmp_path)] == 3 * [("failed save", "disk full")]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_other_data_than_the_checkpoints_is_refused(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, stop=StopAfter(2)).run()
    with pytest.raises(RunDirectoryError, match=r"trained on .*'split_seed': 0.* now gives .*'split_seed': 7"):
        make_trainer(tmp_path, "data.split_seed=7").run()


def test_another_model_than_the_checkpoints_is_refused(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, stop=StopAfter(2)).run()
    with pytest.raises(RunDirectoryError, match="a checkpoint of another model"):
        make_trainer(tmp_path, "model.hidden_size=32").run()


def test_another_batch_size_continues_at_the_same_image(tmp_path):
    with pytest.raises(Preempted):
        make_trainer(tmp_path, stop=StopAfter(4)).run()
    trainer = make_trainer(tmp_path, "trainer.batch_size=32")
    trainer.restore()
    assert (trainer.images, trainer.step) == (64, 2)


def test_periodic_actions_run_on_crossings_and_once_at_the_end_without_touching_the_run(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path)
    calls = []

    def action(model, images, undertaking):
        assert not model.training
        calls.append(images)
        return {"value": images}

    trainer.periodic = [Periodic("probe", 48, action)]
    trainer.run()
    assert calls == [48, 96, 128]
    assert [r["probe"] for r in records(tmp_path) if "probe" in r] == [{"value": images} for images in calls]
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


def test_evaluation_during_training_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, "evaluation.every_images=64", "evaluation.num_samples=20")
    trainer.run()
    found = [record["evaluation"] for record in records(tmp_path) if "evaluation" in record]
    assert len(found) == 2 and all("FID-digits" in metrics for metrics in found)


GOLDEN_LOSSES = [0.973653, 0.829130, 0.536434, 0.418142]
