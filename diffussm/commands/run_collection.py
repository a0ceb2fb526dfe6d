"""Which runs `compare` and `report` are asked about, and what their directories tell."""

import argparse
import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffussm.build import complexity_of, construct, refuse_foreign_code
from diffussm.commands import note
from diffussm.compose import compose
from diffussm.config import leaves
from diffussm.report.run_record import Costs, RunRecord, read_run
from diffussm.runtime.errors import ConfigError, RunDirectoryError, UserError
from diffussm.training.checkpoint import CheckpointStore

DEPTH = 3  # directories between one that is named and its runs
DRAWING = ("sampler", "guidance", "sampling", "autoencoder", "classes")  # keys that are meant for `sample`


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        runs: the run directories.
        config: of the command itself.
        drawing: overrides of how images are drawn, as `sample` takes them.
    """

    runs: list[Path]
    config: DictConfig
    drawing: list[str]
    config_dir: Path | None


def parse(options: argparse.Namespace) -> Asked:
    """Runs, the command's own overrides, and those of drawing, from the arguments in any order."""
    paths, own, drawing = [], [], []
    for argument in options.overrides:
        head = argument.partition("=")[0]
        if "=" not in argument or Path(argument).exists():
            paths.append(argument)
        elif head.partition(".")[0] in DRAWING:
            drawing.append(argument)
        else:
            own.append(argument)
    config = compose(options.verb, own, options.config_dir)
    config.runs = [*paths, *config.runs]
    if not config.runs and not options.print_config:
        raise ConfigError(f"runs: none named: write diffussm {options.verb} RUN_DIR ...")
    runs = [] if options.print_config else find_runs(map(Path, config.runs))
    return Asked(runs, config, drawing, options.config_dir)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories among these and below those that are none, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            problem = "a file" if path.exists() else "no such directory"
            raise RunDirectoryError(f"{path}: {problem}: give run directories, such as runs/NAME")
        below = list(_runs_below(path, DEPTH))
        if not below:
            raise RunDirectoryError(f"{path}: holds no run: give run directories, or one that holds some")
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    if any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _runs_below(child, depth - 1)


def common_directory(runs: Sequence[Path]) -> Path:
    """The nearest directory that holds all of several runs."""
    return Path(os.path.relpath(os.path.commonpath([run.resolve().parent for run in runs])))


def read_runs(asked: Asked) -> list[RunRecord]:
    """The runs by names of their own: of their directories, with those above where two are alike."""
    counts = Counter(path.resolve().name for path in asked.runs)
    above = common_directory(asked.runs).resolve()
    names = (
        path.resolve().name if counts[path.resolve().name] == 1 else str(path.resolve().relative_to(above))
        for path in asked.runs
    )
    return [_read(path, name, asked.config.trust_checkpoint) for path, name in zip(asked.runs, names, strict=True)]


def _read(path: Path, name: str, is_trusted: bool) -> RunRecord:
    config, source = _read_config(path / "config.yaml")
    image_shape = _image_shape(path)
    costs = None
    if config is not None:
        try:
            if not is_trusted:
                refuse_foreign_code(config, str(path / "config.yaml"))
            costs = _costs(config, image_shape)
        except (UserError, OmegaConfBaseException, ValueError) as error:
            note(f"{path}: what its model costs is not known: {error}")
    settings = {} if config is None else dict(leaves(config))
    return read_run(path, name, settings, costs=costs, image_shape=image_shape, source=source)


def _read_config(path: Path) -> tuple[DictConfig | None, str]:
    """config.yaml of a run and its text; one that is missing or damaged leaves the rest to be told."""
    try:
        source = path.read_text()
        config = OmegaConf.create(source)
        if not isinstance(config, DictConfig) or "model" not in config:
            raise ValueError("not a configuration of train")
        OmegaConf.resolve(config)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        note(f"{path}: cannot be read: its settings are left out: {str(error).splitlines()[0]}")
        return None, ""
    return config, source


def _image_shape(path: Path) -> tuple[int, ...] | None:
    """Of the images of a run, as its newest checkpoint tells, which need not be verified for that."""
    for checkpoint in reversed(CheckpointStore(path / "checkpoints").paths()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return tuple(
                map(int, json.loads((checkpoint / "train_state.json").read_text())["data"]["image_shape"])
            )
    return None


def _costs(config: DictConfig, image_shape: tuple[int, ...] | None) -> Costs:
    if image_shape is None:
        with torch.device("meta"):
            network = construct(config.model, "model")
        return Costs(sum(parameter.numel() for parameter in network.parameters()), None)
    latent_shape = construct(config.autoencoder, "autoencoder").latent_shape(image_shape)
    cost = complexity_of(config.model, tuple(latent_shape))
    return Costs(cost.parameters, cost.macs)
