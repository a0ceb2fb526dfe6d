"""Faults that a job brings about in its own processes: `jobs.Jobs.start(..., faults=[("slow_saves", 0.1)])`.

Each is called in every process of the job before the command line, the launcher's included.
"""

import functools
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from diffussm import build
from diffussm.runtime import work_list
from diffussm.training import checkpoint, trainer


def say(line: str) -> None:
    """A line on stderr, all at once."""
    os.write(2, f"{line}\n".encode())


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Have `action` called with the arguments of a method before it runs."""
    original = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, replacement)


def after(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Have `action` called with the arguments of a method after it has run."""
    original = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        action(*arguments)
        return result

    setattr(owner, name, replacement)


def slow_saves(seconds: float) -> None:
    """Checkpoints take this long for every file; BEGIN save and END save are printed around them."""
    before(checkpoint, "write_and_sync", lambda *_: time.sleep(seconds))
    before(checkpoint.CheckpointStore, "save", lambda *_: say("BEGIN save"))
    after(checkpoint.CheckpointStore, "save", lambda *_: say("END save"))


def slow_load(seconds: float) -> None:
    """BEGIN load is printed before the parts of the system are built, which takes this long."""

    def wait(*_: object) -> None:
        say("BEGIN load")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)

    before(build.System, "__init__", wait)


def slow_pictures(seconds: float) -> None:
    """BEGIN pictures is printed when they begin; every evaluation of the network takes this long."""
    generator = build.System.generator

    def slowed(self: Any, model: Any, config: Any, check: Callable[[], object] = lambda: None) -> Any:
        def wait() -> None:
            say("BEGIN pictures")
            time.sleep(seconds)
            check()

        return generator(self, model, config, wait)

    build.System.generator = slowed


def tell_steps() -> None:
    """STEP, its number after it, the rank, and when, after every step."""

    def tell(self: trainer.Trainer, batch: object) -> None:
        say(f"STEP {self.step} {self.processes.rank} {time.time():.3f}")

    after(trainer.Trainer, "run_step", tell)


def slow_steps(seconds: float) -> None:
    """Every step takes this much longer."""
    before(trainer.Trainer, "run_step", lambda *_: time.sleep(seconds))


def hold(step: int, path: str) -> None:
    """BEGIN hold is printed before this step, which is taken when there is a file at `path`."""

    def wait(self: trainer.Trainer, batch: object) -> None:
        if self.step == step:
            say(f"BEGIN hold {step}")
            while not Path(path).exists():
                time.sleep(0.01)

    before(trainer.Trainer, "run_step", wait)


def end(rank: int, step: int, number: int, attempt: int = 0) -> None:
    """The process of this rank sends itself a signal before a step, in one attempt of the launcher."""

    def act(self: trainer.Trainer, batch: object) -> None:
        is_due = self.step == step and self.processes.rank == rank
        if is_due and self.processes.place.attempt == str(attempt):
            say(f"LOST {rank} at {time.time():.3f}")
            os.kill(os.getpid(), number)

    before(trainer.Trainer, "run_step", act)


def poison(rank: int, first: int, last: int) -> None:
    """x_0 of one rank is not a number in steps `first` to `last`."""
    original = trainer.Trainer.compute_gradients

    def compute(self: trainer.Trainer, batch: object) -> Any:
        clean = self.to_latents
        if self.processes.rank == rank and first <= self.step <= last:
            self.to_latents = lambda *arguments: clean(*arguments) * float("nan")
        try:
            return original(self, batch)
        finally:
            self.to_latents = clean

    trainer.Trainer.compute_gradients = compute


def tell_weights() -> None:
    """WEIGHTS, step, rank, skipped steps and a hash of the weights and of every average, after every step."""

    def tell(self: trainer.Trainer, batch: object) -> None:
        hashes = [digest(state) for state in (self.model.state_dict(), *self.averages.state().values())]
        say(f"WEIGHTS {self.step} {self.processes.rank} {self.skipped_steps} {' '.join(hashes)}")

    after(trainer.Trainer, "run_step", tell)


def digest(state: dict[str, torch.Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(state):
        sha256.update(name.encode() + state[name].detach().numpy().tobytes())
    return sha256.hexdigest()[:16]


def tell_bytes() -> None:
    """BYTES, rank, and what weights, moments and averages take in this process, after every step."""

    def size(tensors: Iterable[torch.Tensor]) -> int:
        with torch.no_grad():
            mine = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        storages = [tensor.untyped_storage() for tensor in mine]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def tell(self: trainer.Trainer, batch: object) -> None:
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values() if tensor.ndim]
        averages = [tensor for state in self.averages.state().values() for tensor in state.values()]
        sizes = [size(tensors) for tensors in (self.model.state_dict().values(), moments, averages)]
        say(f"BYTES {self.processes.rank} {' '.join(map(str, sizes))}")

    after(trainer.Trainer, "run_step", tell)


def compile_with(backend: str) -> None:
    """What is compiled is compiled by this, which may need no compiler of C++."""
    trainer.compile_blocks = functools.partial(trainer.compile_blocks, backend=backend)


def keep_weights(folder: str) -> None:
    """The weights after every step, as step-number.pt."""

    def keep(self: trainer.Trainer, batch: object) -> None:
        if self.processes.is_first:
            path = Path(folder) / f"{self.step:06d}.pt"
            torch.save({name: tensor.clone() for name, tensor in self.model.state_dict().items()}, path)

    after(trainer.Trainer, "run_step", keep)


def tell_draws(path: str) -> None:
    """A hash of all that a step sees of each of its samples, as lines of path.RANK: step, sample, hash."""
    compute = trainer.Trainer.compute_gradients

    def recording(self: trainer.Trainer, batch: object) -> Any:
        seen: list[str] = []
        objective = type(self.objective)
        call = objective.__call__

        def look(objective: Any, model: Any, x_0: Any, y: Any, draws: Any, noise: Any) -> Any:
            for row in range(len(x_0)):
                sha256 = hashlib.sha256()
                for tensor in (x_0, y, draws.t, draws.drop_uniform, draws.weight, noise):
                    sha256.update(tensor[row].numpy().tobytes())
                seen.append(sha256.hexdigest()[:16])
            return call(objective, model, x_0, y, draws, noise)

        objective.__call__ = look
        try:
            result = compute(self, batch)
        finally:
            objective.__call__ = call
        with Path(f"{path}.{self.processes.rank}").open("a") as file:
            for sample, value in zip(self.samples, seen, strict=True):
                file.write(f"{self.step} {sample} {value}\n")
        return result

    trainer.Trainer.compute_gradients = recording


def small_files(limit: int, first: int, last: int) -> None:
    """No file may grow beyond `limit` bytes from step `first` up to step `last`: EFBIG, not death."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def act(self: trainer.Trainer, *_: object) -> None:
        within = first <= self.step <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if within else resource.RLIM_INFINITY, -1))

    before(trainer.Trainer, "run_step", act)


def full_disk(file: str, first: int, count: int) -> None:
    """Writing this file of checkpoints meets /dev/full `count` times, from the save of step `first` on."""
    original = checkpoint.write_and_sync
    left = count

    def write(path: Path, content: bytes) -> None:
        nonlocal left
        step = int(path.parent.name.rpartition("-")[2])
        if path.name == file and step >= first and left:
            left -= 1
            path.symlink_to("/dev/full")
        original(path, content)

    checkpoint.write_and_sync = write


def tell_memory(every: int) -> None:
    """MEMORY, step, private KiB, open files and zombies, after every so many steps."""

    def tell(self: trainer.Trainer, batch: object) -> None:
        if self.step % every == 0:
            fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
            private = int(fields["Anonymous"].split()[0])
            files = len(list(Path("/proc/self/fd").iterdir()))
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
            say("MEMORY " + json.dumps([self.step, private, files, states.count("Z")]))

    after(trainer.Trainer, "run_step", tell)


def kill_workers(every: int) -> None:
    """Kill the loader's workers before every so many steps, and once in every save."""

    def kill(*_: object) -> None:
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            say(f"KILLED {pid}")
            os.kill(int(pid), signal.SIGKILL)

    def act(self: trainer.Trainer, batch: object) -> None:
        if self.step and self.step % every == 0:
            kill()

    before(trainer.Trainer, "run_step", act)
    before(checkpoint.CheckpointStore, "save", kill)


def slow_ranges(seconds: float) -> None:
    """Samples and their features take this long for every range."""
    work_off = work_list.WorkList.work_off

    def slowed(self: Any, finish: Callable[..., object], *arguments: Any) -> int:
        def wait(number: int, tell: Callable[[int], object]) -> None:
            time.sleep(seconds)
            finish(number, tell)

        return work_off(self, wait, *arguments)

    work_list.WorkList.work_off = slowed  # type: ignore[method-assign]
