"""Guidance: ways to make a network follow its labels, or its better self, more closely.

    ClassifierFree     away from what the network says without labels        (Ho & Salimans 2022)
    Classifier         up the gradient of a noise-aware classifier           (ADM, Dhariwal & Nichol 2021)
    Autoguidance       away from what a weaker network says                  (Karras et al. 2024)

A guidance is called with a network, how samplers see networks (`predictor_of`) and how to get at another network
(`load`); it gives the predictor to sample with, and the number of classes that it takes labels of. Where outputs
are extrapolated it does not matter whether they mean eps, x_0, v or a velocity: at one x_t these are affine
functions of each other, and the weights sum to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffussm.diffusion.process import Network, Prediction, Predictor, split_prediction

PredictorOf = Callable[[Network], Predictor]
Load = Callable[[str, str], Any]  # (checkpoint, weights) to a frozen network


class Guided(NamedTuple):
    """What a sampler needs: the guided predictor, and the number of classes (None: takes no labels)."""

    predict: Predictor
    num_classes: int | None


class Guidance(Protocol):
    """Makes a predictor of a network that has `num_classes` and `null_label`."""

    @property
    def scale(self) -> float: ...
    def __call__(self, network: Any, predictor_of: PredictorOf, load: Load) -> Guided: ...


@dataclass(frozen=True)
class ClassifierFree:
    """eps = eps_u + scale (eps_c - eps_u), the variance that of eps_c; both as one batch.

    Args:
        scale: 0 is the unconditional model, its variance included, 1 the conditional one (DiT's convention).
        channels: how many of the latent channels are guided; None: all. DiT's published table has 3 of 4.
        interval: timesteps (low, high) between which it is guided, elsewhere conditional (Kynkäänniemi et al.
            2024); None: everywhere.
    """

    scale: float = 1.0
    channels: int | None = None
    interval: Sequence[int | float] | None = None

    def __post_init__(self) -> None:
        _check(self.scale, self.channels, self.interval)

    def __call__(self, network: Any, predictor_of: PredictorOf, load: Load) -> Guided:
        """The guided network; the network itself at scale 1."""
        if self.scale == 1:
            return Guided(predictor_of(network), network.num_classes)
        null_label = network.null_label
        if null_label is None:
            raise ValueError(
                f"scale={self.scale}: needs a conditional model with class_dropout_prob above 0; 1 is no guidance"
            )

        guided = classifier_free_guidance(network, self.scale, null_label, self.channels, self.interval)
        return Guided(predictor_of(guided), network.num_classes)


@dataclass(frozen=True)
class Classifier:
    """scale times the gradient of log p(y | x_t), which each sampler applies as ADM's algorithm for it says.

    Algorithm 1 for `ddpm` (mean + scale Sigma grad), algorithm 2 for all others (eps - sqrt(1 - alphabar_t) scale
    grad). The model itself may be unconditional: the labels are the classifier's.

    Args:
        checkpoint: run directory or checkpoint of a classifier (`objective=classifier`).
        weights: of it: ema, ema_<decay>, ema_power_<sigma_rel>, posthoc_<sigma_rel> or model.
    """

    checkpoint: str
    scale: float = 1.0
    weights: str = "ema"

    def __post_init__(self) -> None:
        _check(self.scale)

    def __call__(self, network: Any, predictor_of: PredictorOf, load: Load) -> Guided:
        """The network's predictor with the classifier's gradient."""
        classifier = load(self.checkpoint, self.weights)
        if hasattr(classifier, "null_label"):
            raise ValueError(
                f"checkpoint={self.checkpoint}: is no classifier: train one with objective=classifier"
            )
        if network.num_classes not in (None, classifier.num_classes):
            raise ValueError(
                f"checkpoint={self.checkpoint}: knows {classifier.num_classes} classes, the model "
                f"{network.num_classes}: choose a classifier trained on the same classes"
            )
        predict = predictor_of(network)

        def guided(x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
            if y is None:
                raise ValueError("guidance needs labels")
            prediction = predict(x_t, t, None if network.num_classes is None else y)
            return prediction._replace(gradient=self.scale * log_probability_gradient(classifier, x_t, t, y))

        return Guided(guided, classifier.num_classes)


@dataclass(frozen=True)
class Autoguidance:
    """eps = eps_weak + scale (eps - eps_weak), the variance that of the model.

    Args:
        checkpoint: run directory or checkpoint of a weaker model of the same data: smaller, or trained for less.
        scale: 1 is the model, larger moves away from the weaker one.
        weights: of the weaker model: ema, ema_<decay>, ema_power_<sigma_rel>, posthoc_<sigma_rel> or model.
        channels, interval: as for `ClassifierFree`.
    """

    checkpoint: str
    scale: float = 2.0
    weights: str = "ema"
    channels: int | None = None
    interval: Sequence[int | float] | None = None

    def __post_init__(self) -> None:
        _check(self.scale, self.channels, self.interval)

    def __call__(self, network: Any, predictor_of: PredictorOf, load: Load) -> Guided:
        """The guided network."""
        weak = load(self.checkpoint, self.weights)
        if not hasattr(weak, "null_label"):
            raise ValueError(f"checkpoint={self.checkpoint}: is a classifier: choose guidance=classifier")
        if weak.num_classes != network.num_classes:
            raise ValueError(
                f"checkpoint={self.checkpoint}: knows {weak.num_classes} classes, the model "
                f"{network.num_classes}: choose a weaker model of the same data"
            )

        def guided(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            output = network(x_t, t, y)
            active = _active(t, self.interval)
            if not active.any():
                return output
            return extrapolate(weak(x_t, t, y), output, self.scale, x_t.shape[1], self.channels, active)

        return Guided(predictor_of(guided), network.num_classes)


def classifier_free_guidance(
    network: Network,
    scale: float,
    null_label: int,
    channels: int | None = None,
    interval: Sequence[int | float] | None = None,
) -> Network:
    """A network that says what `ClassifierFree` describes; at scale 0 everywhere, the unconditional one itself."""

    def unconditional(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return network(x_t, t, torch.full(x_t.shape[:1], null_label, device=x_t.device))

    if scale == 0 and channels is None and interval is None:
        return unconditional

    def guided(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            raise ValueError("guidance needs labels")
        active = _active(t, interval)
        if not active.any():
            return network(x_t, t, y)
        labels = torch.cat([y, torch.full_like(y, null_label)])
        output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        conditional, unconditional = output.chunk(2)
        return extrapolate(unconditional, conditional, scale, x_t.shape[1], channels, active)

    return guided


def extrapolate(
    start: Float[Tensor, "B *S"],
    end: Float[Tensor, "B *S"],
    scale: float,
    num_channels: int,
    channels: int | None,
    active: Tensor,
) -> Float[Tensor, "B *S"]:
    """start + scale (end - start) in the first `channels` predicted channels of active samples; else `end`."""
    if channels is not None and channels > num_channels:
        raise ValueError(f"channels={channels}: the latents have {num_channels}")
    source, _ = split_prediction(start, num_channels)
    value, variance_output = split_prediction(end, num_channels)
    moved = source + scale * (value - source)
    if channels is not None:
        moved = torch.cat([moved[:, :channels], value[:, channels:]], dim=1)
    moved = torch.where(active.reshape(-1, *[1] * (value.ndim - 1)), moved, value)
    return moved if variance_output is None else torch.cat([moved, variance_output], dim=1)


def log_probability_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    x_t: Float[Tensor, "B *S"],
    t: Tensor,
    y: Int[Tensor, "B"],
) -> Float[Tensor, "B *S"]:
    """The gradient of log p(y | x_t) with respect to x_t."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        log_p = classifier(x, t).log_softmax(dim=1).gather(1, y[:, None])
        return torch.autograd.grad(log_p.sum(), x)[0]


def _active(t: Tensor, interval: Sequence[int | float] | None) -> Tensor:
    if interval is None:
        return torch.ones_like(t, dtype=torch.bool)
    return (t >= interval[0]) & (t <= interval[1])


def _check(scale: float, channels: int | None = None, interval: Sequence[int | float] | None = None) -> None:
    if scale < 0:
        raise ValueError(f"scale={scale}: must be at least 0")
    if channels is not None and channels < 1:
        raise ValueError(f"channels={channels}: must be at least 1, or null for all")
    if interval is not None:
        is_pair = isinstance(interval, Sequence) and len(interval) == 2
        if not is_pair or not interval[0] <= interval[1]:
            raise ValueError(f"interval={interval}: must be two timesteps [low, high], or null")
