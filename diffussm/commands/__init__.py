"""The verbs of the command line, a module each: `run(options)` composes, builds, runs, returns an exit code."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from diffussm.runtime.errors import note as note  # what the verbs say beside their results


def print_config(config: DictConfig) -> int:
    """What --print-config does."""
    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, its columns aligned for the terminal: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *rest in (columns, rule, *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
        print("| " + " | ".join(cells) + " |")
