"""Evaluation: features, exact statistics, metrics after ADM's evaluator, and generation by index."""

from diffussm.evaluation.metrics import frechet_distance

__all__ = ["frechet_distance"]
