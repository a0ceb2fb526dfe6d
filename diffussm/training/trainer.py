"""The training loop: steps on global batches, counted in images, that any restart continues bit for bit.

Whatever is random about step s (data order, flips, timesteps, noise, label drops) is a function of (seed, s) and
of a sample's place in the global batch. So a checkpoint holds no RNG state, and neither accumulation nor a restart
nor the number of processes changes what a step sees. Each process works on its share of the batch; the losses of
all samples come together in every step, so that all processes log, adapt and stop alike. The trainer knows its
model, objective and batches by protocol only.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from diffussm.runtime.distributed import Interrupted, Processes
from diffussm.runtime.errors import (
    DivergedError,
    OutOfMemoryError,
    Preempted,
    RunDirectoryError,
    StorageError,
)
from diffussm.runtime.seeding import draw_normal, make_generator
from diffussm.training.best import BestCheckpoint
from diffussm.training.checkpoint import Checkpoint, CheckpointStore
from diffussm.training.compilation import compile_blocks, naming_compile_failures
from diffussm.training.ema import ModelAverages
from diffussm.training.initial import InitialWeights
from diffussm.training.logging import MetricsLog, Progress, headline
from diffussm.training.optim import learning_rate_factor
from diffussm.training.parallel import Replicas, split
from diffussm.training.precision import Precision
from diffussm.training.profiling import NoProfile
from diffussm.training.protocols import Batch, Batches, Draws, Objective, Periodic
from diffussm.training.throughput import Throughput, peak_memory_gib
from diffussm.training.train_state import (
    TrainState,
    check_train_state,
    load_optimizer_state,
    optimizer_state,
    owners,
    refuse_non_finite,
)
from diffussm.training.window import MetricsWindow

MAX_SKIPPED_STEPS = 20
MAX_FAILED_SAVES = 3
REPORT_SECONDS = 30.0  # between two reports where no record is due
# After which a run that has not reported again is taken for stalled: in its steps, and in what takes longer.
STEP_LIMIT_SECONDS, LIMIT_SECONDS = 300.0, 1800.0

Namesake = Callable[[str], Tensor | None]  # the tensor that one with this name replaces, or is of the shape of


class Trainer:
    """Train `model` until `total_images`, continuing from the newest valid checkpoint if there is one.

    Args:
        to_latents: a batch's images and noise to x_0, on the device.
        batch_size: images per optimiser step, over all processes.
        device_batch_size: most images in one forward pass; a step accumulates over as many as it takes.
        processes: those of the job, which have met when `run` is called.
        parallel: how the model is spread over them; whole in each by default.
        compile: whether the model's blocks are compiled.
        max_grad_norm: gradients are scaled down to this norm; None leaves them as they are.
        config: the resolved configuration, stored in every checkpoint.
        snapshots: where the averages with ema_power go every so many images.
        best: keeps the checkpoint whose evaluation was best.
        throughput: what the speed is worth; None leaves it out of the records.
        profile: told which part of a step runs.
        report: told by the first process now and then where the run is, for who looks at it from outside.
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
        compile: bool = False,
        ema_decays: Sequence[float] = (0.9999,),
        ema_power: Sequence[float] = (),
        ema_snapshot_every_images: int | None = None,
        snapshots: CheckpointStore | None = None,
        best: BestCheckpoint | None = None,
        periodic: Sequence[Periodic] = (),
        processes: Processes | None = None,
        parallel: Replicas | None = None,
        throughput: Throughput | None = None,
        profile: NoProfile | None = None,
        report: Callable[[Mapping[str, Any]], None] = lambda facts: None,
        stop: Callable[[], object] = lambda: False,
    ) -> None:
        self.processes = processes or Processes()
        self.parallel = parallel or Replicas(self.processes)
        self.throughput, self.profile, self.report = throughput, profile or NoProfile(), report
        self.model, self.objective, self.batches, self.to_latents = model, objective, batches, to_latents
        self.optimizer, self.checkpoints, self.log, self.precision = optimizer, checkpoints, log, precision
        self.config, self.seed, self.batch_size, self.total_images = config, seed, batch_size, total_images
        self.save_every_images, self.log_every_images = save_every_images, log_every_images
        self.warmup_images, self.decay_images = warmup_images, decay_images
        self.samples = self.processes.share(batch_size)
        self.parts = split(batch_size, self.processes, device_batch_size)
        self.max_grad_norm, self.periodic, self.stop = max_grad_norm, periodic, stop
        self.averages = ModelAverages(model, ema_decays, ema_power, self.parallel)
        self.snapshots, self.ema_snapshot_every_images = snapshots, ema_snapshot_every_images
        self.best, self.best_step = best, -1  # of the evaluation that was best
        self.device = next(model.parameters()).device
        self.window = MetricsWindow(objective.num_timesteps, self.device)
        self.imported: Mapping[str, Any] | None = None
        self.changes: Sequence[str] = ()  # of the configuration since the run was last continued
        self.initial: InitialWeights | None = None  # to begin with; the first process's count, for all
        self.network = model  # what forward passes go through
        if compile:
            compile_blocks(model)  # after the averages were copied from it
        self.step = 0
        self.saved_step: int | None = None  # of the newest checkpoint
        self.skipped_steps = self.skipped_in_a_row = self.failed_saves = 0
        self.is_stopping = False  # whether any process has been asked to
        self.pending: list[str] = []
        self.progress = Progress(total_images, 0, "img", is_shown=False)
        self.waited = 0.0  # seconds, for the batch of this step
        self._reported = 0.0

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.batch_size

    def run(self, accepted: Callable[[], object] = lambda: None) -> None:
        """Train to the end. Raises Preempted after a full checkpoint when asked to stop.

        Args:
            accepted: called in the first process once the checkpoint to continue, if there is one, fits.
        """
        with self.processes.noticing_losses():
            self.network = self.parallel.wrap(self.model, len(self.parts))
        self.restore()
        self.processes.on_first(accepted)
        if self.best is not None:
            self.processes.on_first(self.best.keep)  # it may have been killed on the way
        if self.processes.is_first:
            self.log.start(self.images)
            if self.step:
                facts = {"step": self.step, "processes": self.processes.world_size}
                changed = {"changed": list(self.changes)} if self.changes else {}
                self.log.add_event("resume", self.images, **facts, **changed)
        self.model.train()
        self.progress = progress = Progress(
            self.total_images, self.images, "img", is_shown=self.processes.is_first
        )
        try:
            self._report("starting", LIMIT_SECONDS)
            self.catch_up()
            with contextlib.closing(self.batches.starting_at(self.step)) as batches, naming_compile_failures():
                first_step = self.step
                while self.images < self.total_images:
                    batch = self.next_batch(batches)
                    with self.naming_lack_of_memory():
                        if self.step == first_step:
                            self.warm_up(batch)
                        self.run_step(batch)
                    progress.advance(self.batch_size, lambda: headline(self.metrics()))
                    self.after_step(progress.say)
                    self.profile.end_step(progress.say)
        finally:
            self.profile.close(progress.say)
            progress.close()
        self.finish()

    def next_batch(self, batches: Generator[Batch, None, None]) -> Batch:
        """The batch of this step, when it is there."""
        started = time.perf_counter()
        with self.profile.span("data wait"):
            try:
                batch = next(batches)
            except Interrupted:
                self.is_stopping = True
                self.stop_here(self.progress.say)
        self.waited = time.perf_counter() - started
        return batch

    def run_step(self, batch: Batch) -> None:
        """One optimiser step on one global batch."""
        self.set_learning_rate()
        draws, terms = self.compute_gradients(batch)
        with self.profile.span("loss reduction"):
            terms = self.share_losses(terms)
        with self.profile.span("metrics"):
            self.window.add_losses(terms, draws.t, draws.weight)
            self.objective.observe(draws, terms["loss"])
        with self.profile.span("clipping"):
            grad_norm = self.clip_gradients()
        self.update_weights(grad_norm)
        self.step += 1

    @contextlib.contextmanager
    def naming_lack_of_memory(self) -> Iterator[None]:
        """What of the configuration would help when the device has too little memory."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"out of memory on {self.device} with {len(self.parts[0])} images in a forward pass: "
                "set trainer.device_batch_size lower (the global batch stays the same)"
            ) from error

    def warm_up(self, batch: Batch) -> None:
        """Passes whose gradients are thrown away, until they are summed in the order that remains.

        Without them the first step after a restart would be rounded differently from the same step of a run that
        goes on.
        """
        for _ in range(self.parallel.settling_passes):
            self.compute_gradients(batch)
            self.optimizer.zero_grad(set_to_none=True)

    def compute_gradients(self, batch: Batch) -> tuple[Draws, dict[str, Tensor]]:
        """Backward through the mean loss of the global batch, in parts that fit the device.

        Returns the draws of all samples, and the loss terms of this process's.
        """
        generator = make_generator(self.seed, "step", self.step)
        draws: Draws | None = None
        found: list[dict[str, Tensor]] = []
        # The reduction divides by the number of processes.
        factor = self.processes.world_size / self.batch_size
        for part in self.parts:
            mine = slice(part.start - self.samples.start, part.stop - self.samples.start)
            with self.profile.span("host to device"):
                posterior_noise = None if batch.noise is None else self._place(batch.noise[mine])
                images = self._place(batch.images[mine])
                y = None if batch.labels is None else self._place(batch.labels[mine])
            with self.profile.span("latents"):
                x_0 = self.to_latents(images, posterior_noise)
            shape = x_0.shape[1:]
            with self.profile.span("draws"):
                if draws is None:
                    draws = self.objective.draw((self.batch_size, *shape), generator)
                noise = self._place(draw_normal(self.seed, "noise", self.step, part, shape))
                drawn = draws[part.start : part.stop].to(self.device)
            is_last = part is self.parts[-1]
            reduction = contextlib.nullcontext() if is_last else self.parallel.local_gradients(self.network)
            with reduction, self.precision.products(), self.processes.noticing_losses():
                with self.precision.autocast(), self.profile.span("forward"):
                    terms = self.objective(self.network, x_0, y, drawn, noise)
                loss = terms["loss"].sum() * factor
                with self.profile.span("backward"):
                    self.precision.scaler.scale(loss).backward()
            found.append({name: term.detach().float() for name, term in terms.items()})
        assert draws is not None
        return draws, {name: torch.cat([terms[name] for terms in found]) for name in found[0]}

    def share_losses(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms of all samples of the global batch, from those of this process's share.

        With them goes whether a process has been asked to stop, so that all know it in the same step, and how
        long each has waited for its data.
        """
        asked = bool(self.stop())
        if self.processes.world_size == 1:
            self.is_stopping |= asked
            self.window.add_wait(self.waited)
            return dict(terms)
        everything = torch.zeros(len(terms) * self.batch_size + 2, device=self.device)
        everything[-2], everything[-1] = self.waited / self.processes.world_size, asked
        rows = everything[:-2].view(len(terms), self.batch_size)
        rows[:, self.samples.start : self.samples.stop] = torch.stack(list(terms.values()))
        self.processes.sum(everything)
        waited, asked = everything[-2:].tolist()
        self.is_stopping |= bool(asked)
        self.window.add_wait(waited)
        return dict(zip(terms, rows, strict=True))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def clip_gradients(self) -> Tensor:
        """Bring the gradient's norm to at most `max_grad_norm`; returns the norm before."""
        with self.processes.noticing_losses():
            self.precision.scaler.unscale_(self.optimizer)
        norm = self.parallel.total_norm(
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        )
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        return norm

    def update_weights(self, grad_norm: Tensor) -> None:
        """Step the optimiser and the averages; skip, count and finally give up on non-finite gradients."""
        if torch.isfinite(grad_norm):
            with self.profile.span("optimizer"):
                self.precision.scaler.step(self.optimizer)
            with self.profile.span("EMA"):
                self.averages.update(self.model)
            self.window.add_grad_norm(grad_norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            self._add_event("skipped step", self.images + self.batch_size, step=self.step + 1)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise self.processes.told_by_first(
                DivergedError(
                    f"gradients were not finite in {self.skipped_in_a_row} steps in a row, "
                    f"up to step {self.step}: "
                    "lower optimizer.lr, set trainer.max_grad_norm, or choose trainer.precision=fp32"
                )
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
        logging = self._due(self.log_every_images) or ended
        if logging:
            with self.profile.span("logging"):
                self._log(self.metrics())
        self._report("training", STEP_LIMIT_SECONDS, at_once=logging)
        if logging:
            self.window.reset()
        if not ended:
            for periodic in self.periodic:
                if periodic.every_images and self._due(periodic.every_images):
                    self.pending.append(periodic.name)
            self.catch_up()
        if self.ema_snapshot_every_images and self._due(self.ema_snapshot_every_images):
            self._save_snapshot(say)
        if self.is_stopping and not ended:
            self.stop_here(say)
        if saving or self.best_step == self.step:
            self.save(say)

    def stop_here(self, say: Callable[[str], None]) -> NoReturn:
        """Save, unless this step is where the run has just been continued, and end."""
        if self.step != self.saved_step:
            self.save(say)
        raise self.processes.told_by_first(
            Preempted(f"stopped by signal at {self.images:,} images with a full checkpoint: run it again")
        )

    def catch_up(self) -> None:
        """Do what is pending, as far as it goes before a stop."""
        for periodic in self.periodic:
            if periodic.name in self.pending and not self.is_stopping:
                self._perform(periodic)
                if not self.is_stopping:
                    self.pending.remove(periodic.name)

    def finish(self) -> None:
        """The last pictures and evaluations, and their records; harmless to repeat."""
        for periodic in self.periodic:
            self._perform(periodic)
            if self.is_stopping:
                raise self.processes.told_by_first(
                    Preempted(f"stopped by signal after the last step, in its {periodic.name}: run it again")
                )
        self.processes.on_first(self.log.settle)

    def metrics(self) -> dict[str, Any]:
        """The record of the steps since the last one."""
        return {
            "images": self.images,
            "step": self.step,
            **(summary := self.window.summary()),
            **(self.throughput.record(summary["images_per_second"]) if self.throughput else {}),
            "memory_gib": peak_memory_gib(self.device),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.skipped_steps,
        }

    def save(self, say: Callable[[str], None] = print) -> None:
        """Publish a checkpoint; a failure is retried once, then survived until the third in a row."""
        self._report("saving", LIMIT_SECONDS, at_once=True)
        with self.profile.span("saving"):
            found = {
                "model": self.model.state_dict(),
                **self.averages.state(),
                "optimizer": optimizer_state(self.model, self.optimizer),
            }
            tensors = {name: self.parallel.gather(state) for name, state in found.items()}
            if state := self.objective.state():
                tensors["objective"] = state
            if self.processes.on_first(lambda: self._save(tensors, say)):
                self.saved_step = self.step
                self.keep_best()

    def keep_best(self) -> None:
        """Keep the checkpoint of this step, once there is one, if its evaluation was the best."""
        if self.best is not None and self.best_step == self.saved_step == self.step:
            self.processes.on_first(self.best.keep)

    def _save(self, tensors: Mapping[str, Mapping[str, Tensor]], say: Callable[[str], None]) -> bool:
        """Whether these were published."""
        train_state = TrainState(
            data=dict(self.batches.fingerprint),
            step=self.step,
            images=self.images,
            ema_updates=self.averages.num_updates,
            skipped_steps=self.skipped_steps,
            loss_scale=self.precision.scaler.state_dict(),
            window=self.window.state(),
            pending=self.pending,
            imported=self.imported,
        )
        refuse_non_finite(tensors, self.step)
        documents = {"train_state": asdict(train_state), "config": dict(self.config)}
        for _ in range(2):
            try:
                self.log.settle()  # or a restart from here would miss what waits
                self.checkpoints.save(self.step, tensors, documents)
                self.failed_saves = 0
                return True
            except StorageError as error:
                say(f"saving failed: {error}")
                failure = error
        self.failed_saves += 1
        self._add_event("failed save", self.images, step=self.step, message=str(failure))
        if self.failed_saves >= MAX_FAILED_SAVES or self.images >= self.total_images or self.is_stopping:
            raise failure
        return False

    def _save_snapshot(self, say: Callable[[str], None]) -> None:
        """Keep the power averages as they are; a failure costs this snapshot only."""
        tensors = {name: self.parallel.gather(state) for name, state in self.averages.power_state().items()}

        def save() -> None:
            assert self.snapshots is not None
            refuse_non_finite(tensors, self.step)
            if self.averages.num_updates:
                try:
                    facts = {"images": self.images, "ema_updates": self.averages.num_updates}
                    self.snapshots.save(self.step, tensors, {"snapshot": facts})
                except StorageError as error:
                    say(f"going on without this snapshot of averages: {error}")

        self.processes.on_first(save)

    def restore(self) -> None:
        """Continue from the newest valid checkpoint; without any, start at step 0, from `initial` if it is set.

        The first process reads it, for all.
        """
        checkpoint: Checkpoint | None = None

        def find() -> Mapping[str, Any] | None:
            nonlocal checkpoint
            checkpoint = self.checkpoints.newest_valid()
            if checkpoint is None:
                self.log.rewind(-1)
                return None
            checkpoint.check_model(self.model.state_dict())
            document = checkpoint.document("train_state")
            check_train_state(document, checkpoint.path)
            if missing := [name for name in self.averages.state() if name not in checkpoint.ema_names]:
                raise RunDirectoryError(
                    f"{checkpoint.path}: holds {', '.join(checkpoint.ema_names)} and not {', '.join(missing)}: an "
                    "average begins with its run: restore trainer.ema_decays and ema_power, or choose another name"
                )
            # Before the first step any data will do: imported weights know none of ours.
            if document["images"] and document["data"] != dict(self.batches.fingerprint):
                raise RunDirectoryError(
                    f"{checkpoint.path}: trained on {document['data']}, the configuration now gives "
                    f"{dict(self.batches.fingerprint)}: restore the data or choose another name"
                )
            return document

        document = self.processes.on_first(find)
        if document is None:
            self._begin()
            return
        self._load(lambda name, like: self._read(checkpoint, name, like), TrainState(**document))
        if self.processes.is_first:
            self.log.rewind(self.images)

    def _begin(self) -> None:
        """Take the weights that there are to begin with, into the averages too; all else starts fresh."""
        initial, self.initial = self.initial, None
        self.imported = self.processes.broadcast_object(initial.provenance if initial else None)
        if self.imported is None:
            return
        state = self.model.state_dict()
        self.model.load_state_dict({**state, **self._share(initial.tensors if initial else None, state.get)})
        self.averages.load(dict.fromkeys(self.averages.state(), self.model.state_dict()), 0)

    def _read(self, checkpoint: Checkpoint | None, name: str, like: Namesake) -> dict[str, Tensor]:
        """Of the tensors of a checkpoint that the first process has; none if it holds no such file."""
        tensors = None
        if checkpoint is not None:
            tensors = checkpoint.tensors(name) if f"{name}.safetensors" in checkpoint.files else {}
        return self._share(tensors, like)

    def _share(self, tensors: Mapping[str, Tensor] | None, like: Namesake) -> dict[str, Tensor]:
        """What each process needs of the first one's whole tensors."""
        everything = self.processes.broadcast_tensors(tensors)
        return {name: self.parallel.part(tensor, like(name)) for name, tensor in everything}

    def _load(self, read: Callable[[str, Namesake], dict[str, Tensor]], train_state: TrainState) -> None:
        like = self.model.state_dict().get
        self.model.load_state_dict(read("model", like))
        self.averages.load({name: read(name, like) for name in self.averages.state()}, train_state.ema_updates)
        load_optimizer_state(self.model, self.optimizer, read("optimizer", owners(self.model)))
        if objective := read("objective", lambda name: None):
            self.objective.load(objective)
        if self.precision.scaler.is_enabled() and train_state.loss_scale:
            self.precision.scaler.load_state_dict(dict(train_state.loss_scale))
        self.step = train_state.images // self.batch_size  # also right if the batch size was changed
        self.skipped_steps, self.imported = train_state.skipped_steps, train_state.imported
        self.pending = list(train_state.pending)
        self.saved_step = self.step if train_state.images == self.images else None
        if train_state.window is not None:
            self.window.load(train_state.window)

    def _due(self, every_images: int) -> bool:
        """Whether this step crossed a multiple of `every_images`."""
        return self.images // every_images > (self.images - self.batch_size) // every_images

    def _perform(self, periodic: Periodic) -> None:
        def stop() -> object:
            self._report(periodic.name, LIMIT_SECONDS)
            return self.stop()

        undertaking = self.processes.undertake(stop)
        result: Mapping[str, Any] = {}
        try:
            with self.profile.span(periodic.name):
                with self.parallel.whole(self.averages.first) as model:
                    result = periodic.action(model, self.images, undertaking)
                undertaking.finish()
        except Interrupted:
            self.is_stopping = True
        if result and not self.is_stopping:
            self._log({"images": self.images, "step": self.step, periodic.name: dict(result)})
        if self.best is not None and periodic.is_judged and not self.is_stopping:
            best = self.best
            if self.processes.on_first(lambda: best.offer(self.step, result)):
                self.best_step = self.step
                self.keep_best()
        self.window.restart_clock()

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            self.log.write(record)

    def _add_event(self, name: str, images: int, **facts: Any) -> None:
        if self.processes.is_first:
            self.log.add_event(name, images, **facts)

    def _report(self, doing: str, limit_seconds: float, at_once: bool = False) -> None:
        """Tell where the run is, now and then or at once, and when to expect the next report at the latest."""
        now = time.monotonic()
        if not self.processes.is_first or (now - self._reported < REPORT_SECONDS and not at_once):
            return
        self._reported = now
        self.report(
            {
                "doing": doing,
                "images": self.images,
                "total_images": self.total_images,
                "step": self.step,
                "images_per_second": self.window.images_per_second,
                "eta_seconds": self.progress.eta_seconds,
                "skipped_steps": self.skipped_steps,
                "limit_seconds": limit_seconds,
            }
        )
