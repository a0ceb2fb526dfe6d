"""Weights that a run begins with: what of another's fits a model, what is made anew, and what is left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class InitialWeights:
    """Tensors of a model by name, not necessarily all of them, and where they come from, as JSON."""

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """Tensors to load, and in words what the model makes anew and what of the other it has no place for."""

    loaded: Mapping[str, Tensor]
    remade: Sequence[str]
    skipped: Sequence[str]


def match_weights(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], made_for_data: Sequence[str] = ()
) -> Match:
    """What to do with `theirs` in a model that has `ours`.

    ValueError names a tensor that only one side has, or with another shape, and both sides; tensors whose names
    begin with one of `made_for_data` may differ.
    """
    loaded: dict[str, Tensor] = {}
    remade: list[str] = []
    skipped: list[str] = []
    for name in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(name), theirs.get(name)
        if mine is not None and other is not None and mine.shape == other.shape:
            if not other.isfinite().all():
                raise ValueError(f"{name} is not finite")
            loaded[name] = other.detach().to("cpu", mine.dtype)
            continue
        difference = f"{name} ({_shape(other)} there, {_shape(mine)} here)"
        if not name.startswith(tuple(made_for_data)):
            raise ValueError(f"{difference}: not the same architecture")
        (skipped if mine is None else remade).append(difference)
    return Match(loaded, remade, skipped)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
