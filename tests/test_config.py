"""The configuration: everything composes, every field says if it may change, drift is found key by key."""

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffussm import build, config
from diffussm.compose import CONFIG_DIR, compose, expand, group_options, groups
from diffussm.config.schema import SamplingConfig, TrainerConfig
from diffussm.config.validation import parse_images
from diffussm.runtime.errors import ConfigError

SCHEMAS = [TrainerConfig, SamplingConfig, *config.ROOTS.values()]


def resolved(*overrides: str) -> dict:
    return OmegaConf.to_container(compose("train", ["experiment=digits", *overrides]), resolve=True)


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in groups() if group != "experiment" for option in group_options(group)],
)
def test_every_option_composes_and_matches_its_constructor(group, option):
    extra = ["data.path=somewhere"] if group == "data" and option not in ("digits", "digits16", "fake") else []
    extra += ["autoencoder.pretrained=somewhere"] if (group, option) == ("autoencoder", "kl") else []
    extra += ["guidance.checkpoint=somewhere"] if group == "guidance" and option != "classifier_free" else []
    extra += (
        ["evaluation.reference=somewhere"] if group == "evaluation" and option not in ("digits", "none") else []
    )
    extra += ["evaluation.extractor.weights=somewhere"] if option == "dinov2_50k" else []
    if (group, option) == ("sampler", "none"):
        experiment = "digits_classifier"  # whose other keys set none of a sampler
    else:
        experiment = "digits"
        extra += ["sampler.clip_x_0=false"] if group in ("sampler", "autoencoder") else []
    chosen = compose("train", [f"experiment={experiment}", f"{group}={option}", *extra])[group]
    for node in chosen.values() if group == "logger" else [chosen]:  # loggers may be several, each by its name
        assert not node or build.check_signature(node, group) == node


@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_every_experiment_composes_and_its_header_names_its_command(experiment):
    chosen = compose("train", [f"experiment={experiment}"])
    assert chosen.name
    header = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0]
    for promise in ("command", "hardware", "time", "result", f"experiment={experiment}"):
        assert promise in header


@pytest.mark.parametrize("sweep", group_options("sweep"))
def test_every_sweep_is_a_choice_that_composes(sweep):
    verb = "evaluate" if sweep == "guidance" else "train"
    parts = {
        key: resolved()[key] for key in ("sampler", "guidance", "sampling", "evaluation", "data", "autoencoder")
    }
    base = ["checkpoint=somewhere"] if verb == "evaluate" else ["experiment=digits"]
    name, jobs = expand([*base, f"sweep={sweep}"])
    assert name == sweep and len(jobs) > 1
    for chosen, overrides in jobs:
        assert set(overrides) >= {f"{key}={value}" for key, value in chosen.items()}
        assert compose(verb, overrides, from_checkpoint=parts)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_says_whether_it_may_change_on_resume(schema):
    for item in dataclasses.fields(schema):
        assert item.metadata.get("resume") in ("fixed", "free"), f"{schema.__name__}.{item.name}"


def another(value):
    """A different value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other" if value is None else f"{value}x"


def set_key(tree, key: str, value) -> None:
    parts = re.findall(r"[^.\[\]]+", key)
    for part in parts[:-1]:
        tree = tree[int(part) if isinstance(tree, list) else part]
    tree[int(parts[-1]) if isinstance(tree, list) else parts[-1]] = value


@pytest.mark.fault("G16")
def test_drift_of_every_key_in_turn_is_found_and_judged():
    before = resolved()
    keys = [key for key, _ in config.leaves(before)]
    assert len(keys) > 50
    for key in keys:
        after = resolved()
        set_key(after, key, another(dict(config.leaves(before))[key]))
        fixed, free = config.drift(before, after)
        # experiment=digits lets the learning rate fall towards the end, so the end decides the result
        changed = free if config.may_change(key) and key != "trainer.total_images" else fixed
        assert len(fixed + free) == 1 and changed[0].startswith(f"{key}: ")
    assert config.drift(before, resolved()) == ([], [])


def test_a_run_without_decay_may_be_made_longer():
    before = resolved("trainer.decay_images=0")
    after = resolved("trainer.decay_images=0", "trainer.total_images=200k")
    assert config.drift(before, after) == ([], ["trainer.total_images: 96000 -> 200000"])


def test_what_decides_the_result_is_fixed_and_what_does_not_is_free():
    fixed = [
        "seed",
        "model.hidden_size",
        "optimizer.lr",
        "trainer.batch_size",
        "trainer.ema_decays[0]",
        "diffusion.beta_end",
    ]
    free = [
        "run_dir",
        "device",
        "trainer.total_images",
        "trainer.num_workers",
        "sampler.num_steps",
        "data.path",
        "data.path[1]",
        "data.max_bad_fraction",
        "trainer.device_batch_size",
    ]
    assert not any(config.may_change(key) for key in fixed)
    assert all(config.may_change(key) for key in free)


@pytest.mark.parametrize(
    ("text", "images"),
    [(5, 5), ("50k", 50_000), ("1.5M", 1_500_000), ("64Ki", 65_536), ("1Mi", 1_048_576), ("2m", 2_000_000)],
)
def test_image_counts_take_suffixes(text, images):
    assert parse_images(text, "key") == images
    assert (
        compose(
            "train", ["experiment=digits", f"trainer.total_images={text}", "trainer.batch_size=1"]
        ).trainer.total_images
        == images
    )


@pytest.mark.parametrize("text", ["1.5", "k", "-5", "1e5", "5 k", "1.00001k", "5G", ""])
def test_image_counts_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"key=.*whole number of images"):
        parse_images(text, "key")


def test_a_default_of_the_trainer_is_dits_recipe():
    defaults = compose("train", ["name=x", "data.path=y"])
    assert defaults.optimizer.lr == 1e-4 and defaults.optimizer.weight_decay == 0
    assert defaults.trainer.batch_size == 256 and list(defaults.trainer.ema_decays) == [0.9999]
    assert defaults.model.hidden_size == 1152 and defaults.sampler.num_steps == 250


def test_users_may_bring_their_own_directory(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - digits\n\nname: mine\ntrainer:\n  batch_size: 8\n"
    )
    chosen = compose("train", ["experiment=mine"], config_dir=tmp_path)
    assert chosen.name == "mine" and chosen.trainer.batch_size == 8
    with pytest.raises(ConfigError, match="no such directory"):
        compose("train", [], config_dir=tmp_path / "nowhere")


def test_groups_from_a_checkpoint_are_the_defaults_and_can_be_overridden():
    trained = resolved("sampler.num_steps=7", "guidance.scale=3")
    parts = {key: trained[key] for key in ("sampler", "guidance", "sampling", "evaluation", "autoencoder")}
    chosen = compose("sample", ["checkpoint=x", "sampling.seed=9"], from_checkpoint=parts)
    assert (chosen.sampler.num_steps, chosen.guidance.scale, chosen.sampling.seed) == (7, 3.0, 9)
    chosen = compose("sample", ["checkpoint=x", "sampler=ddpm"], from_checkpoint=parts)
    assert chosen.sampler.num_steps == 250
