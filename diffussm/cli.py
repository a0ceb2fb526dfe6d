"""The command line: verb -> configuration -> objects -> run -> exit code.

Heavy libraries are imported inside the verbs, so that `--help` answers at once and a mistyped key ends
before torch is loaded.
"""

import argparse
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffussm.runtime.errors import ConfigError, Preempted, RunDirectoryError, UserError
from diffussm.runtime.run_dir import RunDirectory, write_atomically, write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffussm.build import System
    from diffussm.data.images import ImageSource
    from diffussm.training.checkpoint import Checkpoint
    from diffussm.training.trainer import Trainer

VERBS = {
    "train": "train a model; the same command continues an interrupted run",
    "sample": "draw images from a checkpoint",
    "evaluate": "measure a checkpoint: FID, sFID, IS, precision, recall",
}

DESCRIPTIONS = {
    "train": """\
        Train a model. Everything is set by key=value overrides of one configuration:

          experiment=NAME               a complete recipe; what follows changes it
          name=NAME                     the run; its directory is runs/NAME (run_dir=DIR for another)
          model= data= optimizer=       choose between the options listed below
          model.hidden_size=128         any parameter of what was chosen
          trainer.batch_size=256        images per step (global)
          trainer.total_images=2M       length of training; suffixes k, M, Ki, Mi
          trainer.save_every_images=    interval of checkpoints (also sample_, log_)
          trainer.precision=bf16        bf16, fp16 or fp32
          trainer.device_batch_size=    split a step into several passes, to fit the memory
          evaluation=NAME               what `diffussm evaluate` will measure; none for nothing

        The run directory is a function of the configuration, so the same command again continues where the
        newest valid checkpoint left off, bit for bit. Exit codes: 0 done, 2 configuration, 65 data,
        70 diverged, 71 out of memory, 73 run directory, 74 I/O, 75 stopped by a signal (run it again).""",
    "sample": """\
        Draw images from a checkpoint and save them with a grid (rows = classes).

          checkpoint=PATH               a run directory (newest valid checkpoint) or one checkpoint
          num_images=100 classes=[3,7]  how many, of which classes
          sampler=ddim                  default: the sampler of the run's configuration
          sampler.num_steps=50 sampling.guidance_scale=1.5 sampling.seed=0 sampling.weights=ema
          out=DIR                       default: a directory under samples/ of the run

        Image i is a function of (sampling.seed, i).""",
    "evaluate": """\
        Generate images from a checkpoint and compare them with a reference; prints a table, writes results.json.

          checkpoint=PATH               a run directory (newest valid checkpoint) or one checkpoint
          evaluation.num_samples=1000   default: the evaluation of the run's configuration
          sampler= sampler.num_steps= sampling.guidance_scale= sampling.weights=
          out=FILE                      default: results.json of the run""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return _RUN[options.verb](options)
    except UserError as error:
        print("diffussm:", *str(error).split(), file=sys.stderr)  # one line, whatever it quotes
        return error.exit_code
    except KeyboardInterrupt:
        print("diffussm: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diffussm", description="Attention-free diffusion: train, sample, evaluate.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        command = verbs.add_parser(
            verb,
            help=summary,
            description=textwrap.dedent(DESCRIPTIONS[verb]),
            epilog=_describe_groups(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"diffussm {verb} [--config-dir DIR] [--print-config] [key=value ...]",
            allow_abbrev=False,
        )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
        command.add_argument("--config-dir", type=Path, help="a directory of your own configs/, searched too")
        command.add_argument(
            "--print-config", action="store_true", help="print the resolved configuration and do nothing"
        )
    return parser.parse_args(arguments)


def _describe_groups(verb: str) -> str:
    """The options of every group that the verb's root names, read from the files alone."""
    package = Path(__file__).resolve().parent
    configs = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    root = (configs / f"{verb}.yaml").read_text()
    lines = ["options of the groups:"]
    for group in sorted(path for path in configs.iterdir() if path.is_dir()):
        if f"- {group.name}:" in root:
            options = sorted(path.stem for path in group.glob("*.yaml"))
            lines.append(f"  {group.name + '=':<15}{' '.join(options)}")
    return "\n".join(lines)


def _train(options: argparse.Namespace) -> int:
    from diffussm.compose import compose

    config = compose("train", options.overrides, options.config_dir)
    if options.print_config:
        return _print_config(config)
    run = RunDirectory(Path(config.run_dir))
    run.check()
    _check_drift(run, config)
    status = run.read_status()
    if status and status["state"] == "finished" and status["images"] >= config.trainer.total_images:
        print(f"{run.path}: finished at {status['images']:,} images; nothing to do")
        return 0

    from diffussm.build import System, build_source, build_trainer, choose_device
    from diffussm.runtime.signals import StopRequest

    with StopRequest() as stop:
        source = build_source(config)
        system = System(config, source.image_shape, choose_device(config.device))
        trainer = build_trainer(system, source, run, lambda: stop, _note)
        len(source)  # reads the data, or says why it cannot, before anything is created
        run.open()
        try:
            _write_config(run, config)
            run.write_status("running")
            _summarize(config, source, trainer, run)
            trainer.run()
        except UserError as error:
            state = "preempted" if isinstance(error, Preempted) else "failed"
            run.write_status(
                state, images=trainer.images, step=trainer.step, exit_code=error.exit_code, message=str(error)
            )
            raise
        except BaseException as error:
            run.write_status("failed", images=trainer.images, step=trainer.step, exit_code=1, message=repr(error))
            raise
        run.write_status("finished", images=trainer.images, step=trainer.step, exit_code=0)
    print(f"{run.path}: finished at {trainer.images:,} images; pictures in {run.samples}")
    return 0


def _summarize(config: "DictConfig", source: "ImageSource", trainer: "Trainer", run: RunDirectory) -> None:
    from diffussm.training.optim import describe_groups

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch, part = config.trainer.batch_size, trainer.device_batch_size
    passes = -(-batch // part)
    found = trainer.checkpoints.paths()
    lines = [
        f"run          {run.path}" + (f" (continues from {found[-1].name})" if found else " (new)"),
        f"model        {config.model._target_.rpartition('.')[2]}, {parameters:,} parameters, "
        f"{config.trainer.precision} on {trainer.device}",
        f"data         {len(source):,} images {source.image_shape}, {source.num_classes or 'no'} classes",
        f"batch        {batch} images = {passes} x {min(part, batch)}; "
        f"{config.trainer.total_images:,} images = {-(-config.trainer.total_images // batch):,} steps",
        *(f"optimizer    {line}" for line in describe_groups(trainer.optimizer)),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _check_drift(run: RunDirectory, config: "DictConfig") -> None:
    """Refuse to continue a run under a configuration that would change its result."""
    from omegaconf import OmegaConf

    from diffussm.config import drift

    path = run.path / "config.yaml"
    if not path.exists():
        return
    before = OmegaConf.to_container(OmegaConf.load(path))
    after = OmegaConf.to_container(config, resolve=True)
    fixed, free = drift(before, after)  # type: ignore[arg-type]
    if fixed and not config.allow_config_change:
        raise ConfigError(
            f"{run.path} holds a run with another configuration ({'; '.join(fixed)}): choose another name, "
            "or allow_config_change=true to continue it all the same"
        )
    for line in fixed + free:
        _note(f"configuration changed: {line}")


def _write_config(run: RunDirectory, config: "DictConfig") -> None:
    from omegaconf import OmegaConf

    write_atomically(run.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())


def _open_checkpoint(options: argparse.Namespace) -> tuple["Checkpoint", "DictConfig", "DictConfig"]:
    """The checkpoint of `checkpoint=`, the configuration it was trained with, and this command's own."""
    from omegaconf import DictConfig, OmegaConf

    from diffussm.compose import compose
    from diffussm.training.checkpoint import find_checkpoint

    given = [value.partition("=")[2] for value in options.overrides if value.startswith("checkpoint=")]
    if not given:
        raise ConfigError("checkpoint: not set: add checkpoint=RUN_DIRECTORY")
    checkpoint = find_checkpoint(Path(given[-1]), _note)
    trained = OmegaConf.create(checkpoint.document("config"))
    assert isinstance(trained, DictConfig)
    groups: Mapping[str, Any] = {key: trained[key] for key in ("sampler", "sampling", "evaluation")}
    return checkpoint, trained, compose(options.verb, options.overrides, options.config_dir, groups)


def _system_of(checkpoint: "Checkpoint", trained: "DictConfig", device: str) -> "System":
    from diffussm.build import System, choose_device

    return System(trained, checkpoint.document("train_state")["data"]["image_shape"], choose_device(device))


def _sample(options: argparse.Namespace) -> int:
    checkpoint, trained, config = _open_checkpoint(options)
    if options.print_config:
        return _print_config(config)
    request = _request(checkpoint, config, ("num_images", "classes"))
    out = Path(config.out or _run_path(checkpoint) / "samples" / f"{checkpoint.path.name}-{_digest(request)}")
    if _is_done(out / "samples.json", request):
        print(f"{out}: holds these {config.num_images} images already; grid in {out / 'grid.png'}")
        return 0

    import torch
    from PIL import Image

    from diffussm.build import load_weights
    from diffussm.report.grid import save_grid
    from diffussm.training.logging import Progress

    system = _system_of(checkpoint, trained, config.device)
    weights = load_weights(checkpoint, system.model, config.sampling.weights)
    generator = system.generator(system.model, config.sampler, config.sampling)
    classes, columns, labels = _grid_layout(config, generator.num_classes)
    progress = Progress(config.num_images, 0, "img")
    images = []
    for batch in generator.generate(range(config.num_images), labels):
        images.append(batch.images)
        for index, image in zip(batch.indices, batch.images, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
            out.mkdir(parents=True, exist_ok=True)
            picture.save(out / f"{index:06d}.png")
        progress.advance(len(batch.indices))
    progress.close()
    everything = torch.cat(images)
    blank = torch.full_like(everything[:1], 255).expand(-len(everything) % columns, -1, -1, -1)
    rows = None if classes is None else [str(label) for label in classes]
    save_grid(torch.cat([everything, blank]), columns, out / "grid.png", rows)
    write_json(out / "samples.json", {"request": request, "weights": weights})
    print(f"{len(everything)} images in {out}; grid in {out / 'grid.png'}")
    return 0


def _grid_layout(config: "DictConfig", num_classes: int | None) -> tuple[list[int] | None, int, Any]:
    """(row classes, columns, labels of all images): as equal rows as `num_images` allows."""
    import torch

    if num_classes is None:
        if config.classes is not None:
            raise ConfigError(f"classes={config.classes}: the model is unconditional: leave it out")
        return None, max(1, round(config.num_images**0.5)), None
    classes = list(range(min(num_classes, 10))) if config.classes is None else list(config.classes)
    if not classes or not all(0 <= label < num_classes for label in classes):
        raise ConfigError(f"classes={classes}: each must lie in 0..{num_classes - 1}")
    columns = -(-config.num_images // len(classes))
    labels = torch.tensor([classes[index // columns] for index in range(config.num_images)])
    return classes[: -(-config.num_images // columns)], columns, labels


def _evaluate(options: argparse.Namespace) -> int:
    checkpoint, trained, config = _open_checkpoint(options)
    if options.print_config:
        return _print_config(config)
    if not config.evaluation:
        raise ConfigError("evaluation=none: nothing to measure: choose an evaluation")

    from diffussm.build import build_evaluation, load_weights
    from diffussm.evaluation.evaluator import table
    from diffussm.training.logging import Progress

    evaluation = build_evaluation(config)
    assert evaluation is not None
    request = {**_request(checkpoint, config, ("evaluation",)), **evaluation.record()}
    out = Path(config.out or _run_path(checkpoint) / "results.json")
    if _is_done(out, request):
        results = json.loads(out.read_text())
        print(f"{out}: measured already")
    else:
        system = _system_of(checkpoint, trained, config.device)
        weights = load_weights(checkpoint, system.model, config.sampling.weights)
        generator = system.generator(system.model, config.sampler, config.sampling)
        progress = Progress(evaluation.num_samples, 0, "img")
        metrics = evaluation.run(generator, progress.advance)
        progress.close()
        real = evaluation.real_against_real(generator.device)
        results = {"metrics": metrics, "real_against_real": real, "weights": weights, "request": request}
        write_json(out, results)
    rows = {f"{results['weights']}, {_describe_sampling(config)}": results["metrics"]}
    if results["real_against_real"]:
        rows["real against real"] = results["real_against_real"]
    print(table(rows))
    print(f"results      {out}")
    return 0


def _request(checkpoint: "Checkpoint", config: "DictConfig", keys: Sequence[str]) -> dict[str, Any]:
    """Everything that decides what a command makes, as JSON: two equal requests have one result."""
    from omegaconf import OmegaConf

    chosen = {key: config[key] for key in ("sampler", "sampling", *keys)}
    settings = OmegaConf.to_container(OmegaConf.create(chosen), resolve=True)
    assert isinstance(settings, dict)
    return {
        "checkpoint": {"path": str(checkpoint.path), "sha256": checkpoint.sha256},
        **{str(key): value for key, value in settings.items()},
    }


def _is_done(path: Path, request: Mapping[str, Any]) -> bool:
    """Whether `path` records the result of this very request; where a checkpoint lies does not matter."""

    def essence(record: Mapping[str, Any]) -> dict[str, Any]:
        return {**record, "checkpoint": record["checkpoint"]["sha256"]}

    if not path.exists():
        return False
    try:
        return essence(json.loads(path.read_text())["request"]) == essence(request)
    except (ValueError, KeyError, TypeError):
        raise RunDirectoryError(f"{path}: exists and is not ours: move it away or set out=") from None


def _digest(request: Mapping[str, Any]) -> str:
    essence = {**request, "checkpoint": request["checkpoint"]["sha256"]}
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()[:8]


def _run_path(checkpoint: "Checkpoint") -> Path:
    """The run directory of a checkpoint, or its own directory where it lies outside one."""
    parent = checkpoint.path.resolve().parent
    run = parent.parent if parent.name == "checkpoints" else checkpoint.path.resolve()
    return Path(os.path.relpath(run))


def _describe_sampling(config: "DictConfig") -> str:
    sampler = config.sampler._target_.rpartition(".")[2]
    return f"{sampler} {config.sampler.get('num_steps')} steps, guidance {config.sampling.guidance_scale:g}"


def _print_config(config: "DictConfig") -> int:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0


def _note(line: str) -> None:
    print(f"diffussm: {line}", file=sys.stderr, flush=True)


_RUN = {"train": _train, "sample": _sample, "evaluate": _evaluate}

if __name__ == "__main__":
    sys.exit(main())
