"""The stock solvers of diffusers, through one adapter that hands them eps and nothing else.

Multistep solvers of diffusers cut a learned-range output wrongly or crash on it, and some of its schedulers are
wrong in some setting. Those below were compared with closed forms; DDPM and DDIM are our own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import Predictor
from diffussm.diffusion.samplers import Noise, estimate
from diffussm.diffusion.schedule import Schedule, Spacing

# The schedulers that are sound for eps, and those of their options that keep them so.
SOUND = {
    "DPMSolverMultistepScheduler": ("solver_order", "solver_type", "use_karras_sigmas"),
    "UniPCMultistepScheduler": ("solver_order", "solver_type", "use_karras_sigmas"),
    "DEISMultistepScheduler": ("solver_order", "use_karras_sigmas"),
    "HeunDiscreteScheduler": ("use_karras_sigmas",),
    "EulerDiscreteScheduler": ("use_karras_sigmas",),
}
MAX_SIGNAL = 0.01  # alphabar where a solver may begin with pure noise, unless that is the last timestep
INSTEAD = {
    "DDPMScheduler": "choose sampler=ddpm",
    "DDIMScheduler": "it is wrong with linspace spacing (diffusers 0.42): choose sampler=ddim",
}


@torch.no_grad()
def diffusers_solver(
    predict: Predictor,
    schedule: Schedule,
    x_T: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: Noise,
    *,
    scheduler: str = "DPMSolverMultistepScheduler",
    num_steps: int = 20,
    spacing: Spacing = "linspace",
    clip_x_0: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "B C H W"]:
    """x_0 by a deterministic solver of diffusers, named by its class.

    Args:
        num_steps: of the solver; Heun's evaluates the network 2 num_steps - 1 times, DEIS's num_steps + 1 times.
        clip_x_0: clamp the predicted x_0 to [-1, 1]; for pixels, not for latents.
        options: arguments of the scheduler's class, of those in `SOUND`.
    """
    options = dict(options or {})
    _check(scheduler, schedule, num_steps, options)
    import diffusers  # takes seconds

    schedule = schedule.to(x_T.device)
    try:
        solver = getattr(diffusers, scheduler)(
            num_train_timesteps=len(schedule),
            trained_betas=schedule.betas.tolist(),
            prediction_type="epsilon",
            timestep_spacing=spacing,
            **options,
        )
        solver.set_timesteps(num_steps, device=x_T.device)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"options={options}: {scheduler} refuses: {error}") from error
    _check_steps(solver, schedule, num_steps, spacing)
    x = x_T * solver.init_noise_sigma
    for t in solver.timesteps:
        x_t = solver.scale_model_input(x, t)
        _, eps = estimate(predict, schedule, x_t, t.expand(len(x)), y, clip_x_0)
        x = solver.step(eps, t, x).prev_sample
    if solver.sigmas[-1] > 0:  # DEIS stops at the first timestep, with its noise
        x, _ = estimate(predict, schedule, x, torch.zeros(len(x), dtype=torch.long, device=x.device), y, clip_x_0)
    return x


def _check(scheduler: str, schedule: Schedule, num_steps: int, options: Mapping[str, Any]) -> None:
    if not isinstance(schedule, Schedule):
        raise ValueError(
            "these solvers reverse a Gaussian diffusion, and this model is one of rectified flow: "
            "choose sampler=flow_euler or flow_heun"
        )
    if scheduler in INSTEAD:
        raise ValueError(f"scheduler={scheduler}: {INSTEAD[scheduler]}")
    if scheduler not in SOUND:
        raise ValueError(f"scheduler={scheduler}: not known to be sound for eps: choose {', '.join(SOUND)}")
    if schedule.has_zero_terminal_snr:
        raise ValueError(
            "at zero_terminal_snr=true eps, all that these solvers take, says nothing: choose ddpm or ddim"
        )
    if not 1 <= num_steps <= len(schedule):
        raise ValueError(f"num_steps={num_steps}: must lie in 1..{len(schedule)}")
    order = options.get("solver_order", 2)
    if order not in (1, 2, 3):
        raise ValueError(f"options.solver_order={order}: choose 1, 2 or 3")
    for name in options:
        if name not in SOUND[scheduler]:
            raise ValueError(f"options.{name}={options[name]}: {scheduler} takes {', '.join(SOUND[scheduler])}")


def _check_steps(solver: Any, schedule: Schedule, num_steps: int, spacing: Spacing) -> None:
    """Refuse steps that begin where x_t is not noise alone, or two of which are the same."""
    begin = int(solver.timesteps.max())
    if begin < len(schedule) - 1 and schedule.alphas_cumprod[begin] > MAX_SIGNAL:
        raise ValueError(
            f"num_steps={num_steps}: with spacing={spacing} this solver would begin at timestep {begin} of "
            f"{len(schedule)}, where x_t is not noise alone: choose spacing=trailing"
        )
    sigmas = solver.sigmas
    if len(sigmas[:-1].unique()) < num_steps or sigmas[-1] >= sigmas[0]:
        raise ValueError(f"num_steps={num_steps}: this solver would stand still: choose another number of steps")
