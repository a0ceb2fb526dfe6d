"""-m: a job for every combination of choices, each a process of its own, and one table of what became of them.

Hydra's launchers decide where and how many at a time; all they run is `Commands`, by number. A job's directory is
a function of its choices, so that the same command again finds what is finished and continues the rest.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffussm.commands import note, print_table
from diffussm.compose import check_launcher, compose, expand, launch_jobs, quoted
from diffussm.runtime.errors import ConfigError, Preempted, RunDirectoryError
from diffussm.runtime.jobs import run_job
from diffussm.runtime.launch import find_place
from diffussm.runtime.run_dir import RunDirectory, write_json
from diffussm.runtime.run_status import read_report
from diffussm.runtime.signals import StopRequest

OWN_KEYS = ("name", "run_dir", "out", "config_dir")  # which a sweep sets for its jobs
LONGEST_NAME = 100  # of a run, and short enough for a directory
LAUNCHER_DIRECTORY = ".launcher"  # what launchers and a request to stop leave on the disk
LOG = "output.log"


@dataclass(frozen=True)
class Job:
    """One combination of choices.

    Args:
        name: of the choices, such as hourglass_ratio-2__seed-0.
        directory: where its log goes, and the run of `train`.
        overrides: its whole configuration.
    """

    name: str
    directory: Path
    overrides: tuple[str, ...]
    is_finished: bool = False


@dataclass(frozen=True)
class Commands:
    """What a launcher runs, in this process or another, here or elsewhere."""

    verb: str
    jobs: Sequence[Job]
    options: tuple[str, ...]
    directory: Path
    stop: Path
    owner: int  # the process that decides about stopping

    def __call__(self, config: DictConfig) -> int:
        job = self.jobs[config.index]
        command = [sys.executable, "-m", "diffussm", self.verb, *job.overrides, *self.options]
        log, title = job.directory / LOG, f"job {config.index + 1} of {len(self.jobs)}, {job.name}"
        if not self.stop.exists():
            note(f"{title}: begins, its output is in {log}")
        code = run_job(command, self.directory, log, self.stop, is_worker=os.getpid() != self.owner)
        note(f"{title}: exit code {code}")
        return code


def run(options: argparse.Namespace) -> int:
    """Refuse what cannot work, run the jobs, print the table; returns the greatest of their exit codes."""
    if find_place().address is not None:
        raise ConfigError(
            "-m: starts its own processes and cannot be one of several: run it without torchrun or srun, with "
            "trainer.num_processes=N for the processes of each run"
        )
    hydra = [override for override in options.overrides if override.startswith(("hydra.", "hydra/"))]
    for override in hydra:
        if not override.startswith(("hydra/launcher=", "hydra.launcher.")):
            raise ConfigError(f"{override}: of Hydra, -m takes hydra/launcher= and hydra.launcher.KEY= only")
    others = [override for override in options.overrides if override not in hydra]
    check_launcher(hydra)
    sweep, choices = expand(others, options.config_dir)
    for key in OWN_KEYS:
        if key in choices[0][0]:
            raise ConfigError(f"{key}: is not one of the choices: each job gets its own from them")
    root, jobs = (_plan_training if options.verb == "train" else _plan_measuring)(options, sweep, choices)
    if options.print_config:
        for job in jobs:
            print(job.name, *job.overrides)
        return 0
    jobs = list({job.name: job for job in jobs}.values())  # a choice that is written twice is one
    waiting = [job for job in jobs if not job.is_finished]
    codes = {job.name: 0 for job in jobs if job.is_finished}
    if waiting:
        codes |= _launch(options, waiting, root / LAUNCHER_DIRECTORY, hydra)
    return _report(options.verb, jobs, codes)


def _plan_training(
    options: argparse.Namespace, sweep: str | None, choices: Sequence[tuple[Mapping[str, str], list[str]]]
) -> tuple[Path, list[Job]]:
    """The sweep's directory, and a run for each of the choices, all found to be possible."""
    from diffussm.commands.train import find_changes, is_finished

    def composed(overrides: Sequence[str]) -> DictConfig:
        return compose("train", overrides, options.config_dir)

    chosen, overrides = choices[0]
    first = composed(overrides)
    root, title = first.run_dir, first.name
    if not any(override.startswith(("name=", "run_dir=")) for override in overrides):
        title = "_".join([*([] if "experiment" in chosen else [title]), sweep or "sweep"])
        root = composed([*overrides, f"name={title}"]).run_dir
    if (Path(root) / "config.yaml").exists():
        raise RunDirectoryError(f"run_dir={root}: holds a run of its own: choose another name for the sweep")
    jobs = []
    names = _names([chosen for chosen, _ in choices], LONGEST_NAME - len(title) - 1)
    for name, (_, overrides) in zip(names, choices, strict=True):
        directory = Path(root) / name
        overrides = [override for override in overrides if not override.startswith(("name=", "run_dir="))]
        job = Job(name, directory, (*overrides, f"name={title}-{name}", f"run_dir={quoted(directory)}"))
        config, run = composed(job.overrides), RunDirectory(directory)
        if config.trainer.dry_run:
            raise ConfigError("trainer.dry_run=true: tells of one run: leave out -m")
        run.check()
        find_changes(run, config)
        jobs.append(replace(job, is_finished=is_finished(run, config)))
    if not options.print_config:
        _record(
            Path(root) / "sweep.json", {job.name: chosen for job, (chosen, _) in zip(jobs, choices, strict=True)}
        )
    return Path(root), jobs


def _plan_measuring(
    options: argparse.Namespace, sweep: str | None, choices: Sequence[tuple[Mapping[str, str], list[str]]]
) -> tuple[Path, list[Job]]:
    """The directory of the first job, and a job of `evaluate` or `sample` for each of the choices."""
    from diffussm.commands.from_checkpoint import open_checkpoint, run_path

    jobs = []
    full = _names([chosen for chosen, _ in choices])
    names = _names([{key: value for key, value in chosen.items() if key != "checkpoint"} for chosen, _ in choices])
    for title, name, (_, overrides) in zip(full, names, choices, strict=True):
        if any(override.startswith("out=") for override in overrides):
            raise ConfigError("out: each job has its own: leave it out")
        if any(override.startswith("gate.junit=") for override in overrides) and len(choices) > 1:
            raise ConfigError(
                "gate.junit: each job would replace what another wrote there: leave it out, or measure each by "
                "a command of its own"
            )
        one = argparse.Namespace(verb=options.verb, overrides=overrides, config_dir=options.config_dir)
        directory = run_path(open_checkpoint(one)[0]) / options.verb / name
        out = directory / "results.json" if options.verb == "evaluate" else directory
        jobs.append(Job(title, directory, (*overrides, *([f"out={quoted(out)}"] if name else []))))
    return jobs[0].directory, jobs


def _names(choices: Sequence[Mapping[str, str]], longest: int = LONGEST_NAME) -> list[str]:
    """A short name for each of the choices, of letters, digits and - _ . alone; the same for equal ones only."""
    ends = Counter(key.rpartition(".")[2] for key in choices[0])
    names, meanings = [], []
    for chosen in choices:
        parts = []
        for key, value in chosen.items():
            end = key.rpartition(".")[2]
            parts.append(f"{_plain(end if ends[end] == 1 else key)}-{_plain(value)}")
        names.append("__".join(parts))
        meanings.append(json.dumps(dict(chosen), sort_keys=True))
    bearers = Counter(name for name, _ in set(zip(names, meanings, strict=True)))
    for index, (name, meaning) in enumerate(zip(names, meanings, strict=True)):
        if bearers[name] > 1 or len(name) > longest:
            names[index] = f"{name[: longest - 9]}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"
    return names


def _plain(text: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", text).strip("-")


def _record(path: Path, choices: Mapping[str, Mapping[str, str]]) -> None:
    """Add the choices of each job to sweep.json, for whoever compares them."""
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text())["jobs"]
        except (ValueError, KeyError, TypeError):
            raise RunDirectoryError(f"{path}: damaged: delete it") from None
    write_json(path, {"jobs": {**before, **choices}})


def _launch(
    options: argparse.Namespace, jobs: Sequence[Job], scratch: Path, hydra: Sequence[str]
) -> dict[str, int]:
    """Run the jobs; exit codes by name, of those that the launcher tells of."""
    stop = scratch.absolute() / f"stop-{uuid.uuid4().hex}"
    extra = ("--config-dir", str(options.config_dir)) if options.config_dir else ()
    commands = Commands(options.verb, tuple(jobs), extra, Path.cwd(), stop, os.getpid())

    def ask_to_stop() -> None:
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()

    try:
        with StopRequest(ask_to_stop):
            codes = launch_jobs(commands, len(jobs), scratch, hydra)
    except Exception as error:  # a launcher's own, and the jobs that it has lost may be found by what they wrote
        if isinstance(error, ConfigError):
            raise
        note(f"the launcher failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return {}
    stop.unlink(missing_ok=True)
    return {job.name: code for job, code in zip(jobs, codes, strict=True)}


def _report(verb: str, jobs: Sequence[Job], codes: Mapping[str, int]) -> int:
    """Print the table and the reason of every failure."""
    rows, worst = [], 0
    measured = {job.name: _measured(job) for job in jobs} if verb == "evaluate" else {}
    columns = list(dict.fromkeys(key for metrics in measured.values() for key in metrics))
    for job in jobs:
        state, images, known = "done", "", 1
        if verb == "train":
            state, images, known = "not started", "", Preempted.exit_code
            with contextlib.suppress(RunDirectoryError):
                report = read_report(job.directory)
                state, images, known = report.state, f"{report.images:,}", report.exit_code
        code = codes.get(job.name, known)
        if verb != "train" or state == "not started":
            state = {0: "done", Preempted.exit_code: "not finished"}.get(code, "failed")
        worst = max(worst, code)
        metrics = measured.get(job.name, {}) if code == 0 else {}
        cells = (
            [images] if verb == "train" else [f"{metrics[key]:.4g}" if key in metrics else "" for key in columns]
        )
        rows.append((job.name, state, *cells, str(code)))
    print_table(("job", "state", *(["images"] if verb == "train" else columns), "exit code"), rows)
    for job in jobs:
        if codes.get(job.name, 0) not in (0, Preempted.exit_code):
            note(f"{job.name}: {_last_line(job.directory / LOG)}")
    return worst


def _measured(job: Job) -> dict[str, float]:
    """The metrics of a job of `evaluate`, if it has got to any."""
    path = job.directory / "results.json"
    if not path.exists():  # of a job that has nothing but its checkpoint, in the run itself
        path = job.directory.parent / "results.json"
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(path.read_text())
        found = {**results.get("metrics", {}), **results.get("image_metrics", {})}
        return {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {}


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("diffussm: ")
    return "it has said nothing"
