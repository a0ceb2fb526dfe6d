"""`diffussm complexity`: what models cost on paper, as a table."""

import argparse
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from diffussm.build import construct
from diffussm.commands import print_config, print_table
from diffussm.compose import compose, compose_group, group_options, override_value
from diffussm.models.complexity import measure_complexity
from diffussm.runtime.errors import ConfigError

PIXELS_PER_LATENT = 8  # along each side, of the usual autoencoders
COLUMNS = ("model", "parameters", "px", "tokens", "GMAC", "SSM GFLOP", "activations MiB")


def run(options: argparse.Namespace) -> int:
    """Print a row for each model and resolution, the families in turn, small models first."""
    config = compose("complexity", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    if override_value(options.overrides, "model.input_size") is not None:
        raise ConfigError("model.input_size: follows from resolutions=[...], an eighth of each: leave it out")
    if config.model is not None:
        models = {override_value(options.overrides, "model"): config.model}
    else:
        names = [name for name in group_options("model") if not name.endswith("_tiny")]
        models = {name: compose_group("model", name, {}) for name in names}
    rows = [list(_rows(name, model, config.resolutions)) for name, model in models.items()]
    rows.sort(key=lambda group: (group[0][0].partition("_")[0], int(group[0][1].replace(",", ""))))
    print_table(COLUMNS, [row for group in rows for row in group])
    return 0


def _rows(name: str, model: DictConfig, resolutions: list[int]) -> Iterator[tuple[str, ...]]:
    for pixels in resolutions:
        side = pixels // PIXELS_PER_LATENT
        if "input_size" in model:  # models with drawn positions know the size of their latents
            model.input_size = side
        patch_size = model.get("patch_size", 1)
        if patch_size > 0 and side % patch_size:
            raise ConfigError(f"resolutions=[{pixels}]: {side}x{side} latents: not divisible by {patch_size=}")
        with torch.device("meta"):
            network = construct(model, "model")
        try:
            cost = measure_complexity(network, (model.in_channels, side, side))
        except ValueError as error:
            raise ConfigError(f"resolutions=[{pixels}]: {error}") from error
        yield (
            name,
            f"{cost.parameters:,}",
            str(pixels),
            f"{(side // patch_size) ** 2:,}",
            f"{cost.macs / 1e9:,.2f}",
            f"{cost.ssm_flops / 1e9:,.2f}",
            f"{cost.activation_bytes / 2**20:,.0f}",
        )
