"""The objective of a classifier of noisy latents, whose gradient guides a sampler (ADM, section 4.1)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffussm.diffusion.objective import Draws, Objective, require_schedule
from diffussm.diffusion.process import q_sample
from diffussm.diffusion.schedule import Schedule


class ClassifierObjective(Objective):
    """-log p(y | x_t), with t uniform and x_t ~ q(x_t | x_0) of the schedule that samplers will walk."""

    def __init__(self, schedule: Schedule) -> None:
        require_schedule(schedule)
        self.schedule = schedule

    @property
    def num_timesteps(self) -> int:
        """T, the range of the timesteps that `draw` draws."""
        return len(self.schedule)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Timesteps (uniform) for a global batch of x_0 of this shape; no label is ever dropped."""
        ones = torch.ones(shape[:1])
        t = torch.randint(len(self.schedule), shape[:1], generator=generator)
        return Draws(t, drop_uniform=ones, weight=ones)

    def __call__(
        self,
        model: Callable[[Tensor, Tensor], Float[Tensor, "B K"]],
        x_0: Float[Tensor, "B *S"],
        y: Int[Tensor, "B"] | None,
        draws: Draws,
        noise: Float[Tensor, "B *S"],
    ) -> dict[str, Float[Tensor, "B"]]:
        """Per-sample terms: `loss` in nats, and `accuracy`, 1 where the likeliest class is the right one."""
        if y is None:
            raise ValueError("a classifier needs labelled data: choose data with classes")
        x_t = q_sample(self.schedule, x_0, draws.t, noise)
        logits = model(x_t, self.schedule.timesteps[draws.t])
        accuracy = (logits.argmax(dim=1) == y).to(logits.dtype)
        return {"loss": cross_entropy(logits, y, reduction="none"), "accuracy": accuracy}
