"""Networks: the DiffuSSM denoiser with its state-space layer S4D, its classifier, and the baseline DiT."""

from diffussm.models.classifier import NoisyClassifier
from diffussm.models.diffussm import DiffuSSM
from diffussm.models.dit import DiT
from diffussm.models.ssm import S4D

__all__ = ["S4D", "DiT", "DiffuSSM", "NoisyClassifier"]
