"""What a notebook needs of a trained model: `load_checkpoint` and `sample`, each a call.

Settings are those of `diffussm sample`, and so are the images: the same seeds and settings give the same bits.
Whatever cannot work raises a ConfigError or another UserError, whose message is the line that the command prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffussm.build import System, load_weights
from diffussm.commands.from_checkpoint import build_system, configure
from diffussm.commands.sample import check_drawable, choose_classes
from diffussm.evaluation.streams import GeneratedStream
from diffussm.runtime.errors import ConfigError, note
from diffussm.training.checkpoint import Checkpoint, find_checkpoint

SETTINGS = ("sampler", "guidance", "sampling")  # what an override of `sample` may change


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: `weights` is the full name of those that its system's model has."""

    checkpoint: Checkpoint
    system: System
    weights: str

    @property
    def model(self) -> nn.Module:
        """The network, frozen: (x_t, t, y) to its prediction on latents."""
        return self.system.model


def load_checkpoint(
    path: str | Path, weights: str = "ema", device: str = "auto", overrides: Sequence[str] = ()
) -> Loaded:
    """The model of a run directory (its newest valid checkpoint) or of one checkpoint, with what sampling needs.

    Args:
        weights: ema (the first average), ema_<decay>, ema_power_<sigma_rel>, posthoc_<sigma_rel> or model.
        device: auto, cpu, cuda or cuda:N.
        overrides: more of `diffussm sample`, such as autoencoder.pretrained=DIR or trust_checkpoint=true.
    """
    checkpoint = find_checkpoint(Path(path), note)
    trained, _ = configure(checkpoint, "sample", ["checkpoint=here", *overrides])
    system = build_system(checkpoint, trained, device)
    return Loaded(checkpoint, system, load_weights(checkpoint, system.model, weights, "weights"))


def sample(
    loaded: Loaded,
    num_images: int | None = None,
    *,
    labels: Sequence[int] | None = None,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> Tensor:
    """Images, uint8 (num_images, C, H, W) on the CPU; image i depends on (seed, i) and its label alone.

    What is not given is as the run's configuration says.

    Args:
        num_images: None: one for each label, or 10 without labels.
        labels: of the images, in turn; None: the classes, at most the first ten.
        sampler: its name, such as ddim.
        num_steps: of the sampler.
        guidance: its scale; 1 is the conditional model.
        overrides: more of `diffussm sample`, such as sampler.eta=0.5 or sampling.batch_size=16.
    """
    if num_images is None:
        num_images = 10 if labels is None else len(labels)
    if num_images < 1:
        raise ConfigError(f"num_images={num_images}: must be at least 1")
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in SETTINGS or override.startswith(
            "sampling.weights="
        ):
            raise ConfigError(
                f"{override}: not a setting of sampling: use the arguments of sample, or of load_checkpoint"
            )
    named = {
        "sampler": sampler,
        "sampler.num_steps": num_steps,
        "guidance.scale": guidance,
        "sampling.seed": seed,
    }
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    check_drawable(loaded.checkpoint)
    choices = ["checkpoint=here", "trust_checkpoint=true", *given, *overrides]  # trusted when it was loaded
    _, config = configure(loaded.checkpoint, "sample", choices)
    generator = loaded.system.generator(loaded.model, config)
    classes = choose_classes(labels, "cyclic", generator.num_classes, "labels")
    stream = GeneratedStream(generator, num_images, "cyclic", classes)
    return torch.cat([batch.images for batch in stream.batches(range(num_images))])
