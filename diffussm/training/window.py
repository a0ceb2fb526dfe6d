"""The metrics of training steps between two log records."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class MetricsWindow:
    """Means over the steps since the last log record, kept on the device until they are asked for.

    Its state is part of a checkpoint, so that no record depends on where a run was interrupted.
    """

    NUM_QUARTILES = 4

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps, self.device = num_timesteps, device
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.sums: dict[str, Tensor] = {}
        self.quartile_sums = torch.zeros(self.NUM_QUARTILES, device=self.device)
        self.quartile_weights = torch.zeros(self.NUM_QUARTILES, device=self.device)
        self.grad_norm_sum = torch.zeros((), device=self.device)
        self.num_images = self.num_updates = 0
        self.seconds = self.waited = 0.0
        self.restart_clock()

    def state(self) -> dict[str, Any]:
        """The sums as numbers that JSON keeps exactly; None where they are not finite."""
        return {
            "sums": {name: _finite(total) for name, total in self.sums.items()},
            "quartile_sums": [_finite(total) for total in self.quartile_sums],
            "quartile_weights": self.quartile_weights.tolist(),
            "grad_norm_sum": _finite(self.grad_norm_sum),
            "num_images": self.num_images,
            "num_updates": self.num_updates,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

        def tensor(value: Any) -> Tensor:
            return torch.tensor(float("nan") if value is None else value, device=self.device)

        self.sums = {name: tensor(value) for name, value in state["sums"].items()}
        self.quartile_sums = torch.stack([tensor(value) for value in state["quartile_sums"]])
        self.quartile_weights = tensor(state["quartile_weights"])
        self.grad_norm_sum = tensor(state["grad_norm_sum"])
        self.num_images, self.num_updates = state["num_images"], state["num_updates"]
        self.seconds, self.waited = state["seconds"], state.get("waited", 0.0)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of images per second."""
        self._last = time.perf_counter()

    @torch.no_grad()
    def add_losses(self, terms: Mapping[str, Tensor], t: Tensor, weight: Tensor) -> None:
        """A step's loss terms (B,), weighted, at timesteps (B,), 0 .. num_timesteps, with weights (B,)."""
        t, weight = t.to(self.device), weight.to(self.device)
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().float().sum()
        quartile = (t * self.NUM_QUARTILES // self.num_timesteps).long().clamp(max=self.NUM_QUARTILES - 1)
        self.quartile_sums.index_add_(0, quartile, terms["loss"].detach().float())
        self.quartile_weights.index_add_(0, quartile, weight.float())
        self.num_images += len(t)
        now = time.perf_counter()
        self.seconds, self._last = self.seconds + now - self._last, now

    def add_wait(self, seconds: float) -> None:
        """How long a step waited for its data, part of the time from `add_losses` to `add_losses`."""
        self.waited += seconds

    def add_grad_norm(self, grad_norm: Tensor) -> None:
        """The norm of one step's gradient before clipping."""
        self.grad_norm_sum = self.grad_norm_sum + grad_norm.detach()
        self.num_updates += 1

    @property
    def images_per_second(self) -> float | None:
        """Over the steps of the window, and nothing but these."""
        return self.num_images / self.seconds if self.seconds else None

    def summary(self) -> dict[str, Any]:
        """Mean terms, loss by timestep quartile (q0: least noise), gradient norm, speed, share of data wait."""
        record: dict[str, Any] = {name: _mean(total, self.num_images) for name, total in self.sums.items()}
        for quartile in range(self.NUM_QUARTILES):
            record[f"loss_q{quartile}"] = _mean(
                self.quartile_sums[quartile], float(self.quartile_weights[quartile])
            )
        record["grad_norm"] = _mean(self.grad_norm_sum, self.num_updates)
        record["images_per_second"] = self.images_per_second
        record["data_wait"] = min(self.waited / self.seconds, 1.0) if self.seconds else None
        return record


def _mean(total: Tensor, count: float) -> float | None:
    """total / count, None where there is nothing to average or the total is not finite."""
    value = _finite(total)
    return None if value is None or not count else value / count


def _finite(total: Tensor) -> float | None:
    """A number that JSON knows, or None."""
    return float(total) if math.isfinite(total) else None
