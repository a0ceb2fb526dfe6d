"""`diffussm train trainer.dry_run=true`: everything that can be known of a run without its data, weights or GPU.

The network is one of shapes alone; one step goes forward and backward through it. Nothing is created.
"""

import contextlib
from collections.abc import Iterator

import torch
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from diffussm.build import System, build_evaluation, build_source, check_device_name, construct, is_in_parts
from diffussm.commands import note
from diffussm.commands.init_from import read_initial_weights
from diffussm.commands.summary import describe_costs, describe_run
from diffussm.data.autoencoder import Autoencoder, FrozenAutoencoder
from diffussm.data.images import Source
from diffussm.data.loader import is_latent_set
from diffussm.models.complexity import Complexity, measure_call
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError, DataError, RunDirectoryError
from diffussm.runtime.launch import Place
from diffussm.runtime.run_dir import RunDirectory
from diffussm.runtime.seeding import make_generator
from diffussm.training.checkpoint import CheckpointStore
from diffussm.training.parallel import split
from diffussm.training.precision import Precision

CPU = torch.device("cpu")


def dry_run(config: DictConfig, directory: RunDirectory, world_size: int) -> int:
    """Print what a run of so many processes would be, what it costs, and which of its files are missing."""
    check_device_name(config.device)  # one that is not here may be where the run will be
    source, data = find_data(config)
    image_shape = image_shape_of(config) if source is None else source.image_shape
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)  # of the noise schedule's own numbers
    system = System(config, image_shape, CPU, shapes_only)
    with shapes_only:
        named_parameters = system.model.named_parameters()
        optimizer = construct(config.optimizer, "optimizer", named_parameters=named_parameters)
    if config.sampler:
        system.generator(system.model, config)  # says what does not fit
    processes = Processes(Place(world_size=world_size))
    parts = split(config.trainer.batch_size, processes, config.trainer.device_batch_size)
    num_shards = world_size if is_in_parts(config, processes) else 1
    cost = try_step(system, shapes_only, len(parts[0]))
    _, height, width = system.latent_shape
    tokens = height * width // config.model.get("patch_size", 1) ** 2
    found = CheckpointStore(directory.checkpoints).paths()
    lines = [
        *describe_run(
            config,
            run=f"{directory.path}" + (f" (would continue from {found[-1].name})" if found else " (new)"),
            device=f"device={config.device}",
            data=data,
            model=system.model,
            optimizer=optimizer,
            parts=parts,
            world_size=world_size,
            num_shards=num_shards,
        ),
        *describe_costs(config, cost, model=system.model, tokens=tokens, parts=parts, num_shards=num_shards),
        *_describe_files(system, source, is_new=not found),
        "dry run      the configuration is sound; nothing was created",
    ]
    print("\n".join(lines))
    return 0


def find_data(config: DictConfig) -> tuple[Source | None, str]:
    """The data if it can be read, and a line about it."""
    if OmegaConf.missing_keys(config.data):
        return None, "not told where it is"
    try:
        source = build_source(config.data, config.model)
        count = len(source)
    except DataError as error:
        return None, f"not there: {error}"
    return source, f"{count:,} images {source.image_shape}, {source.num_classes or 'no'} classes"


def image_shape_of(config: DictConfig) -> tuple[int, int, int]:
    """Of images that are not there, as far as the configuration tells."""
    if resolution := config.data.get("resolution"):
        return (3, resolution, resolution)
    if side := config.model.get("input_size"):
        autoencoder: Autoencoder = construct(config.autoencoder, "autoencoder")
        return autoencoder.image_shape((config.model.in_channels, side, side))
    raise ConfigError(
        "data.resolution=null: the data is not there to tell the size of its images: set it, as to 256"
    )


def _describe_files(system: System, source: Source | None, is_new: bool) -> list[str]:
    """The other files that a run needs, and whether they are there."""
    lines, autoencoder = [], system.autoencoder
    if isinstance(autoencoder, FrozenAutoencoder):
        where = autoencoder.files.where
        is_here = autoencoder.files.is_here
        lines.append(f"autoencoder  {where}: {'there' if is_here else 'not on this machine yet'}")
        if is_here and source is not None and is_latent_set(source):
            source.check_autoencoder(autoencoder.fingerprint)
    if is_new and system.config.init_from is not None:
        with _telling(lines, "init_from"):
            read_initial_weights(system.config, system.model, note)
    with _telling(lines, "evaluation"):
        build_evaluation(system.config, system.image_shape)
    return lines


@contextlib.contextmanager
def _telling(lines: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (DataError, RunDirectoryError) as error:
        lines.append(f"{what:<12} not there: {error}")


def try_step(system: System, shapes_only: FakeTensorMode, batch_size: int) -> Complexity:
    """Forward and backward through one pass of `batch_size` images, in shapes; returns what the first costs."""
    shape = (batch_size, *system.latent_shape)
    draws = system.objective.draw(shape, make_generator(0, "step", 0))
    with shapes_only:
        x_0, noise = torch.zeros(shape), torch.zeros(shape)
        y = None if system.config.model.num_classes is None else torch.zeros(batch_size, dtype=torch.long)
        losses: list[torch.Tensor] = []

        def forward() -> None:
            with Precision(system.config.trainer.precision, CPU).autocast():
                losses.append(system.objective(system.model, x_0, y, draws, noise)["loss"].sum())

        cost = measure_call(system.model, forward)
        losses[0].backward()
    return cost
