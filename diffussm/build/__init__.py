"""From configuration to objects, the last before expensive work; the only caller of Hydra's `instantiate`."""

from diffussm.build.checks import check_latents, describe_fingerprint, recorded_autoencoder
from diffussm.build.costs import autoencoder_macs, complexity_of, training_flops_of
from diffussm.build.evaluating import PACKAGE_PREFIX, build_evaluation, build_extractor, shipped_path
from diffussm.build.instantiation import check_signature, construct, refuse_foreign_code
from diffussm.build.system import System, build_source, create_model
from diffussm.build.training import MAX_GRID_ROWS, build_trainer, is_in_parts
from diffussm.build.weights import check_device_name, choose_device, choose_weights, load_weights, read_weights

__all__ = [
    "MAX_GRID_ROWS",
    "PACKAGE_PREFIX",
    "System",
    "autoencoder_macs",
    "build_evaluation",
    "build_extractor",
    "build_source",
    "build_trainer",
    "check_device_name",
    "check_latents",
    "check_signature",
    "choose_device",
    "choose_weights",
    "complexity_of",
    "construct",
    "create_model",
    "describe_fingerprint",
    "is_in_parts",
    "load_weights",
    "read_weights",
    "recorded_autoencoder",
    "refuse_foreign_code",
    "shipped_path",
    "training_flops_of",
]
