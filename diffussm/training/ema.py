"""Moving averages of the weights: exponential ones, and EDM2's, whose length grows with the run; several at once.

    exponential    average <- decay average + (1 - decay) weights
    power          average <- beta_t average + (1 - beta_t) weights,   beta_t = (1 - 1/t)^(gamma + 1)

A power average at update t is the mean of the weights w_1 .. w_t under the profile tau^gamma on [0, t], whose
standard deviation is a fixed share of t: sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffussm.runtime.distributed import Processes
from diffussm.training.parallel import Replicas

POWER_PREFIX = "ema_power_"
MAX_SIGMA_REL = 0.28  # that of gamma = 0, the plain mean of all weights, is 12^(-1/2)


def average_names(decays: Sequence[float], power: Sequence[float] = ()) -> list[str]:
    """What the averages with these decays and these sigma_rel are called in checkpoints."""
    return [*(f"ema_{decay}" for decay in decays), *(f"{POWER_PREFIX}{sigma_rel}" for sigma_rel in power)]


def power_gamma(sigma_rel: float) -> float:
    """The exponent of the profile with this relative standard deviation, in (0, 0.28]."""
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel={sigma_rel}: must be above 0 and at most {MAX_SIGMA_REL}")
    low, high = 0.0, 1 / sigma_rel  # sigma_rel falls with gamma, and lies below 1 / gamma
    for _ in range(100):
        gamma = (low + high) / 2
        wider = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) > sigma_rel
        low, high = (gamma, high) if wider else (low, gamma)
    return low


class ModelAverages:
    """Averages of a model's weights, one per decay and one per sigma_rel; the first update copies the weights.

    Args:
        parallel: where the model's tensors lie; those of its averages lie there too.
    """

    def __init__(
        self,
        model: nn.Module,
        decays: Sequence[float],
        power: Sequence[float] = (),
        parallel: Replicas | None = None,
    ) -> None:
        if not decays:
            raise ValueError("ema_decays is empty: sampling and evaluation use the first average")
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decays holds {decay}: must be at least 0 and below 1")
        shares = [*map(_exponential, decays), *(_power(power_gamma(sigma_rel)) for sigma_rel in power)]
        self._shares = dict(zip(average_names(decays, power), shares, strict=True))
        self._parallel = parallel or Replicas(Processes())
        self._averages = {name: self._parallel.copy(model).requires_grad_(False).eval() for name in self._shares}
        self.num_updates = 0  # over all starts of the run

    @property
    def first(self) -> nn.Module:
        """The averaged model that pictures and evaluations during training use, in eval mode; laid out as all."""
        return next(iter(self._averages.values()))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the current weights into every average."""
        self.num_updates += 1
        weights = self._parallel.local(model.parameters())
        for name, average in self._averages.items():
            share = self._shares[name](self.num_updates) if self.num_updates > 1 else 1.0
            torch._foreach_lerp_(self._parallel.local(average.parameters()), weights, share)
            for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
                ours.copy_(theirs)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights under their names."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def power_state(self) -> dict[str, dict[str, Tensor]]:
        """Of `state`, what averages of other lengths can be made of later."""
        return {name: state for name, state in self.state().items() if name.startswith(POWER_PREFIX)}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        """The inverse of `state` and `num_updates`."""
        for name, average in self._averages.items():
            average.load_state_dict(state[name])
        self.num_updates = num_updates


def _exponential(decay: float) -> Callable[[int], float]:
    """The share of the new weights in update t."""
    return lambda t: 1 - decay


def _power(gamma: float) -> Callable[[int], float]:
    """1 - beta_t, without the cancellation that it is prone to when t is large."""
    return lambda t: -math.expm1((gamma + 1) * math.log1p(-1 / t))
