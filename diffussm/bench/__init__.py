"""Measurements of speed and memory against textbook baselines: what `diffussm bench` runs."""
