"""`diffussm train`: start a run, or continue it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.config import drift
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, Preempted, RunDirectoryError, UserError
from diffussm.runtime.run_dir import RunDirectory, write_atomically

if TYPE_CHECKING:
    from diffussm.data.images import Source
    from diffussm.training.trainer import Trainer


def run(options: argparse.Namespace) -> int:
    """Check everything, then open the run directory, then train."""
    keep_freed_memory()
    config = compose("train", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    directory = RunDirectory(Path(config.run_dir))
    directory.check()
    _check_drift(directory, config)
    status = directory.read_status()
    if status and status["state"] == "finished" and status["images"] >= config.trainer.total_images:
        print(f"{directory.path}: finished at {status['images']:,} images; nothing to do")
        return 0

    # Here rather than above, so that a mistyped key ends before torch is loaded.
    from diffussm.build import System, build_source, build_trainer, choose_device
    from diffussm.runtime.signals import StopRequest

    with StopRequest() as stop:
        source = build_source(config.data, config.model)
        system = System(config, source.image_shape, choose_device(config.device))
        trainer = build_trainer(system, source, directory, lambda: stop, note)
        len(source)  # reads the data, or says why it cannot, before anything is created
        directory.open()
        try:
            content = OmegaConf.to_yaml(config, resolve=True)
            write_atomically(directory.path / "config.yaml", content.encode())
            directory.write_status("running")
            _summarize(config, source, trainer, directory)
            trainer.run()
        except BaseException as error:
            directory.write_status(
                "preempted" if isinstance(error, Preempted) else "failed",
                images=trainer.images,
                step=trainer.step,
                exit_code=error.exit_code if isinstance(error, UserError) else 1,
                message=str(error) or repr(error),
            )
            raise
        directory.write_status("finished", images=trainer.images, step=trainer.step, exit_code=0)
    pictures = f"; pictures in {directory.samples}" if config.sampler else ""
    print(f"{directory.path}: finished at {trainer.images:,} images{pictures}")
    return 0


def _check_drift(directory: RunDirectory, config: DictConfig) -> None:
    """Refuse to continue a run under a configuration that would change its result."""
    path = directory.path / "config.yaml"
    if not path.exists():
        return
    try:
        before = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError) as error:
        raise RunDirectoryError(f"{path}: damaged: restore it from config.json of a checkpoint") from error
    after = OmegaConf.to_container(config, resolve=True)
    fixed, free = drift(before, after)  # type: ignore[arg-type]
    if fixed and not config.allow_config_change:
        raise ConfigError(
            f"{directory.path} holds a run with another configuration ({'; '.join(fixed)}): choose another name, "
            "or allow_config_change=true to continue it all the same"
        )
    for line in fixed + free:
        note(f"configuration changed: {line}")


def _summarize(config: DictConfig, source: "Source", trainer: "Trainer", directory: RunDirectory) -> None:
    from diffussm.training.optim import describe_groups

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch, total, part = (
        trainer.batch_size,
        trainer.total_images,
        min(trainer.device_batch_size, trainer.batch_size),
    )
    found = trainer.checkpoints.paths()
    model = config.model._target_.rpartition(".")[2]
    lines = [
        f"run          {directory.path}" + (f" (continues from {found[-1].name})" if found else " (new)"),
        f"model        {model}, {parameters:,} parameters, {config.trainer.precision} on {trainer.device}",
        f"data         {len(source):,} images {source.image_shape}, {source.num_classes or 'no'} classes",
        f"batch        {batch} images = {-(-batch // part)} x {part}",
        f"length       {total:,} images = {-(-total // batch):,} steps",
        *(f"optimizer    {line}" for line in describe_groups(trainer.optimizer)),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
