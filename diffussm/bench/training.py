"""The suite `trainer`: what the trainer costs on top of forward, backward and optimiser.

Both subjects train the same model on batches of the same loader, step by step in turns. The bare loop draws
timesteps and noise and does nothing else; the trainer draws by sample, measures and clips the gradient, averages
the weights, and logs every step. Neither saves.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffussm.bench.timing import alternate
from diffussm.bench.workload import Measurement, Setup
from diffussm.data.autoencoder import IdentityAutoencoder
from diffussm.data.fake import Fake
from diffussm.data.loader import BatchLoader
from diffussm.diffusion.loss import DDPMObjective
from diffussm.diffusion.objective import Draws
from diffussm.diffusion.schedule import linear_schedule
from diffussm.models import DiffuSSM
from diffussm.training.checkpoint import CheckpointStore
from diffussm.training.logging import MetricsLog
from diffussm.training.optim import adamw
from diffussm.training.precision import Precision
from diffussm.training.trainer import Trainer

TRAINER, BARE = "trainer", "bare loop"
RESOLUTION, NUM_CLASSES = 32, 10
TOKENS = RESOLUTION**2
NEVER = 2**62


def measure_trainer(setup: Setup, note: Callable[[str], None]) -> Iterator[Measurement]:
    """Steps of both in turns, on DiffuSSM of the given size and pixels of 32 x 32."""
    note(f"trainer: steps of {setup.batch_size} images, {TOKENS} tokens")
    with tempfile.TemporaryDirectory() as temporary:
        calls = {TRAINER: _trainer(setup, Path(temporary)), BARE: _bare_loop(setup)}
        for call in calls.values():
            for _ in range(2):
                call()
        for name, timing in alternate(calls, setup.repetitions, 6 * setup.seconds).items():
            yield Measurement("trainer", "training step", name, TOKENS, timing, 0, 0, 0, setup.batch_size)


def _parts(setup: Setup) -> tuple[DiffuSSM, DDPMObjective, BatchLoader, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = DiffuSSM(
        in_channels=3,
        num_classes=NUM_CLASSES,
        hidden_size=setup.hidden_size,
        depth=setup.depth,
        d_state=setup.d_state,
    ).to(setup.device)
    objective = DDPMObjective(linear_schedule().to(setup.device))
    loader = BatchLoader(
        Fake(num_classes=NUM_CLASSES, resolution=RESOLUTION), setup.batch_size, seed=0, with_labels=True
    )
    return model, objective, loader, adamw(model.named_parameters())


def _trainer(setup: Setup, directory: Path) -> Callable[[], None]:
    model, objective, loader, optimizer = _parts(setup)
    trainer = Trainer(
        model=model,
        objective=objective,
        batches=loader,
        to_latents=IdentityAutoencoder().to_latents,
        optimizer=optimizer,
        checkpoints=CheckpointStore(directory / "checkpoints"),
        log=MetricsLog(directory / "metrics.jsonl"),
        precision=Precision(setup.precision, setup.device),  # type: ignore[arg-type]
        config={},
        seed=0,
        batch_size=setup.batch_size,
        total_images=NEVER,
        save_every_images=NEVER,
        log_every_images=1,
    )
    model.train()
    batches = loader.starting_at(0)

    def step() -> None:
        trainer.run_step(next(batches))
        trainer.after_step(lambda line: None)
        _wait(setup)

    return step


def _bare_loop(setup: Setup) -> Callable[[], None]:
    model, objective, loader, optimizer = _parts(setup)
    precision = Precision(setup.precision, setup.device)  # type: ignore[arg-type]
    batches, to_latents = loader.starting_at(0), IdentityAutoencoder().to_latents
    model.train()

    def step() -> None:
        batch = next(batches)
        x_0, y = to_latents(_place(batch.images)), _place(batch.labels)
        count = setup.batch_size
        draws = Draws(torch.randint(objective.num_timesteps, (count,)), torch.rand(count), torch.ones(count))
        noise = torch.randn_like(x_0)
        with precision.autocast():
            terms = objective(model, x_0, y, draws.to(setup.device), noise)
        terms["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(setup)

    def _place(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.to(setup.device)

    return step


def _wait(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
