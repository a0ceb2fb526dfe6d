"""The configuration's own schema: dataclasses for our numbers, and the names that some of them may take.

Choices between classes (model, data, ...) are Hydra groups whose keys are constructor parameters; `build`
checks them against the constructors. Everything else is typed here. Every field says whether it may change
when a run is resumed: `fixed` fields change the result, `free` ones do not.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

Images = Union[int, str]  # noqa: UP007  (OmegaConf reads typing.Union)


def fixed(default: Any = MISSING) -> Any:
    """A field that must keep its value when a run is resumed."""
    return _marked(default, "fixed")


def free(default: Any = MISSING) -> Any:
    """A field that may change when a run is resumed."""
    return _marked(default, "free")


def _marked(default: Any, resume: str) -> Any:
    if isinstance(default, type):
        return field(default_factory=default, metadata={"resume": resume})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"resume": resume})
    return field(default=default, metadata={"resume": resume})


@dataclass
class TrainerConfig:
    """The training loop. Counts of images accept suffixes: 400k, 2M, 64Ki, 1Mi."""

    batch_size: int = fixed(256)  # images per optimiser step, over all devices
    total_images: Images = free("102400k")  # where training ends (DiT: 400k steps of 256)
    save_every_images: Images = free("2560k")
    log_every_images: Images = free("25600")
    sample_every_images: Images | None = free("2560k")  # sample grids; null: only at the end
    warmup_images: Images = fixed(0)
    decay_images: Images = fixed(0)  # linear decay to 0 over the last so many images
    max_grad_norm: float | None = fixed(None)
    ema_decays: list[float] = fixed([0.9999])  # sampling uses the first
    ema_power: list[float] = fixed(
        []
    )  # more averages, whose lengths are these shares of the run (EDM2's sigma_rel)
    ema_snapshot_every_images: Images | None = free(
        None
    )  # keep those averages for posthoc_<sigma_rel>; null: never
    precision: str = fixed("bf16")  # bf16, fp16 or fp32
    tf32: bool = fixed(True)  # round factors of what is fp32 to 10 bits on a GPU, as bf16 rounds them to 7
    compile: bool = free(False)  # torch.compile of the model's blocks; rounds differently, no more coarsely
    device_batch_size: int | None = free(None)  # most images in one forward pass; null: all of a process's
    num_processes: int | None = free(
        None
    )  # one per GPU, started here; null: this one, or those of torchrun or srun
    parallel: str = free(
        "ddp"
    )  # ddp: every process has the whole model; fsdp: a part each, for what fits no device
    max_restarts: int = free(3)  # of num_processes in a row, when one is lost
    timeout_seconds: float = free(1800.0)  # a process that others wait for longer is taken for lost
    keep_checkpoints: int = free(2)
    keep_best: bool = free(True)  # and, as best/, the one with the least first metric of the evaluation, FID
    num_workers: int = free(0)  # processes that read images; 0 reads in the main process
    dry_run: bool = free(False)  # say what the run would be, need nothing for it, and create nothing
    profile: bool = free(False)  # write profile/profile.md and profile/trace.json after some steps, once


@dataclass
class SamplingConfig:
    """How images are generated, beside the sampler itself."""

    batch_size: int = free(64)
    seed: int = free(0)
    weights: str = free("ema")  # of sample and evaluate: ema (the first average), one of WEIGHTS
    precision: str = free("fp32")
    tf32: bool = free(False)  # as trainer.tf32


@dataclass
class TrainConfig:
    """`diffussm train`."""

    name: str = fixed()
    seed: int = fixed(0)
    run_dir: str = free("runs/${name}")
    init_from: str | None = fixed(
        None
    )  # a run, checkpoint or file whose weights are fine-tuned; read once, at first
    init_weights: str = fixed("ema")  # of a run or checkpoint: ema (its first average), ema_<decay> or model
    device: str = free("auto")  # auto, cpu, cuda, cuda:1, ...
    allow_config_change: bool = free(False)  # resume although a fixed key has changed
    model: Any = fixed()
    data: Any = fixed()
    autoencoder: Any = fixed()
    diffusion: Any = fixed()
    objective: Any = fixed()
    optimizer: Any = fixed()
    trainer: TrainerConfig = fixed(TrainerConfig)
    sampler: Any = free()  # empty: no samples are drawn in training
    guidance: Any = free()
    sampling: SamplingConfig = free(SamplingConfig)
    evaluation: Any = free()
    logger: Any = free()  # of what metrics.jsonl holds, by name; one or several


@dataclass
class EncodeConfig:
    """`diffussm encode`."""

    to: str = free()  # the directory of the latent set
    data: Any = free()
    autoencoder: Any = free()
    batch_size: int = free(32)  # images in one pass of the autoencoder
    dtype: str = free("fp16")  # of the stored moments: fp16 or fp32
    shard_size: int = free(4096)  # images of the source in one file
    num_workers: int = free(4)  # processes that read images, for each one that encodes
    device: str = free("auto")


@dataclass
class SampleConfig:
    """`diffussm sample`."""

    checkpoint: str = free()  # a run directory (its newest checkpoint) or one checkpoint
    trust_checkpoint: bool = free(False)  # build classes from outside diffussm that it names
    out: str | None = free(None)  # null: samples/<...> in the run directory
    device: str = free("auto")
    num_processes: int | None = free(None)  # started here; null: this one, or those of torchrun or srun
    num_images: int = free(100)
    classes: list[int] | None = free(None)  # rows of the grid; null: all classes, if labels=cyclic at most 10
    labels: str = free("cyclic")  # one of LABELS
    format: str = free("png")  # one of FORMATS
    range_size: int = free(256)  # images that are finished at once; those of a tar file
    autoencoder: Any = free()  # the one that it was trained with, wherever that is now
    sampler: Any = free()
    guidance: Any = free()
    sampling: SamplingConfig = free(SamplingConfig)


# On which side of its limit a metric must stay; fid_inf is there under evaluation.extrapolate.
GATED = {
    "fid": "max", "fid_inf": "max", "sfid": "max", "is": "min", "precision": "min", "recall": "min", "kid": "max",
    "density": "min", "coverage": "min", "class_agreement": "min", "vlb": "max", "inversion": "max", "loss": "max",
}  # fmt: skip


@dataclass
class _GateConfig:
    relative_to: str | None = free(None)  # a baseline, than whose mean no metric may be worse ...
    deviations: float = free(6.0)  # ... by more than so many standard deviations of its results or its tolerance
    add_to: str | None = free(None)  # the baseline that this result is added to, made if it is not there
    junit: str | None = free(None)  # a JUnit file of the verdicts, replaced
    summary: str | None = free(None)  # a Markdown file that the verdicts are appended to


# `diffussm evaluate` ends with exit code 1 if a metric is beyond its limit (fid_max, is_min, ...), or worse than
# the baseline's mean by more than its deviations and its tolerance (fid_tolerance, ...) allow.
GateConfig = dataclasses.make_dataclass(
    "GateConfig",
    [
        *((f"{name}_{side}", Union[float, None], free(None)) for name, side in GATED.items()),  # noqa: UP007
        *((f"{name}_tolerance", Union[float, None], free(None)) for name in GATED),  # noqa: UP007
    ],
    bases=(_GateConfig,),
)


@dataclass
class EvaluateConfig:
    """`diffussm evaluate`."""

    checkpoint: str | None = free(None)  # of these three, one
    checkpoints: str | None = free(None)  # a pattern that names several, such as RUN/checkpoints/*
    samples: str | None = free(None)  # a folder of images, an npz, a tar file, what `sample` has written
    trust_checkpoint: bool = free(False)  # build classes from outside diffussm that a checkpoint names
    out: str | None = free(None)  # null: results.json in the run directory, or beside the samples
    device: str = free("auto")
    num_processes: int | None = free(None)  # started here; null: this one, or those of torchrun or srun
    labels: str = free("balanced")  # of generated images, one of LABELS
    range_size: int = free(256)  # images whose features are finished at once
    keep_features: bool = free(False)  # leave the features of all images on the disk
    metrics: list[str] | None = free(None)  # of METRICS; null: all that need samples only
    likelihood_images: int | None = free(None)  # how many images vlb, inversion and loss see; null: all
    autoencoder: Any = free()
    sampler: Any = free()
    guidance: Any = free()
    sampling: SamplingConfig = free(SamplingConfig)
    evaluation: Any = free()
    data: Any = free()  # of vlb, inversion and loss
    gate: Any = free(GateConfig)


@dataclass
class ImportConfig(TrainConfig):
    """`diffussm import`: the configuration of a run that begins with the imported weights."""

    image_shape: list[int] | None = free(None)  # (C, H, W); null: what the autoencoder decodes to


@dataclass
class ExportConfig:
    """`diffussm export`."""

    checkpoint: str = free()
    trust_checkpoint: bool = free(False)  # build classes from outside diffussm that a checkpoint names
    layout: str = free("pipeline")  # pipeline, official or diffusers
    weights: str = free("ema")  # ema (the first average), one of WEIGHTS
    autoencoder: Any = free()  # of layout=pipeline
    to: str | None = free(None)  # null: export/<...> in the run directory


@dataclass
class StatsConfig:
    """`diffussm stats`."""

    to: str = free()  # the npz file
    data: Any = free()
    evaluation: Any = free()  # whose network measures the images
    num_images: int = free(10_000)  # stored beside the statistics, which are those of all images
    seed: int = free(0)  # of their choice
    batch_size: int = free(64)  # images in one pass of the network
    num_workers: int = free(4)  # processes that read images; 0 reads in the main process
    device: str = free("auto")


@dataclass
class InspectConfig:
    """`diffussm inspect`."""

    data: Any = free()
    autoencoder: Any = free()
    out: str | None = free(None)  # null: inspect/<...>
    examined: int | None = free(1000)  # images that are looked at; null: all
    num_images: int = free(64)  # pictures in the grids
    seed: int = free(0)  # of the choice of both
    seconds: float = free(3.0)  # for which the loader is timed; 0: it is not
    batch_size: int = free(32)
    num_workers: int = free(4)  # processes that read images; 0 reads in the main process
    device: str = free("auto")


@dataclass
class ComplexityConfig:
    """`diffussm complexity`."""

    model: Any = free(None)  # null: every preset but the tiny ones
    resolutions: list[int] = free([256, 512, 1024])  # of images, in pixels; latents are an eighth of it


@dataclass
class PlanConfig(TrainConfig):
    """`diffussm plan`: the configuration of the run that is planned."""

    gpus: int = free(8)  # that share each stage
    gpu: str = free("a100")  # one of GPUS in plan/facts.py, or cpu: this machine
    mfu: float | None = free(None)  # the share of their peak that is reached; null: 0.35 is assumed
    price_per_hour: float | None = free(None)  # of one GPU; null: no prices
    archive: str | None = free(None)  # of ARCHIVES in plan/facts.py; null: the one that data.path is called after
    num_images: int | None = free(None)  # of the data set; null: counted, or the archive's
    dtype: str = free("fp16")  # of the stored moments, as of `diffussm encode`
    num_samples: int | None = free(None)  # null: those of the evaluation; without one, 50,000 are assumed
    json: bool = free(False)  # print JSON, not a table


@dataclass
class SchedulesConfig:
    """`diffussm schedules`."""

    diffusion: Any = free(None)  # null: every preset that has a noise schedule
    out: str = free("schedules.png")  # the plot; .png, .svg or .pdf


@dataclass
class CompareConfig:
    """`diffussm compare`."""

    runs: list[str] = free([])  # run directories, or directories that hold some
    out: str | None = free(None)  # null: compare/ in the directory that holds the runs
    match: str | None = free(None)  # read the runs at equal terms, of MATCHES; null: each at its end
    tolerance: float = free(0.05)  # of match=parameters: by what share they may differ
    drawn_images: int = free(20)  # of each run, from the same noise and labels; 0: none
    trust_checkpoint: bool = free(False)  # build classes from outside diffussm that a checkpoint names
    device: str = free("auto")


@dataclass
class ReportConfig(CompareConfig):
    """`diffussm report`."""

    out: str | None = free(None)  # null: report/ in the run, or in the directory that holds the runs
    drawn_images: int = free(80)
    denoising_images: int = free(4)  # of these, how many are shown step by step; 0: none


@dataclass
class BenchConfig:
    """`diffussm bench`."""

    suites: list[str] | None = free(None)  # of BENCH_SUITES; null: all but scaling, xl on a GPU only
    lengths: list[int] = free([256, 1024, 4096, 16384])  # tokens; squares of even numbers
    batch_size: int = free(4)
    hidden_size: int = free(384)  # a multiple of 64, the width of an attention head
    d_state: int = free(64)
    depth: int = free(13)  # blocks of the DiffuSSM models; DiT has one less
    repetitions: int = free(9)  # of every call, at most
    seconds: float = free(10.0)  # for the repetitions of one call, at most; one is always made
    call_limit_seconds: float = free(120.0)  # skip calls that may take longer, judged by the length before
    memory_limit_gib: float | None = free(None)  # skip calls that need more; null: 12, or 90 % of a GPU's
    device: str = free("cpu")
    precision: str | None = free(None)  # fp32 or bf16 (autocast); null: bf16 on a GPU
    compile: bool | None = free(None)  # torch.compile; null: on a GPU
    keep_freed_memory: bool = free(False)  # measure with the allocator set as `train` sets it, not as it comes
    resolutions: list[int] = free([256, 512, 1024, 2048])  # of the suite scaling: of images, in pixels
    out: str = free("bench")  # directory of bench.json and bench.md


LABELS = ("cyclic", "balanced", "drawn")  # see evaluation.generate.choose_labels
FORMATS = ("png", "npz", "tar")
WEIGHTS = "ema, ema_<decay>, ema_power_<sigma_rel>, posthoc_<sigma_rel> or model"
SAMPLE_METRICS = ("fid", "sfid", "is", "precision", "recall", "kid", "density", "coverage", "class_agreement")
MODEL_METRICS = ("vlb", "inversion", "loss")  # of real images
METRICS = (*SAMPLE_METRICS, *MODEL_METRICS)
MATCHES = ("parameters", "compute", "time", "images")
BENCH_SUITES = (
    "layer", "convolution", "block", "model", "dit", "sampling", "gemm", "xl", "data", "trainer", "evaluation",
    "scaling",
)  # fmt: skip
ROOTS = {
    "train": TrainConfig,
    "encode": EncodeConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "stats": StatsConfig,
    "inspect": InspectConfig,
    "complexity": ComplexityConfig,
    "plan": PlanConfig,
    "schedules": SchedulesConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "bench": BenchConfig,
}


def register() -> None:
    """Make the schemas known to Hydra, as `<verb>_schema`."""
    store = ConfigStore.instance()
    for verb, schema in ROOTS.items():
        store.store(name=f"{verb}_schema", node=schema)
