"""The verbs of the command line, a module each: `run(options)` composes, builds, runs, returns an exit code."""

import sys

from omegaconf import DictConfig, OmegaConf


def print_config(config: DictConfig) -> int:
    """What --print-config does."""
    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0


def note(line: str) -> None:
    """A remark for a person, on stderr."""
    print(f"diffussm: {line}", file=sys.stderr, flush=True)
