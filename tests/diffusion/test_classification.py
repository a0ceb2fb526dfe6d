"""The classifier's objective against its formula, and training by the trainer: refusals, and exact resume."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from diffussm.build import System, build_source, build_trainer
from diffussm.cli import main
from diffussm.compose import compose
from diffussm.diffusion.classification import ClassifierObjective
from diffussm.diffusion.schedule import linear_schedule, respace
from diffussm.models import NoisyClassifier
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError, Preempted
from diffussm.runtime.run_dir import RunDirectory

CLASSIFIER = ("experiment=digits_classifier",)
SMALL = (
    *CLASSIFIER,
    "model.hidden_size=16",
    "model.depth=1",
    "model.d_state=4",
    "trainer.batch_size=16",
    "trainer.total_images=96",
    "trainer.save_every_images=32",
    "trainer.log_every_images=32",
    "trainer.warmup_images=0",
    "trainer.decay_images=0",
)


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(size, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x_0, torch.randint(4, (size,), generator=generator)


def test_the_loss_is_the_cross_entropy_of_noisy_latents_at_the_networks_timesteps():
    schedule = respace(linear_schedule(), torch.arange(0, 1000, 10))
    weight = torch.randn(18, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t.flatten(1) @ weight

    objective = ClassifierObjective(schedule)
    x_0, y = batch()
    draws = objective.draw(x_0.shape, torch.Generator().manual_seed(1))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5), dtype=x_0.dtype)
    terms = objective(model, x_0, y, draws, noise)
    assert set(terms) == {"loss", "accuracy"} and torch.equal(seen[0], 10 * draws.t)
    for i, step in enumerate(draws.t.tolist()):
        alpha = float(schedule.alphas_cumprod[step])
        x_t = math.sqrt(alpha) * x_0[i] + math.sqrt(1 - alpha) * noise[i]
        logits = (x_t.flatten() @ weight).tolist()
        expected = math.log(sum(math.exp(logit) for logit in logits)) - logits[int(y[i])]
        assert float(terms["loss"][i]) == pytest.approx(expected, rel=1e-6)
        assert float(terms["accuracy"][i]) == float(max(logits) == logits[int(y[i])])
    assert 0 < terms["accuracy"].mean() < 1


def test_an_untrained_classifier_has_the_loss_log_k():
    model = NoisyClassifier(2, 4, hidden_size=12, depth=1, hourglass_ratio=3, d_state=4)
    x_0, y = batch()
    objective = ClassifierObjective(linear_schedule())
    draws = objective.draw(x_0.shape, torch.Generator().manual_seed(1))
    assert torch.allclose(
        objective(model, x_0.float(), y, draws, torch.randn(x_0.shape))["loss"], torch.tensor(math.log(4))
    )


def test_draws_are_uniform_repeatable_and_drop_nothing():
    objective = ClassifierObjective(linear_schedule())
    draws = objective.draw((4000, 1, 2, 2), torch.Generator().manual_seed(3))
    again = objective.draw((4000, 1, 2, 2), torch.Generator().manual_seed(3))
    assert objective.num_timesteps == 1000
    quarters = torch.bincount(draws.t // 250, minlength=4)
    assert len(quarters) == 4 and quarters.min() > 900
    assert torch.equal(draws[7:9].t, again.t[7:9])
    assert (draws.drop_uniform == 1).all() and (draws.weight == 1).all()


def test_data_without_labels_is_refused():
    objective = ClassifierObjective(linear_schedule())
    x_0, _ = batch()
    draws = objective.draw(x_0.shape, torch.Generator())
    with pytest.raises(ValueError, match="needs labelled data"):
        objective(lambda x_t, t: x_t.flatten(1), x_0, None, draws, torch.zeros_like(x_0))


def test_a_run_resumes_bit_for_bit_and_draws_no_pictures(in_tmp, capsys):
    assert main(["train", *SMALL, "name=whole"]) == 0
    assert "finished at 96 images\n" in capsys.readouterr().out
    looks = []

    def stop() -> bool:
        looks.append(None)
        return len(looks) == 2

    config = compose("train", [*SMALL, "name=whole", "run_dir=runs/parts"])
    directory = RunDirectory(in_tmp / "runs" / "parts")
    directory.path.mkdir()
    source = build_source(config.data, config.model)
    system = System(config, source.image_shape, torch.device("cpu"))
    with pytest.raises(Preempted):
        build_trainer(system, source, directory, Processes(), stop, print).run()
    assert main(["train", *SMALL, "name=whole", "run_dir=runs/parts"]) == 0
    for name in ("model", "ema_0.998", "optimizer"):
        whole, parts = (
            load_file(in_tmp / "runs" / run / "checkpoints" / "step-000000000006" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    records = [json.loads(line) for line in (in_tmp / "runs/parts/metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "event" not in record]
    assert [record["images"] for record in records] == [32, 64, 96]
    assert all(0 <= record["accuracy"] <= 1 and record["loss"] > 0 for record in records)
    assert not (in_tmp / "runs" / "whole" / "samples").exists()


def test_a_classifier_draws_nothing(in_tmp, capsys):
    assert main(["train", *SMALL, "name=drawn"]) == 0
    capsys.readouterr()
    for overrides in ([], ["sampler=ddim"]):
        assert main(["sample", "checkpoint=runs/drawn", *overrides]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "a classifier draws nothing: " in said
    assert not (in_tmp / "runs" / "drawn" / "samples").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            [*CLASSIFIER, "objective=ddpm"],
            "DDPMObjective does not train NoisyClassifier: set objective=classifier",
        ),
        ([*CLASSIFIER, "sampler=ddim"], "a classifier draws nothing: "),
        ([*CLASSIFIER, "model.num_classes=null"], "model.num_classes=None: must be an integer"),
        ([*CLASSIFIER, "model.num_classes=5"], "model.num_classes=5: the data has 10 classes"),
        ([*CLASSIFIER, "model.hourglass_ratio=32"], "model.hourglass_ratio=32: does not divide the 16 tokens"),
        (["experiment=digits", "objective=classifier"], "ClassifierObjective does not train DiffuSSM: choose"),
        (
            [*CLASSIFIER, "evaluation=digits", "evaluation.every_images=32"],
            "evaluation.every_images=32: needs samples: choose a sampler",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_together_is_one_line_and_creates_nothing(in_tmp, capsys, overrides, says):
    assert main(["train", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said
    assert list(in_tmp.iterdir()) == []


def test_without_a_sampler_its_options_mean_nothing():
    assert not compose("train", ["experiment=digits", "sampler=none"]).sampler


def test_a_denoiser_without_a_sampler_has_none_to_try(in_tmp):
    config = compose("train", ["experiment=digits_dit"])
    system = System(config, (1, 8, 8), torch.device("cpu"))
    config.sampler = compose("train", CLASSIFIER).sampler
    with pytest.raises(ConfigError, match="sampler=none: draws nothing: choose a sampler"):
        system.generator(system.model, config)
