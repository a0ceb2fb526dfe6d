"""Thousands of steps with saves and workers: memory, open files and processes stay as they are."""

import json

import numpy as np
import pytest
from faults.runs import command


@pytest.mark.fault("G25")
@pytest.mark.parametrize("steps", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_nothing_grows_with_the_number_of_steps(jobs, tmp_path, figure, steps):
    overrides = (
        f"trainer.total_images={16 * steps}",
        "trainer.save_every_images=1600",
        "trainer.log_every_images=160",
        "trainer.num_workers=1",
    )
    job = jobs.run(*command(tmp_path, *overrides), faults=[("tell_memory", 20)])
    told = [json.loads(line.partition(" ")[2]) for line in job.said.splitlines() if line.startswith("MEMORY ")]
    told = [record for record in told if record[0] > steps // 3]  # by when everything has been needed once
    assert told[-1][0] == steps
    at, private, files, zombies = np.array(told).T
    slope = np.polyfit(at, private / 1024, 1)[0] * 100
    growth = (np.median(private[-5:]) - np.median(private[:5])) / 1024
    figure(
        f"{steps} steps: {slope:+.3f} MiB per 100 steps ({growth:+.2f} MiB in all), open files {files.min()} to "
        f"{files.max()}, {zombies.max()} zombies"
    )
    assert slope < (0.1 if steps >= 3000 else 0.5)  # a few hundred steps tell no finer
    assert files.max() - files.min() <= 1 and not zombies.any()
