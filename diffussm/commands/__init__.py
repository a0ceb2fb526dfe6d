"""The verbs of the command line, a module each: `run(options)` composes, builds, runs, returns an exit code."""

from collections.abc import Collection, Sequence

from omegaconf import DictConfig, OmegaConf

from diffussm.runtime.errors import note as note  # what the verbs say beside their results


def print_config(config: DictConfig) -> int:
    """What --print-config does."""
    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[str] = ()) -> None:
    """A Markdown table, its columns aligned for the terminal: the first and `texts` to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    are_texts = [index == 0 or name in texts for index, name in enumerate(columns)]
    rule = [
        "-" * width if is_text else "-" * (width - 1) + ":"
        for width, is_text in zip(widths, are_texts, strict=True)
    ]
    for row in (columns, rule, *rows):
        cells = [
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(row, widths, are_texts, strict=True)
        ]
        print("| " + " | ".join(cells) + " |")
