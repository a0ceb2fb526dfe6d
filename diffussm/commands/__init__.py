"""The verbs of the command line, a module each: `run(options)` composes, builds, runs, returns an exit code."""

from omegaconf import DictConfig, OmegaConf

from diffussm.runtime.errors import note as note  # what the verbs say beside their results


def print_config(config: DictConfig) -> int:
    """What --print-config does."""
    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0
