"""`diffussm train`: start a run, or continue it."""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.config import drift
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import (
    ConfigError,
    DataError,
    PeerError,
    Preempted,
    RunDirectoryError,
    StorageError,
    UserError,
    exit_code_of,
)
from diffussm.runtime.launch import find_place, launch, num_to_launch
from diffussm.runtime.run_dir import RunDirectory, write_atomically
from diffussm.runtime.signals import StopRequest

if TYPE_CHECKING:
    from diffussm.build import System
    from diffussm.data.images import Source
    from diffussm.runtime.distributed import Processes
    from diffussm.training.trainer import Trainer

START_LIMIT_SECONDS = 1800.0  # after which a run that has not got to its first step is taken for stalled


def run(options: argparse.Namespace) -> int:
    """Check everything, then open the run directory, then train: here, or in processes that it starts."""
    config = compose("train", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    directory = RunDirectory(Path(config.run_dir))
    if config.trainer.dry_run:
        return _dry_run(directory, config)
    if processes := _num_to_launch(config):
        if _check(directory, config):
            return 0
        command = [sys.executable, "-m", "diffussm", "train", *options.overrides]
        if options.config_dir:
            command += ["--config-dir", str(options.config_dir)]
        return launch(command, processes, config.trainer.max_restarts)
    if find_place().world_size == 1 and _check(directory, config):  # before torch is loaded
        return 0
    with StopRequest() as stop:  # from now on, though it will be a while before there is a step to stop after
        try:
            return _train(config, directory, stop, _command(options))
        finally:
            directory.close()


def _command(options: argparse.Namespace) -> str:
    """What continues the run."""
    config_dir = ["--config-dir", str(options.config_dir)] if options.config_dir else []
    return shlex.join(["diffussm", "train", *options.overrides, *config_dir])


def _num_to_launch(config: DictConfig) -> int:
    """How many processes are to be started; 0 if this one is to train."""
    return num_to_launch(config.trainer.num_processes, "trainer.num_processes")


def _dry_run(directory: RunDirectory, config: DictConfig) -> int:
    """Say what would become of all this; under a launcher, once."""
    world_size = _num_to_launch(config) or find_place().world_size
    if find_place().rank:
        return 0
    config.trainer.dry_run = False  # as in the run that this is about
    if _check(directory, config):
        return 0
    from diffussm.commands.dry_run import dry_run

    return dry_run(config, directory, world_size)


def _check(directory: RunDirectory, config: DictConfig) -> bool:
    """Refuse a run directory in which this run cannot be; returns whether there is nothing left to do."""
    directory.check()
    find_changes(directory, config)
    if is_finished(directory, config):
        print(f"{directory.path}: finished at {(directory.read_status() or {})['images']:,} images; nothing to do")
        return True
    return False


def is_finished(directory: RunDirectory, config: DictConfig) -> bool:
    """Whether the run has got to where this configuration ends."""
    status = directory.read_status()
    return bool(status and status["state"] == "finished" and status["images"] >= config.trainer.total_images)


def _train(config: DictConfig, directory: RunDirectory, stop: StopRequest, command: str) -> int:
    from diffussm.build import System, build_source, build_trainer, choose_device, is_in_parts
    from diffussm.runtime.distributed import Processes

    keep_freed_memory()
    processes = Processes.from_environment(config.trainer.timeout_seconds)

    def build() -> tuple["Source", "System", "Trainer"]:
        source = build_source(config.data, config.model)
        system = System(config, source.image_shape, device, in_memory=is_in_parts(config, processes))
        trainer = build_trainer(system, source, directory, processes, lambda: stop, note)
        len(source)  # reads the data, or says why it cannot, before anything is created
        if config.init_from is not None and processes.is_first and not trainer.checkpoints.paths():
            from diffussm.commands.init_from import read_initial_weights

            trainer.initial = read_initial_weights(config, trainer.model, note)
        return source, system, trainer

    device = processes.own_device(choose_device(config.device))
    with processes.start(device):
        if processes.world_size > 1:
            _check_equal(config, processes)
            if processes.on_first(lambda: _check(directory, config)):
                return 0
        try:
            source, system, trainer = processes.on_all(build)
        except DataError as error:
            if processes.is_first and directory.read_status() is not None:  # a run that cannot go on
                directory.open()
                directory.write_status("failed", exit_code=error.exit_code, message=str(error))
            raise
        try:
            processes.on_first(lambda: _open(directory, source, system, trainer, command))
            trainer.run(accepted=lambda: _write_config(directory, config))
        except BaseException as error:
            _write_failure(directory, trainer, error)
            raise
        finally:
            trainer.log.close()
        if processes.is_first:
            directory.write_status("finished", images=trainer.images, step=trainer.step, exit_code=0)
            pictures = f"; pictures in {directory.samples}" if config.sampler else ""
            print(f"{directory.path}: finished at {trainer.images:,} images{pictures}")
    return 0


def _check_equal(config: DictConfig, processes: "Processes") -> None:
    """Refuse processes that were started with different configurations."""
    content = OmegaConf.to_yaml(config, resolve=True)
    found = processes.gather_objects(content)

    def compare() -> None:
        for rank, theirs in enumerate(found):
            if theirs != content:
                fixed, free = drift(_container(content), _container(theirs))
                raise ConfigError(
                    f"process {rank} was started with another configuration ({'; '.join(fixed + free)}): start "
                    "all of them with the same command"
                )

    processes.on_first(compare)


def _container(content: str) -> dict:
    return OmegaConf.to_container(OmegaConf.create(content))  # type: ignore[return-value]


def _open(directory: RunDirectory, source: "Source", system: "System", trainer: "Trainer", command: str) -> None:
    from diffussm.commands.summary import summarize

    config = system.config
    directory.open()
    trainer.changes = find_changes(directory, config)
    for line in trainer.changes:
        note(f"configuration changed: {line}")
    before = directory.read_status() or {}
    restarts = 0 if before.get("state", "imported") == "imported" else before.get("restarts", 0) + 1
    facts = {"total_images": config.trainer.total_images, "command": command}
    directory.write_status("running", restarts=restarts, limit_seconds=START_LIMIT_SECONDS, **facts)
    print(summarize(system, source, trainer), file=sys.stderr, flush=True)


def _write_config(directory: RunDirectory, config: DictConfig) -> None:
    content = OmegaConf.to_yaml(config, resolve=True)
    write_atomically(directory.path / "config.yaml", content.encode())


def _write_failure(directory: RunDirectory, trainer: "Trainer", error: BaseException) -> None:
    """Tell in status.json how the run ended. What another process met first is not covered up."""
    if isinstance(error, UserError) and error.is_reported:
        return
    if isinstance(error, RunDirectoryError) and not directory.is_open and trainer.processes.is_first:
        return  # it is another run's
    if isinstance(error, PeerError | KeyboardInterrupt) and not trainer.processes.is_first:
        return
    if isinstance(error, PeerError) and (directory.read_status() or {}).get("state") == "failed":
        return
    with contextlib.suppress(StorageError):  # a disk that is full may be what ended it, and that is to be told
        directory.write_status(
            "preempted" if isinstance(error, Preempted) else "failed",
            images=trainer.images,
            step=trainer.step,
            exit_code=exit_code_of(error),
            message=str(error) or repr(error),
        )


def find_changes(directory: RunDirectory, config: DictConfig) -> list[str]:
    """What has changed in the configuration of a run; ConfigError for what would change its result."""
    path = directory.path / "config.yaml"
    if not path.exists():
        return []
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
    return fixed + free
