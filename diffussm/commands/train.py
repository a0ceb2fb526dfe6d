"""`diffussm train`: start a run, or continue it."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from diffussm.commands import note, print_config
from diffussm.compose import compose
from diffussm.config import drift
from diffussm.runtime.allocator import keep_freed_memory
from diffussm.runtime.errors import ConfigError, PeerError, Preempted, RunDirectoryError, StorageError, UserError
from diffussm.runtime.launch import find_place, launch
from diffussm.runtime.run_dir import RunDirectory, write_atomically
from diffussm.runtime.signals import StopRequest

if TYPE_CHECKING:
    from diffussm.data.images import Source
    from diffussm.runtime.distributed import Processes
    from diffussm.training.trainer import Trainer


def run(options: argparse.Namespace) -> int:
    """Check everything, then open the run directory, then train: here, or in processes that it starts."""
    config = compose("train", options.overrides, options.config_dir)
    if options.print_config:
        return print_config(config)
    directory = RunDirectory(Path(config.run_dir))
    if processes := _num_to_launch(config):
        _check(directory, config)
        command = [sys.executable, "-m", "diffussm", "train", *sys.argv[2:]]
        return launch(command, processes, config.trainer.max_restarts)
    if find_place().world_size == 1 and _check(directory, config):  # before torch is loaded
        return 0
    with StopRequest() as stop:  # from now on, though it will be a while before there is a step to stop after
        return _train(config, directory, stop)


def _num_to_launch(config: DictConfig) -> int:
    """How many processes are to be started; 0 if this one is to train."""
    wanted, place = config.trainer.num_processes, find_place()
    if wanted is None:
        return 0
    if place.address is None:
        return wanted if wanted > 1 else 0
    if wanted != place.world_size:
        raise ConfigError(
            f"trainer.num_processes={wanted}: the launcher has started {place.world_size}: leave it at null"
        )
    return 0


def _check(directory: RunDirectory, config: DictConfig) -> bool:
    """Refuse a run directory in which this run cannot be; returns whether there is nothing left to do."""
    directory.check()
    _check_drift(directory, config)
    status = directory.read_status()
    if status and status["state"] == "finished" and status["images"] >= config.trainer.total_images:
        print(f"{directory.path}: finished at {status['images']:,} images; nothing to do")
        return True
    return False


def _train(config: DictConfig, directory: RunDirectory, stop: StopRequest) -> int:
    from diffussm.build import System, build_source, build_trainer, choose_device
    from diffussm.runtime.distributed import Processes

    keep_freed_memory()
    processes = Processes.from_environment(config.trainer.timeout_seconds)

    def build() -> tuple["Source", "Trainer"]:
        source = build_source(config.data, config.model)
        system = System(config, source.image_shape, device)
        trainer = build_trainer(system, source, directory, processes, lambda: stop, note)
        len(source)  # reads the data, or says why it cannot, before anything is created
        return source, trainer

    device = processes.own_device(choose_device(config.device))
    with processes.start(device):
        if processes.world_size > 1:
            _check_equal(config, processes)
            if processes.on_first(lambda: _check(directory, config)):
                return 0
        source, trainer = processes.on_all(build)
        try:
            processes.on_first(lambda: _open(directory, config, source, trainer))
            trainer.run()
        except BaseException as error:
            _write_failure(directory, trainer, error)
            raise
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


def _open(directory: RunDirectory, config: DictConfig, source: "Source", trainer: "Trainer") -> None:
    directory.open()
    content = OmegaConf.to_yaml(config, resolve=True)
    write_atomically(directory.path / "config.yaml", content.encode())
    directory.write_status("running")
    _summarize(config, source, trainer, directory)


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
            exit_code=error.exit_code if isinstance(error, UserError) else 1,
            message=str(error) or repr(error),
        )


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
    batch, total, world_size = trainer.batch_size, trainer.total_images, trainer.processes.world_size
    found = trainer.checkpoints.paths()
    model = config.model._target_.rpartition(".")[2]
    lines = [
        f"run          {directory.path}" + (f" (continues from {found[-1].name})" if found else " (new)"),
        f"model        {model}, {parameters:,} parameters, {config.trainer.precision} on "
        + (f"{world_size} processes, the first on " if world_size > 1 else "")
        + str(trainer.device),
        f"data         {len(source):,} images {source.image_shape}, {source.num_classes or 'no'} classes",
        f"batch        {batch} images = {world_size} process(es) x {len(trainer.parts)} pass(es) x "
        f"{len(trainer.parts[0])}",
        f"length       {total:,} images = {-(-total // batch):,} steps",
        *(f"optimizer    {line}" for line in describe_groups(trainer.optimizer)),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
