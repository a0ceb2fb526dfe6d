"""From a group of the configuration to an object: the only place that instantiates.

Every group is checked against the signature of what it builds, so that a wrong key or type is one line
with the key in it, whether it came from the command line, a file or Python.
"""

import inspect
import logging
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from diffussm.config import leaves, nearest
from diffussm.runtime.errors import ConfigError, RunDirectoryError, UserError

TRUSTED_MODULES = tuple(
    f"diffussm.{name}"
    for name in ("models", "diffusion", "data", "evaluation", "training.optim", "training.loggers")
)


def construct(node: DictConfig, key: str, **arguments: Any) -> Any:
    """What a group describes, given also `arguments`; ConfigError names the key that its constructor refuses."""
    try:
        return bound(node, key)(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(with_key(key, error)) from error


def bound(node: DictConfig, key: str) -> Callable[..., Any]:
    """The function or class of a group with its options bound; the rest of its arguments come at the call."""
    node = check_signature(node, key)
    try:
        return hydra.utils.instantiate(node, _convert_="all", _partial_=True)
    except InstantiationException as error:  # from a nested object
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise ConfigError(with_key(key, cause)) from error


def refuse_foreign_code(config: DictConfig, where: str) -> None:
    """A configuration names what to call, and a checkpoint's may come from a stranger: only our own parts."""
    for key, value in leaves(config):
        if not key.endswith("_target_"):
            continue
        # Where the object is defined counts: diffussm.data.images.hashlib is no part of ours.
        ours = str(value).startswith("diffussm.") and _find_object(str(value), key)
        if not ours or not str(getattr(ours, "__module__", "")).startswith(TRUSTED_MODULES):
            raise RunDirectoryError(
                f"{where}: its configuration calls {key}={value}, which is no part of diffussm to build with: "
                "trust_checkpoint=true allows it, if you know where it comes from"
            )


def check_signature(node: DictConfig, key: str) -> DictConfig:
    """Check a group's keys and scalar values against the parameters and type hints of its target.

    Returns the group with integers made floats where the target wants floats.
    """
    node = node.copy()
    target = _find_object(node._target_, f"{key}._target_")
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in [(str(name), value) for name, value in node.items()]:
        if name in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if name not in parameters and not takes_any:
            raise ConfigError(f"{key}.{name}: no such key{nearest(name, parameters)}")
        if not isinstance(value, DictConfig) and not _fits(value, hints.get(name, Any)):
            raise ConfigError(f"{key}.{name}={value}: must be {_describe(hints[name])}")
        if hints.get(name) is float:
            node[name] = float(value)
    return node


def with_key(key: str, error: BaseException) -> str:
    """`name=value: remedy`, as constructors say it, under the group's key."""
    message = str(error).splitlines()[0]
    if message.startswith(f"{key}."):
        return message
    return f"{key}.{message}" if re.match(r"[\w.]+=", message) else f"{key}: {message}"


def _find_object(name: str, key: str) -> Any:
    """What a dotted name stands for; ConfigError names the key if there is no such thing."""
    logger = logging.getLogger("hydra.utils")
    before, logger.disabled = logger.disabled, True  # it has its own account of a failure, of several lines
    try:
        return hydra.utils.get_object(name)
    except Exception as error:  # whatever importing a user's module may raise
        raise ConfigError(f"{key}={name}: cannot be imported: {error}") from error
    finally:
        logger.disabled = before


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    if origin in (Sequence, tuple):
        items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
        hints = get_args(hint) if origin is tuple else get_args(hint) * len(items or ())
        return items is not None and len(items) == len(hints) and all(map(_fits, items, hints))
    return True  # nested objects are the constructor's to judge


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"a list, each {_describe(*get_args(hint))}"
    if get_origin(hint) is tuple:
        return f"a list of {', '.join(map(_describe, get_args(hint)))}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(hint, "null" if hint is type(None) else str(hint))
