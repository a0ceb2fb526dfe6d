"""Optimiser: parameter groups from the roles that parameters declare, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float = 1e-4,
    ssm_lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW with one group per role (see `models.layers.tag`), each with its `initial_lr` and `role`.

    Args:
        ssm_lr: learning rate of A, B and dt of the state-space layers.
        weight_decay: of the matrices; biases, gains, embeddings and state-space parameters have none.
    """
    for name, value in (("lr", lr), ("ssm_lr", ssm_lr)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be positive and finite")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}: must be finite and at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={list(betas)}: must be two numbers, each in [0, 1)")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps}: must be positive and finite")
    groups: dict[str, dict[str, Any]] = {
        "decay": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
        "ssm": {"lr": ssm_lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {role: [] for role in groups}
    for name, parameter in named_parameters:
        role = getattr(parameter, "role", None)
        assert role in members, f"parameter {name} has no optimiser role: tag it where it is made"
        members[role].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members[role], "role": role, "initial_lr": options["lr"], **options}
            for role, options in groups.items()
            if members[role]
        ],
        betas=(betas[0], betas[1]),
        eps=eps,
        fused=True,
    )


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """One line per group: role, number of parameters, learning rate, weight decay."""
    return [
        f"{group['role']:<9} {sum(p.numel() for p in group['params']):>12,} parameters   "
        f"lr {group['initial_lr']:g}   weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]


def learning_rate_factor(images: int, warmup_images: int, decay_images: int, total_images: int) -> float:
    """Factor on every learning rate after `images`: linear warm-up, constant, linear decay to 0 at the end."""
    factor = 1.0
    if warmup_images:
        factor = min(factor, images / warmup_images)
    if decay_images:
        factor = min(factor, (total_images - images) / decay_images)
    return max(factor, 0.0)
