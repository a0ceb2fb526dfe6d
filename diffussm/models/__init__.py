"""Networks: the state-space layer S4D and the DiffuSSM denoiser built from it."""

from diffussm.models.diffussm import DiffuSSM
from diffussm.models.ssm import S4D

__all__ = ["S4D", "DiffuSSM"]
