"""The way from noise to an image: what a checkpoint's sampler has, and what it expects, at some of its steps."""

import json
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffussm.build import load_weights
from diffussm.commands.from_checkpoint import build_system, digest, run_path
from diffussm.commands.sample import choose_stream, is_complete, request_of
from diffussm.data.sample_files import encode_png
from diffussm.data.samples import RECORD
from diffussm.diffusion.process import Prediction
from diffussm.runtime.run_dir import write_atomically, write_json
from diffussm.training.checkpoint import Checkpoint

NUM_SHOWN = 8  # steps of each image, the first and the last among them


def draw_denoising(checkpoint: Checkpoint, trained: DictConfig, config: DictConfig) -> tuple[Path, list[float]]:
    """The first images of a configuration of `sample` step by step: where they are, and the timesteps shown.

    Of image i at shown step s there are iiiiii-s-x_t.png, the noisy image, and iiiiii-s-x_0.png, what the guided
    network takes it for; iiiiii.png is the image. They are those that `sample` draws of the same configuration.
    """
    request = {**request_of(checkpoint, config), "shown_steps": NUM_SHOWN}
    out = run_path(checkpoint) / "samples" / f"{checkpoint.path.name}-{digest(request)}-steps"
    if is_complete(out, request):
        return out, json.loads((out / RECORD).read_text())["timesteps"]

    system = build_system(checkpoint, trained, config.device)
    weights = load_weights(checkpoint, system.model, config.sampling.weights)
    seen: list[tuple[float, Tensor, Tensor]] = []

    def watch(x_t: Tensor, t: Tensor, prediction: Prediction) -> None:
        seen.append((float(t[0]), x_t, prediction.x_0))

    generator = system.generator(system.model, config, watch=watch)
    stream = choose_stream(generator, config)
    write_json(out / RECORD, {"request": request, "weights": weights, "complete": False})
    timesteps: list[float] = []
    for batch in stream.batches(range(len(stream))):
        chosen = torch.linspace(0, len(seen) - 1, min(NUM_SHOWN, len(seen))).round().long().tolist()
        timesteps = [seen[step][0] for step in chosen]
        for shown, step in enumerate(chosen):
            _, x_t, x_0 = seen[step]
            for name, latents in (("x_t", x_t), ("x_0", x_0)):
                for index, image in zip(batch.indices, generator.to_pixels(latents).cpu(), strict=True):
                    write_atomically(out / f"{index:06d}-{shown}-{name}.png", encode_png(image))
        for index, image in zip(batch.indices, batch.images, strict=True):
            write_atomically(out / f"{index:06d}.png", encode_png(image))
        seen.clear()
    write_json(out / RECORD, {"request": request, "weights": weights, "timesteps": timesteps, "complete": True})
    return out, timesteps
