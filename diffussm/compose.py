"""From command-line overrides to one validated configuration, or one line that says what is wrong."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffussm import config as schema
from diffussm.runtime.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())


def compose(
    verb: str,
    overrides: Sequence[str],
    config_dir: Path | None = None,
    from_checkpoint: Mapping[str, Any] | None = None,
) -> DictConfig:
    """The validated configuration of a verb. ConfigError names the override that does not work.

    Args:
        config_dir: a user's own directory, searched beside ours for groups and experiments.
        from_checkpoint: the configuration whose groups are the options named `from_checkpoint`.
    """
    for override in overrides:
        parsed = _parse(override)
        group = str(parsed.key_or_group)
        if group == "sweep" or parsed.is_sweep_override():
            raise ConfigError(f"{override}: makes several runs: add -m (train, sample, evaluate), or choose one")
        chosen = parsed.value()
        if group == "logger" and isinstance(chosen, list) and all(isinstance(name, str) for name in chosen):
            continue  # of which there may be several
        if group in groups() and group != "experiment" and not isinstance(chosen, str):
            raise ConfigError(f"{override}: choose one of {', '.join(group_options(group))}")
    schema.register()
    for group, node in (from_checkpoint or {}).items():
        if isinstance(node, Mapping):
            ConfigStore.instance().store(group=group, name="from_checkpoint", node=OmegaConf.create(dict(node)))
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir={config_dir}: no such directory")
        overrides = [*overrides, f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    with _hydra():
        try:
            config = hydra_compose(config_name=verb, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_one_line(error, verb, overrides)) from error
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    may_miss = {"run_dir"}  # which follows from name
    if verb in ("import", "evaluate"):
        may_miss.add("data.path")  # weights alone tell of no data, and few metrics look at any
    if verb == "plan":
        may_miss |= {"data.path", "autoencoder.pretrained", "evaluation.reference"}  # which nothing is read from
    if verb == "stats":
        may_miss.add("evaluation.reference")  # which it is there to make
    if missing := sorted(OmegaConf.missing_keys(config) - may_miss):
        raise ConfigError(f"{', '.join(missing)}: not set: add {' '.join(f'{key}=...' for key in missing)}")
    schema.validate(config)
    return config


def expand(
    overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[str | None, list[tuple[dict[str, str], list[str]]]]:
    """The name of sweep=NAME, if any, and every combination of choices: what is chosen, by key, and all overrides.

    A choice is `key=a,b` or `key=range(3)`, on the command line or in configs/sweep/NAME.yaml, whose keys those of
    the command line replace. ConfigError for what is none, or where there is none.
    """
    name: str | None = None
    lines: dict[str, str] = {}
    for override in overrides:
        parsed = _parse(override)
        if parsed.key_or_group == "sweep":
            name = str(parsed.value())
            lines = _read_sweep(name, config_dir) | lines
        lines[parsed.get_key_element()] = override
    lines.pop("sweep", None)
    chosen_keys, options = [], []
    for line in lines.values():
        parsed = _parse(line)
        if not parsed.is_sweep_override():
            options.append([line])
            continue
        key = parsed.get_key_element()
        try:
            values: list[str] = list(parsed.sweep_string_iterator())
        except HydraException as error:
            remedy = "write the values, as in key=1,2,4 or key=range(3)"
            raise ConfigError(f"{line}: is no list of choices: {remedy}") from error
        chosen_keys.append(key)
        options.append(["=".join((key, value)) for value in values])
    if not chosen_keys:
        raise ConfigError("-m: there is nothing to choose from: write key=1,2,4 or sweep=NAME, or leave out -m")
    jobs = []
    for combination in itertools.product(*options):
        given = dict(line.split("=", 1) for line in combination)
        jobs.append(({key: given[key] for key in chosen_keys}, list(combination)))
    return name, jobs


def _read_sweep(name: str, config_dir: Path | None) -> dict[str, str]:
    """The overrides of configs/sweep/NAME.yaml, by key."""
    directories = [path / "sweep" for path in (config_dir, CONFIG_DIR) if path is not None]
    for directory in directories:
        if (directory / f"{name}.yaml").is_file():
            content = OmegaConf.to_container(OmegaConf.load(directory / f"{name}.yaml"))
            assert isinstance(content, dict)
            return {str(key): f"{key!s}={value}" for key, value in content.items()}
    options = sorted({path.stem for directory in directories for path in directory.glob("*.yaml")})
    raise ConfigError(f"sweep={name}: choose {', '.join(options)}{schema.nearest(name, options)}")


def check_launcher(overrides: Sequence[str]) -> None:
    """ConfigError where hydra/launcher=NAME hydra.launcher.KEY=VALUE name no launcher, or a key that it lacks."""
    with _hydra():
        try:
            hydra_compose(overrides=list(overrides), return_hydra_config=True)
        except MissingConfigException as error:
            raise ConfigError(
                f"{' '.join(overrides)}: no such launcher: choose basic, or after pip install 'diffussm[sweep]' "
                "joblib, submitit_slurm, submitit_local"
            ) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{' '.join(overrides)}: {_first_line(error.__cause__ or error)}") from error


def launch_jobs(
    task: Callable[[DictConfig], Any], count: int, scratch: Path, overrides: Sequence[str]
) -> list[Any]:
    """Have one of Hydra's launchers call `task` with {index: 0}, {index: 1}, ...; returns what the calls return.

    Args:
        scratch: a directory for what launchers leave behind.
        overrides: as `check_launcher` found them to be right.
    """
    ConfigStore.instance().store(name="sweep_job", node={"index": 0})
    indices = ",".join(map(str, range(count)))
    settings = [
        f"hydra.sweep.dir={quoted(scratch)}", "hydra.sweep.subdir=.", "hydra.output_subdir=null",
        "hydra/job_logging=none", "hydra/hydra_logging=none", *overrides, f"index={indices}",
    ]  # fmt: skip
    with _hydra():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        batches = hydra.multirun("sweep_job", task, settings)
    return [result.return_value for batch in batches for result in batch]


def quoted(value: object) -> str:
    """A string that an override takes as it is, whatever is in it."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _parse(override: str) -> Override:
    if "=" not in override:
        raise ConfigError(f"{override}: not an override: write key=value")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override}: cannot be read: {_first_line(error)}: quote it or mend it") from error


def override_value(overrides: Sequence[str], key: str) -> Any:
    """What the last override of `key` sets it to, quotes resolved; None if there is none."""
    given = [override for override in overrides if override.startswith(f"{key}=")]
    try:
        return OverridesParser.create().parse_override(given[-1]).value() if given else None
    except HydraException as error:
        raise ConfigError(f"{given[-1]}: cannot be read: {_first_line(error)}: quote it or mend it") from error


def compose_group(group: str, name: str, overrides: Mapping[str, Any]) -> DictConfig:
    """configs/GROUP/NAME.yaml with these keys replaced; ConfigError for a name or key that it does not have."""
    options = group_options(group)
    if name not in options:
        raise ConfigError(f"{group}={name}: choose {', '.join(options)}{schema.nearest(name, options)}")
    config = OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    for key, value in overrides.items():
        if key not in config:
            raise ConfigError(f"{group}.{key}: no such key{schema.nearest(key, map(str, config))}")
        config[key] = value
    return config


def group_options(group: str) -> list[str]:
    """The names that GROUP=... can take."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def groups() -> list[str]:
    """All configuration groups; a sweep is none, but many configurations."""
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name != "sweep")


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Hydra pointed at our configs, whatever the process did with it before."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        yield


def _one_line(error: Exception, verb: str, overrides: Sequence[str]) -> str:
    """What a person needs of Hydra's message: the key, what is wrong with it, what would be right."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in group_options(group) if option] or ["nothing yet"]
        return f"{group}={name}: choose {', '.join(options)}{schema.nearest(name, options)}"
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or "")
        if "not in" in str(cause):
            parent, _, name = key.rpartition(".")
            known = _known_keys(verb, parent, overrides)
            if not known and parent in groups():
                return (
                    f"{key}: no {parent} is chosen: add {parent}=NAME, one of {', '.join(group_options(parent))}"
                )
            hint = schema.nearest(name, known)
            return f"{key}: no such key{hint}" + ("" if hint else f": {parent or verb} has {', '.join(known)}")
        if "is not a ListConfig" in str(cause):
            given = override_value(overrides, key)
            return f"{key}={given}: must be a list: write {key}=[{given}]"
        return f"{key}: {_first_line(cause)}"
    return _first_line(error)


def _known_keys(verb: str, parent: str, overrides: Sequence[str]) -> list[str]:
    """The keys below `parent` with the groups that were chosen, whatever else was wrong."""
    chosen = [override for override in overrides if override.partition("=")[0] in groups()]
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        node = hydra_compose(config_name=verb, overrides=chosen)
        node = OmegaConf.select(node, parent) if parent else node
        return [str(key) for key in node or () if not str(key).startswith("_")]
    return []


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).splitlines()[0])
