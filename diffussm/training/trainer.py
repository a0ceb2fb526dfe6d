"""The training loop: steps on global batches, counted in images, that any restart continues bit for bit.

Whatever is random about step s (data order, flips, timesteps, noise, label drops) is a function of (seed, s),
drawn for the whole global batch and sliced. So a checkpoint holds no RNG state, and neither accumulation nor
a restart changes what a step sees. The trainer knows its model, objective and batches by protocol only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffussm.runtime.errors import (
    DivergedError,
    OutOfMemoryError,
    Preempted,
    RunDirectoryError,
    StorageError,
)
from diffussm.runtime.seeding import make_generator
from diffussm.training.checkpoint import Checkpoint, CheckpointStore
from diffussm.training.ema import ModelAverages
from diffussm.training.logging import MetricsLog, Progress
from diffussm.training.optim import learning_rate_factor
from diffussm.training.precision import Precision
from diffussm.training.window import MetricsWindow

MAX_SKIPPED_STEPS = 20
MAX_FAILED_SAVES = 3


class Batch(Protocol):
    """A global batch: what `to_latents` turns into x_0, and labels (None: unconditional)."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def noise(self) -> Tensor | None: ...


class Batches(Protocol):
    """Global batches by step, from any step on."""

    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def starting_at(self, step: int) -> Iterator[Batch]: ...


class Draws(Protocol):
    """An objective's random draws for a batch, sliceable by sample."""

    @property
    def t(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    def __getitem__(self, samples: slice) -> "Draws": ...
    def to(self, device: torch.device) -> "Draws": ...


class Objective(Protocol):
    """What is minimised: `draw` all randomness of a global batch, then terms (B,) of any slice of it.

    It may `observe` the losses of a whole step; what it then remembers is its `state`.
    """

    @property
    def num_timesteps(self) -> int: ...
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Any: ...
    def __call__(
        self, model: Callable[..., Tensor], x_0: Tensor, y: Tensor | None, draws: Any
    ) -> dict[str, Tensor]: ...
    def observe(self, draws: Any, loss: Tensor) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Periodic:
    """Something to do with the averaged model every so many images and at the end (None: only then).

    What `action(model, images)` returns is logged. It must leave torch's global state as it finds it.
    """

    name: str
    every_images: int | None
    action: Callable[[nn.Module, int], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from its tensors: a checkpoint's train_state.json. By default, before any step."""

    data: Mapping[str, Any]  # the fingerprint of what it was trained on; always with image_shape
    step: int = 0
    images: int = 0
    ema_updates: int = 0
    skipped_steps: int = 0
    loss_scale: Mapping[str, Any] = field(default_factory=dict)
    window: Mapping[str, Any] | None = None
    imported: Mapping[str, Any] | None = None  # the file that it began with, if its weights were imported


class Trainer:
    """Train `model` until `total_images`, continuing from the newest valid checkpoint if there is one.

    Args:
        to_latents: a batch's images and noise to x_0, on the device.
        batch_size: images per optimiser step, over everything.
        device_batch_size: most images in one forward pass; a step accumulates over as many as it takes.
        max_grad_norm: gradients are scaled down to this norm; None leaves them as they are.
        config: the resolved configuration, stored in every checkpoint.
        stop: becomes true when the process has been asked to stop.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        to_latents: Callable[[Tensor, Tensor | None], Tensor],
        optimizer: torch.optim.Optimizer,
        checkpoints: CheckpointStore,
        log: MetricsLog,
        precision: Precision,
        config: Mapping[str, Any],
        seed: int,
        batch_size: int,
        total_images: int,
        save_every_images: int,
        log_every_images: int,
        warmup_images: int = 0,
        decay_images: int = 0,
        device_batch_size: int | None = None,
        max_grad_norm: float | None = None,
        ema_decays: Sequence[float] = (0.9999,),
        periodic: Sequence[Periodic] = (),
        stop: Callable[[], object] = lambda: False,
    ) -> None:
        self.model, self.objective, self.batches, self.to_latents = model, objective, batches, to_latents
        self.optimizer, self.checkpoints, self.log, self.precision = optimizer, checkpoints, log, precision
        self.config, self.seed, self.batch_size, self.total_images = config, seed, batch_size, total_images
        self.save_every_images, self.log_every_images = save_every_images, log_every_images
        self.warmup_images, self.decay_images = warmup_images, decay_images
        self.device_batch_size = device_batch_size or batch_size
        self.max_grad_norm, self.periodic, self.stop = max_grad_norm, periodic, stop
        self.averages = ModelAverages(model, ema_decays)
        self.device = next(model.parameters()).device
        self.window = MetricsWindow(objective.num_timesteps, self.device)
        self.imported: Mapping[str, Any] | None = None
        self.step = 0
        self.skipped_steps = self.skipped_in_a_row = self.failed_saves = 0

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.batch_size

    def run(self) -> None:
        """Train to the end. Raises Preempted after a full checkpoint when asked to stop."""
        self.restore()
        self.model.train()
        progress = Progress(self.total_images, self.images, "img")
        try:
            for batch in self.batches.starting_at(self.step):
                if self.images >= self.total_images:
                    break
                self.run_step(batch)
                progress.advance(self.batch_size, self.window.headline)
                self.after_step(progress.say)
        finally:
            progress.close()
        self.finish()

    def run_step(self, batch: Batch) -> None:
        """One optimiser step on one global batch."""
        try:
            self.set_learning_rate()
            self.accumulate_gradients(batch)
            grad_norm = self.clip_gradients()
            self.update_weights(grad_norm)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"out of memory on {self.device} with {self.device_batch_size} images in a forward pass: "
                "set trainer.device_batch_size lower (the global batch stays the same)"
            ) from error
        self.step += 1

    def accumulate_gradients(self, batch: Batch) -> None:
        """Backward through the mean loss of the global batch, in slices that fit the device."""
        generator = make_generator(self.seed, "step", self.step)
        draws: Draws | None = None
        losses = []
        for start in range(0, self.batch_size, self.device_batch_size):
            part = slice(start, start + self.device_batch_size)
            noise = None if batch.noise is None else self._place(batch.noise[part])
            x_0 = self.to_latents(self._place(batch.images[part]), noise)
            y = None if batch.labels is None else self._place(batch.labels[part])
            if draws is None:
                draws = self.objective.draw((self.batch_size, *x_0.shape[1:]), generator)
            mine = draws[part].to(self.device)
            with self.precision.autocast():
                terms = self.objective(self.model, x_0, y, mine)
            loss = terms["loss"].sum() / self.batch_size
            self.precision.scaler.scale(loss).backward()
            self.window.add_losses(terms, mine.t, mine.weight)
            losses.append(terms["loss"].detach())
        self.objective.observe(draws, torch.cat(losses))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def clip_gradients(self) -> Tensor:
        """Bring the gradient's norm to at most `max_grad_norm`; returns the norm before."""
        self.precision.scaler.unscale_(self.optimizer)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def update_weights(self, grad_norm: Tensor) -> None:
        """Step the optimiser and the averages; skip, count and finally give up on non-finite gradients."""
        if torch.isfinite(grad_norm):
            self.precision.scaler.step(self.optimizer)
            self.averages.update(self.model)
            self.window.add_grad_norm(grad_norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"gradients were not finite in {self.skipped_in_a_row} steps on end, up to step {self.step}: "
                "lower optimizer.lr, set trainer.max_grad_norm, or choose trainer.precision=fp32"
            )

    def set_learning_rate(self) -> None:
        """Every group's own rate, times the schedule's factor after this step's images."""
        factor = learning_rate_factor(
            self.images + self.batch_size, self.warmup_images, self.decay_images, self.total_images
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def after_step(self, say: Callable[[str], None]) -> None:
        """Log, show, save and stop where it is time to.

        A save comes last, so that whatever falls on the same step is done again if it is lost.
        """
        ended = self.images >= self.total_images
        saving = self._due(self.save_every_images) or ended
        if self._due(self.log_every_images) or ended:
            self.log.write(self.metrics())
            self.window.reset()
        if not ended:
            for periodic in self.periodic:
                if periodic.every_images and self._due(periodic.every_images):
                    self._perform(periodic)
        if saving:
            self.save(say)
        if self.stop() and not ended:
            if not saving:
                self.save(say)
            raise Preempted(f"stopped by signal at {self.images:,} images with a full checkpoint: run it again")

    def finish(self) -> None:
        """The last pictures and evaluations; harmless to repeat."""
        for periodic in self.periodic:
            self._perform(periodic)

    def metrics(self) -> dict[str, Any]:
        """The record of the steps since the last one."""
        return {
            "images": self.images,
            "step": self.step,
            **self.window.summary(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.skipped_steps,
        }

    def save(self, say: Callable[[str], None] = print) -> None:
        """Publish a checkpoint; a failure is retried once, then survived until the third on end."""
        tensors = {
            "model": self.model.state_dict(),
            **self.averages.state(),
            "optimizer": self._optimizer_state(),
        }
        if state := self.objective.state():
            tensors["objective"] = state
        train_state = TrainState(
            data=dict(self.batches.fingerprint),
            step=self.step,
            images=self.images,
            ema_updates=self.averages.num_updates,
            skipped_steps=self.skipped_steps,
            loss_scale=self.precision.scaler.state_dict(),
            window=self.window.state(),
            imported=self.imported,
        )
        for group in tensors.values():
            for name, tensor in group.items():
                if not tensor.isfinite().all():
                    raise DivergedError(
                        f"{name} is no longer finite at step {self.step}, nothing was saved: lower optimizer.lr; "
                        "the checkpoints before it are intact"
                    )
        documents = {"train_state": asdict(train_state), "config": dict(self.config)}
        for _ in range(2):
            try:
                self.checkpoints.save(self.step, tensors, documents)
                self.failed_saves = 0
                return
            except StorageError as error:
                say(f"saving failed: {error}")
                failure = error
        self.failed_saves += 1
        if self.failed_saves >= MAX_FAILED_SAVES or self.images >= self.total_images or self.stop():
            raise failure

    def restore(self) -> None:
        """Continue from the newest valid checkpoint; without any, start at step 0."""
        checkpoint = self.checkpoints.newest_valid()
        if checkpoint is None:
            self.log.rewind(-1)
            return
        checkpoint.check_model(self.model.state_dict())
        train_state = TrainState(**checkpoint.document("train_state"))
        # Before the first step any data will do: imported weights know none of ours.
        if train_state.images and train_state.data != dict(self.batches.fingerprint):
            raise RunDirectoryError(
                f"{checkpoint.path}: trained on {train_state.data}, the configuration now gives "
                f"{dict(self.batches.fingerprint)}: restore the data or choose another name"
            )
        self._load(checkpoint, train_state)
        self.log.rewind(self.images)

    def _load(self, checkpoint: Checkpoint, train_state: TrainState) -> None:
        self.model.load_state_dict(checkpoint.tensors("model"))
        averages = {name: checkpoint.tensors(name) for name in self.averages.state()}
        self.averages.load(averages, train_state.ema_updates)
        parameters = dict(self.model.named_parameters())
        for key, tensor in checkpoint.tensors("optimizer").items():
            name, _, field = key.rpartition("/")
            self.optimizer.state[parameters[name]][field] = tensor.to(self.device)
        if "objective.safetensors" in checkpoint.files:
            self.objective.load(checkpoint.tensors("objective"))
        if self.precision.scaler.is_enabled() and train_state.loss_scale:
            self.precision.scaler.load_state_dict(dict(train_state.loss_scale))
        self.step = train_state.images // self.batch_size  # also right if the batch size was changed
        self.skipped_steps, self.imported = train_state.skipped_steps, train_state.imported
        if train_state.window is not None:
            self.window.load(train_state.window)

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{field}": tensor
            for name, parameter in self.model.named_parameters()
            for field, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def _due(self, every_images: int) -> bool:
        """Whether this step crossed a multiple of `every_images`."""
        return self.images // every_images > (self.images - self.batch_size) // every_images

    def _perform(self, periodic: Periodic) -> None:
        result = periodic.action(self.averages.first, self.images)
        if result:
            self.log.write({"images": self.images, "step": self.step, periodic.name: dict(result)})
        self.window.restart_clock()
