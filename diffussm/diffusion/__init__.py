"""Diffusion: schedules, the Gaussian process, objectives, samplers and guidance over any callable."""
