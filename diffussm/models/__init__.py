"""Networks: the DiffuSSM denoiser with its state-space layer S4D, and the baseline DiT."""

from diffussm.models.diffussm import DiffuSSM
from diffussm.models.dit import DiT
from diffussm.models.ssm import S4D

__all__ = ["S4D", "DiT", "DiffuSSM"]
