"""The keys of configurations: which there are, which differ, which may, and which one was meant."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from diffussm.config.schema import TrainConfig, TrainerConfig

# Data and autoencoders may move (their fingerprints are checked instead), and what stops a run does not change its
# result; the others trade time for memory alone.
FREE_WITHIN_GROUPS = (
    *(f"data.{key}" for key in ("path", "max_bad_fraction", "check", "verify")),
    *(f"autoencoder.{key}" for key in ("pretrained", "subfolder", "revision", "batch_size")),
    "model.activation_checkpointing",
)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of a nested configuration with its dotted key."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from leaves(value, f"{prefix}[{index}]")
    else:
        yield prefix, config


def drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What changed between two resolved TrainConfigs, as `key: before -> after`: (fixed, free) changes."""
    old, new = dict(leaves(before)), dict(leaves(after))
    changes: tuple[list[str], list[str]] = ([], [])
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, MISSING) != new.get(key, MISSING):
            line = f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            # A learning rate that falls towards the end makes the end part of the result.
            is_free = may_change(key) and not (key == "trainer.total_images" and new["trainer.decay_images"])
            changes[is_free].append(line)
    return changes


def may_change(key: str) -> bool:
    """Whether a dotted key of TrainConfig is free on resume."""
    if key.partition("[")[0] in FREE_WITHIN_GROUPS:
        return True
    head, _, rest = key.partition(".")
    fields = {item.name: item for item in dataclasses.fields(TrainConfig)}
    if head == "trainer":
        fields, head = {item.name: item for item in dataclasses.fields(TrainerConfig)}, rest
    item = fields.get(head.partition("[")[0])
    return item is not None and item.metadata["resume"] == "free"


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)", or nothing if no known name is close, whatever its capitals."""
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    return f" (did you mean {folded[close[0]]}?)" if close else ""
