"""The arithmetic of a plan, checked against what it is about: files, trainings, papers."""

import pytest
import torch

from diffussm.data.encoding import Encoding
from diffussm.data.fake import Fake
from diffussm.plan import stages
from diffussm.plan.facts import ARCHIVES, GIB, GPUS, TRAININGS, find_archive, find_training
from diffussm.plan.stages import Known, Machine

TWO = Machine("GPU", 2, Known(0.5, "assumed"), lambda precision, tf32: 1e12, "published", 80, 400)
HOUR = 3600 * 1e12  # operations of the two in an hour
XL = ("DiffuSSM", 1152, 29, 1)


def by_name(entries) -> dict[str, stages.Entry]:
    return {entry.quantity: entry for entry in entries}


class Moments:
    """An encoder of latents (3, 2, 2), with or without a posterior."""

    scale, shift, fingerprint = 1.0, 0.0, {"kind": "test"}

    def __init__(self, is_stochastic: bool) -> None:
        self.is_stochastic = is_stochastic

    def latent_shape(self, image_shape):
        return (3, 2, 2)

    def encode(self, images):
        return torch.zeros(len(images), 6 if self.is_stochastic else 3, 2, 2)


@pytest.mark.parametrize(("is_stochastic", "flips", "dtype"), [(True, True, "fp16"), (False, False, "fp32")])
def test_a_latent_set_has_the_size_that_was_foreseen(tmp_path, is_stochastic, flips, dtype):
    source = Fake(11, resolution=8, horizontal_flip=flips)
    encoding = Encoding(source, Moments(is_stochastic), tmp_path / "set", dtype=dtype, shard_size=4)
    encoding.open()
    encoding.run()
    encoding.close()
    found = sum(path.stat().st_size for path in (tmp_path / "set").rglob("*.npy"))
    item = {"fp16": 2, "fp32": 4}[dtype]
    assert stages.latent_set_bytes(11, encoding.row_shape, 1 + flips, item, 4) == found


def test_imagenet_in_fp16_with_mirror_images_takes_42_gb():
    assert stages.latent_set_bytes(1_281_167, (8, 32, 32), 2, 2, 4096) == pytest.approx(41.99e9, rel=1e-3)


def test_memory_is_counted_in_copies_of_the_weights():
    parts = stages.training_memory(1000, num_averages=3, activation_bytes=77)
    assert parts == {
        "weights": 4000, "gradients": 4000, "optimizer": 8000, "averages": 12000, "activations": 77
    }  # fmt: skip
    assert stages.checkpoint_bytes(1000, num_averages=3) == 4000 * (1 + 3 + 2)


@pytest.mark.parametrize(("room", "fits"), [(10, 2), (39, 4), (40, 8), (4.9, 0), (-1, 0)])
def test_the_batch_that_fits_is_the_largest_power_of_two(room, fits):
    parts = stages.training_memory(10, 1, activation_bytes=160)  # 5 for each of 32 images
    rest = sum(parts.values()) - 160
    assert stages.fitting_batch(rest + room, parts, 32) == fits


def test_a_pass_that_does_not_fit_is_told_with_its_remedy():
    def told(gib: int) -> str:
        return by_name(stages.memory(TWO, stages.training_memory(0, 1, gib * GIB), 4))["on each device"].how

    assert told(80) == "of 80 GiB; without work space of libraries"
    assert told(81).endswith("does not fit: set trainer.device_batch_size=2")
    assert "activation_checkpointing=true" in told(400)


def train(**changed) -> dict[str, stages.Entry]:
    facts = {
        "macs": 10**9, "ssm_flops": 0, "flops": 6 * 10**9, "total_images": 600_000, "batch_size": 256,
        "precision": "bf16", "tf32": True, "recomputes": False, "encoder_macs": None, "encoder_precision": "fp32",
    }  # fmt: skip
    return by_name(stages.training(TWO, **{**facts, **changed}))


def test_hours_are_operations_by_rate():
    entries = train()
    assert entries["time"].value == pytest.approx(3600e12 / HOUR) and entries["time"].standing == "assumed"
    assert entries["speed"].value == pytest.approx(600_000 / 3600)
    assert entries["images seen"].how == "2,344 steps of 256"
    assert entries["forward and backward, per image"].how == "3 forward passes"
    assert train(ssm_flops=1)["forward and backward, per image"].how == "3 forward passes, SSM included"


def test_an_autoencoder_in_the_loop_takes_its_time():
    encoder = Known(1.5e9, "assumed")
    assert train(encoder_macs=encoder)["time"].value == pytest.approx(1.5)


def test_evaluation_adds_decoding_once_and_passes_by_guidance():
    entries = by_name(
        stages.evaluating(
            TWO, samples=Known(1000, "given"), passes=250, how_passes="", flops=HOUR // 250_000,
            decoder_macs=Known(HOUR / 2000, "computed"), decoder_precision="fp32", precision="fp32", tf32=False,
            doubles=True,
        )
    )  # fmt: skip
    assert entries["time"].value == pytest.approx(2) and entries["... with guidance"].value == pytest.approx(3)
    assert "... in half precision" not in entries  # which is no faster on this device


def test_the_whole_job_is_the_sum_of_its_stages():
    count = Known(1000, "published")
    entries = [
        *stages.raw(ARCHIVES["lsun_church"], count),
        *stages.encoding(TWO, count, 3 * 10**9, "", 2, Known(HOUR / 4000, "computed"), "fp32"),
        *train().values(),
        *stages.checkpoints(10**9, 2, 100, 30, snapshots=3, snapshot_bytes=10**9),
    ]
    totals = by_name(stages.totals(TWO, entries, price_per_hour=3.0))
    assert totals["time"].value == pytest.approx(2) and totals["device time"].value == pytest.approx(4)
    church = 2 * ARCHIVES["lsun_church"].num_bytes / 1e9  # as it comes, and unpacked
    assert totals["disk"].value == pytest.approx(church + 3 + 3 + 3) and totals["disk"].standing == "assumed"
    assert totals["disk"].how == "raw data, encoding, checkpoints"
    assert totals["energy"].value == pytest.approx(1.6) and totals["price"].value == pytest.approx(12)
    assert totals["price"].how.endswith("as given: encoding 6, training 6")


@pytest.mark.parametrize(("saves", "kept"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_no_more_checkpoints_are_on_disk_than_are_saved(saves, kept):
    entries = stages.checkpoints(10**9, 2, total_images=saves * 10, every=10, snapshots=0, snapshot_bytes=0)
    assert by_name(entries)["on disk"].value == kept


def test_what_follows_is_as_uncertain_as_the_most_uncertain():
    assert stages.weakest("published", "computed") == "computed"
    assert stages.weakest("given", "published") == "given"
    assert stages.weakest("measured", "assumed", "given") == "assumed"


@pytest.mark.parametrize(("pixels", "gmac", "difference"), [(256, 276.00, -1.5), (512, 1103.65, +3.5)])
def test_the_papers_totals_are_met_as_far_as_they_can_be(pixels, gmac, difference):
    published = find_training(XL, pixels)
    entries = by_name(stages.compute(round(gmac * 1e9), published.num_images, published))
    assert entries["... computed against published"].value == pytest.approx(difference, abs=0.05)
    assert "3.80 times" in entries["... computed against published"].remark


@pytest.mark.parametrize(("pixels", "gmac"), [(256, 118.62), (512, 524.5)])
def test_dits_totals_are_met(pixels, gmac):
    published = find_training(("DiT", 1152, 28, 2), pixels)
    entries = by_name(stages.compute(round(gmac * 1e9), published.num_images, published))
    assert abs(entries["... computed against published"].value) < 0.5


def test_a_length_of_ones_own_is_told_apart_from_the_network():
    entries = by_name(stages.compute(276 * 10**9, 330_000_000, find_training(XL, 256)))
    assert entries["... computed against published"].how == "images -50.0%, per image -1.5%"


def test_other_networks_have_no_published_training():
    assert find_training(("DiffuSSM", 768, 25, 1), 256) is None and len(TRAININGS) == 4


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_every_gpu_has_a_peak_for_what_it_can(gpu):
    assert gpu.peak("fp16", True) > gpu.peak("fp32", False) > 0
    assert gpu.memory_gib > 0 and gpu.watts > 0


@pytest.mark.parametrize(
    ("name", "archive"),
    [("latents/imagenet256", "imagenet"), ("DIR/bedroom_train_lmdb", "lsun_bedroom"),
     ("latents/lsun_church", "lsun_church"), ("latents/mine", None)],
)  # fmt: skip
def test_archives_are_known_by_the_names_of_directories(name, archive):
    assert find_archive(name) == ARCHIVES.get(archive)
