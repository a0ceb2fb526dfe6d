"""The arithmetic of a plan: from counts, costs and rates to entries, each with its standing.

computed    follows from the configuration and the shapes of its networks alone
published   stands in someone's paper or data sheet (see `facts`)
given       by whoever plans
measured    on this machine, just now
assumed     by us

What follows from several numbers is as uncertain as the most uncertain of them, what follows from published ones
alone is computed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from diffussm.plan.facts import GIB, Archive, Training

Standing = Literal["computed", "published", "given", "measured", "assumed"]
CERTAINTY: tuple[Standing, ...] = ("computed", "published", "given", "measured", "assumed")
Unit = Literal[
    "images",
    "samples",
    "passes",
    "GMAC",
    "GFLOP",
    "Gflops",
    "images/s",
    "h",
    "device h",
    "GB",
    "GiB",
    "kWh",
    "%",
    "",
]
NPY_HEADER = 128  # bytes before the numbers of an array on disk
ADAM_MOMENTS = 2
BYTES = 4  # of a number in fp32


@dataclass(frozen=True)
class Entry:
    """A line of the plan: a quantity of a stage, and how it came about."""

    stage: str
    quantity: str
    value: float
    unit: Unit
    standing: Standing
    how: str = ""
    remark: str = ""  # too long for a table


@dataclass(frozen=True)
class Known:
    """A number with its standing."""

    value: float
    standing: Standing
    how: str = ""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, which reach a share `mfu` of their peak.

    peak: operations per second of one, by precision (fp32, bf16, fp16) and whether TF32 is on.
    memory_gib, watts: of one; None where nobody knows.
    half: the precision of 16 bits that they have.
    """

    title: str
    count: int
    mfu: Known
    peak: Callable[[str, bool], float]
    peak_standing: Standing
    memory_gib: float | None = None
    watts: float | None = None
    half: str = "bf16"

    def hours(self, flops: float, precision: str, tf32: bool) -> float:
        """For so many operations shared by all devices."""
        return flops / (self.peak(precision, tf32) * self.mfu.value * self.count) / 3600

    @property
    def standing(self) -> Standing:
        """Of times on it."""
        return weakest(self.mfu.standing, self.peak_standing)


def weakest(*standings: Standing) -> Standing:
    """The standing of what follows from numbers of these."""
    found = max(standings, key=CERTAINTY.index)
    return "computed" if found == "published" else found


def raw(archive: Archive | None, count: Known) -> Iterator[Entry]:
    """What has to be fetched and unpacked."""
    stage = "raw data"
    yield Entry(stage, "images", count.value, "images", count.standing, count.how)
    if archive is not None:
        size = archive.num_bytes / 1e9
        yield Entry(stage, "archives", size, "GB", "published", archive.source)
        yield Entry(stage, "unpacked", size, "GB", "assumed", "as large again; the archives can go then")


def latent_set_bytes(num_images: int, row_shape: Sequence[int], images_per_row: int, item: int, shard: int) -> int:
    """Of the arrays of a latent set: moments of every image in shards of so many, and labels."""
    moments = num_images * images_per_row * math.prod(row_shape) * item
    return moments + NPY_HEADER * -(-num_images // shard) + 8 * num_images + NPY_HEADER


def encoding(
    machine: Machine,
    count: Known,
    size: int,
    how_size: str,
    images_per_row: int,
    macs: Known | None,
    precision: str,
) -> Iterator[Entry]:
    """Images to a latent set. `macs` of the autoencoder's encoder on one image; None if nobody knows them."""
    stage = "encoding"
    yield Entry(stage, "latent set on disk", size / 1e9, "GB", weakest("computed", count.standing), how_size)
    if macs is None:
        return
    yield Entry(stage, "encoder, per image", macs.value / 1e9, "GMAC", macs.standing, macs.how)
    hours = machine.hours(2 * macs.value * images_per_row * count.value, precision, False)
    yield Entry(
        stage, "time", hours, "h", weakest(machine.standing, count.standing, macs.standing),
        f"{precision}, {'with' if images_per_row == 2 else 'without'} mirror images; reading not counted",
    )  # fmt: skip


def training(
    machine: Machine,
    *,
    macs: int,
    ssm_flops: int,
    flops: int,
    total_images: int,
    batch_size: int,
    precision: str,
    tf32: bool,
    recomputes: bool,
    encoder_macs: Known | None,
    encoder_precision: str,
) -> Iterator[Entry]:
    """The training itself.

    Args:
        macs, ssm_flops: of a forward pass of one image.
        flops: of a forward and backward pass of one image.
        encoder_macs: of the autoencoder, where it works in every step; None: it does not.
    """
    stage = "training"
    steps = -(-total_images // batch_size)
    yield Entry(stage, "images seen", total_images, "images", "computed", f"{steps:,} steps of {batch_size}")
    beside = f"and {ssm_flops / 1e9:,.3g} GFLOP of SSM" if ssm_flops else "dense layers and attention"
    yield Entry(stage, "forward pass, per image", macs / 1e9, "GMAC", "computed", beside)
    times = "4 forward passes (activation checkpointing)" if recomputes else "3 forward passes"
    of = f"{times}, SSM included" if ssm_flops else times
    yield Entry(stage, "forward and backward, per image", flops / 1e9, "GFLOP", "computed", of)
    hours, standing = machine.hours(total_images * flops, precision, tf32), machine.standing
    how = f"{precision}; loading and saving not counted"
    if encoder_macs is not None:
        hours += machine.hours(2 * encoder_macs.value * total_images, encoder_precision, False)
        standing, how = weakest(standing, encoder_macs.standing), f"{how}; the autoencoder encodes in every step"
    yield Entry(stage, "speed", total_images / hours / 3600, "images/s", standing, how)
    yield Entry(stage, "time", hours, "h", standing, how)


def compute(macs: int, total_images: int, published: Training | None) -> Iterator[Entry]:
    """All of a training in the unit of papers, a forward pass per image and a multiply-accumulate a Gflop."""
    stage = "training"
    total = total_images * macs / 1e9
    yield Entry(
        stage, "compute in the papers' unit", total, "Gflops", "computed", "images x GMAC of a forward pass"
    )
    if published is None:
        return
    each = published.gflops / published.num_images
    yield Entry(
        stage, "... published", published.gflops, "Gflops", "published",
        f"{published.source}: {published.num_images / 1e6:,.0f}M images, hence {each:.1f} each",
    )  # fmt: skip
    images, per_image = total_images / published.num_images - 1, macs / 1e9 / each - 1
    yield Entry(
        stage, "... computed against published", 100 * (total / published.gflops - 1), "%", "computed",
        f"images {images:+.1%}, per image {per_image:+.1%}", published.remark,
    )  # fmt: skip


def training_memory(
    parameters: int, num_averages: int, activation_bytes: int, num_shards: int = 1, num_parts: int = 1
) -> dict[str, int]:
    """Bytes on each device while a step runs: everything is in fp32 but the activations.

    Args:
        num_shards: devices that hold a model together.
        num_parts: passes in a step. Shards are summed in the last alone; until then a device has all gradients.
    """
    whole = BYTES * parameters
    share = -(-whole // num_shards)
    return {
        "weights": share,
        "gradients": share if num_parts == 1 else whole,
        "optimizer": ADAM_MOMENTS * share,
        "averages": num_averages * share,
        "activations": activation_bytes,
    }


def memory(machine: Machine, parts: Mapping[str, int], batch_size: int) -> Iterator[Entry]:
    """Whether a pass of `batch_size` images fits a device, and which would."""
    stage, total = "memory", sum(parts.values())
    for what, size in parts.items():
        of = f"of a pass of {batch_size} images, traced in shapes" if what == "activations" else "fp32"
        yield Entry(stage, what, size / GIB, "GiB", "computed", of)
    has = machine.memory_gib
    if has is None:
        yield Entry(stage, "on each device", total / GIB, "GiB", "computed", "without work space of libraries")
        return
    verdict = f"of {has:g} GiB" + ("; without work space of libraries" if total <= has * GIB else "")
    if total > has * GIB:
        fits = fitting_batch(has * GIB, parts, batch_size)
        remedy = (
            f"trainer.device_batch_size={fits}" if fits else "model.activation_checkpointing=true, or more memory"
        )
        verdict += f": does not fit: set {remedy}"
    yield Entry(stage, "on each device", total / GIB, "GiB", "computed", verdict)


def fitting_batch(limit: float, parts: Mapping[str, int], batch_size: int) -> int:
    """The largest power of two of images whose activations leave room for the rest; 0 if none does."""
    room = limit - sum(size for what, size in parts.items() if what != "activations")
    most = math.floor(room * batch_size / parts["activations"])
    return 2 ** (most.bit_length() - 1) if most > 0 else 0


def checkpoint_bytes(parameters: int, num_averages: int) -> int:
    """Of the tensors of one checkpoint: the weights, their averages, and the optimiser's two moments."""
    return BYTES * parameters * (1 + num_averages + ADAM_MOMENTS)


def checkpoints(
    size: int, keep: int, total_images: int, every: int, snapshots: int, snapshot_bytes: int
) -> Iterator[Entry]:
    """What a run leaves on disk: one more checkpoint than it keeps, while it publishes the newest."""
    stage = "checkpoints"
    yield Entry(stage, "one", size / 1e9, "GB", "computed", "weights, averages, moments, fp32")
    saves = -(-total_images // every)
    how = f"the newest {keep} of {saves:,}, and one in the making" if saves > keep else f"all {saves:,}"
    yield Entry(stage, "on disk", min(keep + 1, saves) * size / 1e9, "GB", "computed", how)
    if snapshots:
        how = f"{snapshots:,} snapshots for posthoc_<sigma_rel>, all kept"
        yield Entry(stage, "averages for later", snapshots * snapshot_bytes / 1e9, "GB", "computed", how)


def evaluating(
    machine: Machine,
    *,
    samples: Known,
    passes: float,
    how_passes: str,
    flops: int,
    decoder_macs: Known | None,
    decoder_precision: str,
    precision: str,
    tf32: bool,
    doubles: bool,
) -> Iterator[Entry]:
    """Samples for a table row.

    Args:
        passes: of the network for one sample. flops: of one of them.
        doubles: whether guidance, which is off, would double them.
    """
    stage = "evaluation"
    yield Entry(stage, "samples", samples.value, "samples", samples.standing, samples.how)
    yield Entry(stage, "passes of the network, per sample", passes, "passes", "computed", how_passes)
    decoding, standing = 0.0, weakest(machine.standing, samples.standing)
    if decoder_macs is not None:
        yield Entry(
            stage, "decoder, per sample", decoder_macs.value / 1e9, "GMAC", decoder_macs.standing, decoder_macs.how
        )
        decoding = machine.hours(2 * decoder_macs.value * samples.value, decoder_precision, False)
        standing = weakest(standing, decoder_macs.standing)
    drawing = machine.hours(samples.value * passes * flops, precision, tf32)
    how = f"{precision}{' with TF32' if tf32 else ''}; features not counted"
    yield Entry(stage, "time", drawing + decoding, "h", standing, how)
    if doubles:
        yield Entry(stage, "... with guidance", 2 * drawing + decoding, "h", standing, "twice the passes")
    if machine.peak(machine.half, tf32) > machine.peak(precision, tf32):
        faster = machine.hours(samples.value * passes * flops, machine.half, tf32) + decoding
        yield Entry(stage, "... in half precision", faster, "h", standing, f"sampling.precision={machine.half}")


def totals(machine: Machine, entries: Sequence[Entry], price_per_hour: float | None) -> Iterator[Entry]:
    """Sums over all stages."""
    stage = "whole job"
    times = [entry for entry in entries if entry.quantity == "time"]
    if not times:
        return
    hours, standing = sum(float(entry.value) for entry in times), weakest(*(entry.standing for entry in times))
    yield Entry(stage, "time", hours, "h", standing, ", then ".join(entry.stage for entry in times))
    device_hours = hours * machine.count
    yield Entry(stage, "device time", device_hours, "device h", standing, f"{machine.count} x {machine.title}")
    disk = [
        entry
        for entry in entries
        if entry.quantity in ("archives", "unpacked", "latent set on disk", "on disk", "averages for later")
    ]
    size = sum(float(entry.value) for entry in disk)
    of = ", ".join(dict.fromkeys(entry.stage for entry in disk))
    yield Entry(stage, "disk", size, "GB", weakest(*(entry.standing for entry in disk)), of)
    if machine.watts is not None:
        how = f"{machine.watts:g} W each, as rated; GPUs alone"
        yield Entry(
            stage, "energy", device_hours * machine.watts / 1000, "kWh", weakest(standing, "published"), how
        )
    if price_per_hour is not None:
        each = price_per_hour * machine.count
        shares = ", ".join(f"{entry.stage} {entry.value * each:,.0f}" for entry in times)
        how = f"{price_per_hour:g} for an hour of one, as given: {shares}"
        yield Entry(stage, "price", hours * each, "", weakest(standing, "given"), how)
