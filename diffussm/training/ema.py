"""Exponential moving averages of the weights, several decays at once."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_name(decay: float) -> str:
    """What the average with this decay is called in checkpoints and by `sampling.weights`."""
    return f"ema_{decay}"


class ModelAverages:
    """One average of a model's weights per decay, named `ema_<decay>`.

    The first update copies the weights; later ones are ema <- decay ema + (1 - decay) weights.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        if not decays:
            raise ValueError("ema_decays is empty: sampling and evaluation use the first average")
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decays holds {decay}: must be at least 0 and below 1")
        self._averages = {
            average_name(decay): AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in decays
        }
        for average in self._averages.values():
            average.requires_grad_(False).eval()

    @property
    def first(self) -> nn.Module:
        """The averaged model that pictures and evaluations during training use, in eval mode."""
        return next(iter(self._averages.values())).module

    def update(self, model: nn.Module) -> None:
        """Take the current weights into every average."""
        for average in self._averages.values():
            average.update_parameters(model)

    @property
    def num_updates(self) -> int:
        """How many times `update` ran, over all starts of the run."""
        return int(next(iter(self._averages.values())).n_averaged)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights under their names."""
        return {name: average.module.state_dict() for name, average in self._averages.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        """The inverse of `state` and `num_updates`."""
        for name, average in self._averages.items():
            average.module.load_state_dict(state[name])
            average.n_averaged.fill_(num_updates)
