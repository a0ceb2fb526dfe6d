"""What types cannot say of a configuration: one pure `validate`."""

import dataclasses
import math
import re

from omegaconf import DictConfig, OmegaConf

from diffussm.config.keys import leaves, nearest
from diffussm.config.schema import (
    BENCH_SUITES,
    FORMATS,
    GATED,
    LABELS,
    MATCHES,
    METRICS,
    WEIGHTS,
    Images,
    TrainerConfig,
)
from diffussm.runtime.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "ki": 2**10, "m": 10**6, "mi": 2**20}


def validate(config: DictConfig) -> None:
    """Check every value that needs nothing but the configuration; normalises image counts in place.

    ConfigError names the first key that cannot work, its value and what it should be.
    """
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: must be a finite number")
    if "trainer" in config:
        _validate_trainer(config)
    counts = dict.fromkeys(("num_images", "batch_size", "examined", "num_samples", "range_size"), 1)
    for key, least in {"seed": 0, "num_workers": 0, **counts}.items():
        given = config.get(key)
        _require(config, key, given is None or given >= least, f"must be at least {least}")
    if "name" in config:
        is_name = re.fullmatch(r"\w[\w.\-]{0,99}", config.name)
        _require(config, "name", is_name, "use at most 100 letters, digits and . _ -")
    if "examined" in config:
        _require(config, "seconds", config.seconds >= 0, "must be at least 0")
    if "labels" in config:
        _require_choice(config, "labels", LABELS)
    if "format" in config:
        _require_choice(config, "format", FORMATS)
    if "layout" in config:
        _require_choice(config, "layout", ("pipeline", "official", "diffusers"))
    if "shard_size" in config:
        _require_choice(config, "dtype", ("fp16", "fp32"))
        for key, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
            _require(config, key, config[key] >= least, f"must be at least {least}")
    if "sampling" in config:
        _validate_sampling(config)
    if "init_from" in config:
        _require_weights(config, "init_weights")
        unused = config.init_from is None and config.init_weights != "ema"
        _require(config, "init_weights", not unused, "of what? set init_from too")
    if "suites" in config:
        _validate_bench(config)
    if "gpus" in config:
        _require(config, "gpus", config.gpus >= 1, "must be at least 1")
        _require(config, "mfu", config.mfu is None or 0 < config.mfu <= 1, "must be above 0 and at most 1")
        price = config.price_per_hour
        _require(
            config, "price_per_hour", price is None or price >= 0, "must be at least 0, or null for no prices"
        )
        _require_choice(config, "dtype", ("fp16", "fp32"))
    if "runs" in config:
        _validate_comparison(config)
    if "resolutions" in config:
        fit = len(config.resolutions) > 0 and all(side > 0 and side % 8 == 0 for side in config.resolutions)
        _require(config, "resolutions", fit, "needs at least one positive multiple of 8")
    if config.get("evaluation"):
        every = config.evaluation.get("every_images")
        if every is not None:
            config.evaluation.every_images = parse_images(every, "evaluation.every_images")
            _require(
                config, "evaluation.every_images", config.evaluation.every_images, "must be at least 1, or null"
            )
    if "metrics" in config:
        _validate_metrics(config)
    if "gate" in config:
        _validate_gate(config)
    if config.get("sampler") and "_target_" not in config.sampler:
        config.sampler = {}  # sampler=none: what an experiment sets for its own sampler means nothing
    if config.get("autoencoder") and config.get("sampler") and config.sampler.get("clip_x_0") is True:
        in_pixels = config.autoencoder._target_.endswith("IdentityAutoencoder")
        _require(config, "sampler.clip_x_0", in_pixels, "latents are not bounded: set it to false")


def _validate_sampling(config: DictConfig) -> None:
    sampling = config.sampling
    _require(config, "sampling.batch_size", sampling.batch_size >= 1, "must be at least 1")
    _require(config, "sampling.seed", sampling.seed >= 0, "must be at least 0")
    _require_choice(config, "sampling.precision", ("fp32", "bf16", "fp16"))
    _require_weights(config, "sampling.weights")


def _validate_metrics(config: DictConfig) -> None:
    for name in config.metrics or []:
        close = nearest(name, METRICS)
        _require(config, "metrics", name in METRICS, f"choose from {', '.join(METRICS)}{close}")
    _require(config, "metrics", config.metrics != [], "choose at least one, or null for those of the evaluation")
    count = config.likelihood_images
    _require(config, "likelihood_images", count is None or count >= 1, "must be at least 1, or null for all")


def _validate_gate(config: DictConfig) -> None:
    gate = config.gate
    for key in ("deviations", *(f"{name}_tolerance" for name in GATED)):
        _require(config, f"gate.{key}", gate[key] is None or gate[key] >= 0, "must be at least 0")
    is_relative = gate.relative_to is not None
    for name in GATED:
        unused = gate[f"{name}_tolerance"] is not None and not is_relative
        _require(config, f"gate.{name}_tolerance", not unused, "worse than what? set gate.relative_to too")
    judges = is_relative or any(gate[f"{name}_{side}"] is not None for name, side in GATED.items())
    for key in ("junit", "summary"):
        remedy = "nothing is judged: set a limit such as gate.fid_max, or gate.relative_to"
        _require(config, f"gate.{key}", gate[key] is None or judges, remedy)
    if gate.add_to is not None:
        _require(config, "gate.add_to", gate.add_to.endswith(".json"), "must end in .json")
        _require(
            config, "gate.add_to", not judges, "a result is judged or added to a baseline: set one of the two"
        )


def _validate_bench(config: DictConfig) -> None:
    for name in config.suites or []:
        close = nearest(name, BENCH_SUITES)
        _require(config, "suites", name in BENCH_SUITES, f"choose from {', '.join(BENCH_SUITES)}{close}")
    _require(config, "suites", config.suites != [], "choose at least one, or null for all")
    are_grids = len(config.lengths) > 0 and all(
        length > 0 and math.isqrt(length) ** 2 == length and length % 4 == 0 for length in config.lengths
    )
    _require(config, "lengths", are_grids, "needs squares of even numbers, such as 256, 1024, 4096")
    for key in ("repetitions", "depth"):
        _require(config, key, config[key] >= 1, "must be at least 1")
    fit = len(config.resolutions) > 0 and all(side > 0 and side % 16 == 0 for side in config.resolutions)
    _require(config, "resolutions", fit, "needs at least one positive multiple of 16")
    is_width = config.hidden_size > 0 and config.hidden_size % 64 == 0
    _require(config, "hidden_size", is_width, "must be a positive multiple of 64, the width of an attention head")
    _require(config, "d_state", config.d_state >= 2 and config.d_state % 2 == 0, "must be even and at least 2")
    for key in ("seconds", "call_limit_seconds", "memory_limit_gib"):
        _require(config, key, config[key] is None or config[key] > 0, "must be positive")
    if config.precision is not None:
        _require_choice(config, "precision", ("fp32", "bf16"))


def _validate_comparison(config: DictConfig) -> None:
    if config.match is not None:
        _require_choice(config, "match", MATCHES)
    _require(config, "tolerance", 0 <= config.tolerance < 1, "must lie in 0..1, 1 excluded")
    for key in ("drawn_images", "denoising_images"):
        _require(config, key, config.get(key, 0) >= 0, "must be at least 0, which draws none")


def _validate_trainer(config: DictConfig) -> None:
    trainer = config.trainer
    for item in dataclasses.fields(TrainerConfig):
        if item.name.endswith("_images") and trainer[item.name] is not None:
            trainer[item.name] = parse_images(trainer[item.name], f"trainer.{item.name}")
    for key in ("batch_size", "keep_checkpoints", "total_images", "save_every_images", "log_every_images"):
        _require(config, f"trainer.{key}", trainer[key] >= 1, "must be at least 1")
    _require(config, "trainer.num_workers", trainer.num_workers >= 0, "must be at least 0")
    _require(config, "trainer.max_restarts", trainer.max_restarts >= 0, "must be at least 0")
    _require(config, "trainer.timeout_seconds", trainer.timeout_seconds > 0, "must be positive")
    for key in ("sample_every_images", "device_batch_size", "num_processes"):
        _require(
            config, f"trainer.{key}", trainer[key] is None or trainer[key] >= 1, "must be at least 1, or null"
        )
    positive = trainer.max_grad_norm is None or trainer.max_grad_norm > 0
    _require(config, "trainer.max_grad_norm", positive, "must be positive, or null for no clipping")
    decays_fit = len(trainer.ema_decays) > 0 and all(0 <= decay < 1 for decay in trainer.ema_decays)
    _require(config, "trainer.ema_decays", decays_fit, "needs at least one number, each in [0, 1)")
    powers_fit = len(set(trainer.ema_power)) == len(trainer.ema_power) and all(
        0 < sigma_rel <= 0.28 for sigma_rel in trainer.ema_power
    )
    _require(config, "trainer.ema_power", powers_fit, "needs different numbers, each above 0 and at most 0.28")
    every = trainer.ema_snapshot_every_images
    _require(
        config, "trainer.ema_snapshot_every_images", every is None or every >= 1, "must be at least 1, or null"
    )
    remedy = "keeps the averages of trainer.ema_power: set that too, such as [0.05,0.1]"
    _require(config, "trainer.ema_snapshot_every_images", every is None or len(trainer.ema_power), remedy)
    _require_choice(config, "trainer.precision", ("bf16", "fp16", "fp32"))
    _require_choice(config, "trainer.parallel", ("ddp", "fsdp"))
    one_step = trainer.batch_size <= trainer.total_images
    _require(config, "trainer.batch_size", one_step, f"exceeds trainer.total_images={trainer.total_images}")


def parse_images(value: Images, key: str) -> int:
    """A count of images: an integer, or a number with suffix k, M (powers of ten), Ki, Mi (of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|ki|m|mi)?", str(value), flags=re.IGNORECASE)
    count = float(match[1]) * _SUFFIXES[(match[2] or "").lower()] if match else math.nan
    if not count.is_integer():
        raise ConfigError(f"{key}={value}: must be a whole number of images, such as 50000, 50k or 1.5M")
    return int(count)


def _require_weights(config: DictConfig, key: str) -> None:
    name = OmegaConf.select(config, key)
    is_weights = name in ("ema", "model") or name.startswith(("ema_", "posthoc_"))
    _require(config, key, is_weights, f"choose {WEIGHTS}")


def _require(config: DictConfig, key: str, holds: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={OmegaConf.select(config, key)}: {remedy}")


def _require_choice(config: DictConfig, key: str, choices: tuple[str, ...]) -> None:
    value = OmegaConf.select(config, key)
    if value not in choices:
        close = nearest(str(value), choices)
        raise ConfigError(f"{key}={value}: choose {', '.join(choices)}{close}")
