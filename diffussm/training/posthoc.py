"""Post-hoc EMA: power averages of any length, made after training from snapshots of a few that it tracked.

A snapshot taken at update t_i of an average with exponent gamma_i is the mean of all weights under the profile
p_i(tau) = (gamma_i + 1) tau^gamma_i / t_i^(gamma_i + 1) on [0, t_i]. The combination of snapshots whose profile
comes closest to a wanted one is a problem of least squares in the inner products of profiles, which have a closed
form; nothing of the weights enters (Karras et al. 2024, section 3.2 and algorithm 3). Beyond that, coefficients
sum to 1 here: weights that never moved come out as they are, however few the snapshots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.runtime.errors import ConfigError, RunDirectoryError
from diffussm.training.checkpoint import Checkpoint, CheckpointStore
from diffussm.training.ema import POWER_PREFIX, power_gamma

PREFIX = "posthoc_"
DIRECTORY = "ema_snapshots"
MAX_ERROR = 0.1  # of the profile, relative: of the difference's norm to its own


@dataclass(frozen=True)
class Snapshot:
    """A power average that is stored somewhere, up to some update."""

    checkpoint: Checkpoint
    name: str
    update: int

    @property
    def gamma(self) -> float:
        """Of its profile."""
        return power_gamma(float(self.name.removeprefix(POWER_PREFIX)))


def reconstruct(checkpoint: Checkpoint, weights: str, warn: Callable[[str], None], key: str) -> dict[str, Tensor]:
    """The average `posthoc_<sigma_rel>` of a checkpoint's run, up to this checkpoint; ConfigError names `key`."""
    snapshots, coefficients = plan(checkpoint, weights, warn, key)
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients.tolist(), strict=True):
        tensors = snapshot.checkpoint.tensors(snapshot.name)
        for name, tensor in tensors.items():
            total[name] = total.get(name, 0) + coefficient * tensor.double()
    return {name: tensor.to(tensors[name].dtype) for name, tensor in total.items()}


def plan(
    checkpoint: Checkpoint, weights: str, warn: Callable[[str], None], key: str
) -> tuple[list[Snapshot], Tensor]:
    """The snapshots that `posthoc_<sigma_rel>` is made of, and their coefficients; ConfigError names `key`."""
    try:
        sigma_rel = float(weights.removeprefix(PREFIX))
        gamma = power_gamma(sigma_rel)
    except ValueError as error:
        raise ConfigError(f"{key}={weights}: {error}: write {PREFIX}0.1 or another number") from error
    snapshots = find_snapshots(checkpoint, warn)
    if not snapshots:
        raise ConfigError(
            f"{key}={weights}: {checkpoint.path} has no power averages to make it of: train with "
            "trainer.ema_power=[0.05,0.1] and trainer.ema_snapshot_every_images, or choose "
            f"{', '.join(checkpoint.ema_names)}"
        )
    end = snapshots[-1].update
    times = torch.tensor([snapshot.update for snapshot in snapshots], dtype=torch.float64)
    gammas = torch.tensor([snapshot.gamma for snapshot in snapshots], dtype=torch.float64)
    coefficients, deviation = fit(times / end, gammas, gamma)
    if deviation > MAX_ERROR:
        raise ConfigError(
            f"{key}={weights}: {len(snapshots)} snapshots of averages give no such profile (it would be off by "
            f"{deviation:.0%}): choose a sigma_rel nearer to trainer.ema_power, or train with more snapshots"
        )
    return snapshots, coefficients


def fit(times: Tensor, gammas: Tensor, gamma: float) -> tuple[Tensor, float]:
    """Coefficients of profiles on [0, times] that come closest to that of `gamma` on [0, 1], and how close.

    The error is the norm of the difference of the profiles, relative to that of the wanted one.
    """
    one, wanted = torch.ones_like(times), torch.full_like(times, gamma)
    products = inner_product(times[:, None], gammas[:, None], times, gammas)
    wanted_products = inner_product(times, gammas, one, wanted)
    # Least squares with a Lagrange multiplier for the sum of the coefficients.
    system = torch.block_diag(products, torch.zeros(1, 1, dtype=times.dtype))
    system[-1, :-1] = system[:-1, -1] = 1
    coefficients = torch.linalg.solve(system, torch.cat([wanted_products, one[:1]]))[:-1]
    norm = inner_product(one, wanted, one, wanted)[0]
    difference = coefficients @ products @ coefficients - 2 * coefficients @ wanted_products + norm
    return coefficients, (difference / norm).clamp_min(0).sqrt().item()


def inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of p_a p_b, in closed form."""
    later = torch.where(t_a < t_b, gamma_b, gamma_a)
    ratio = (torch.minimum(t_a, t_b) / torch.maximum(t_a, t_b)) ** later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / torch.maximum(t_a, t_b)


def find_snapshots(checkpoint: Checkpoint, warn: Callable[[str], None]) -> list[Snapshot]:
    """The power averages of a checkpoint, after those that its run has stored before it, oldest first."""
    names = [name for name in checkpoint.ema_names if name.startswith(POWER_PREFIX)]
    end = checkpoint.document("train_state")["ema_updates"]
    found = []
    for path in CheckpointStore(checkpoint.path.resolve().parent.parent / DIRECTORY).paths() if names else []:
        try:
            stored = Checkpoint(path)
            if 0 < (update := stored.document("snapshot")["ema_updates"]) < end:
                found += [Snapshot(stored, name, update) for name in names]
        except RunDirectoryError as error:
            warn(f"passing over a damaged snapshot: {error}")
    return found + [Snapshot(checkpoint, name, end) for name in names if end]
