"""Shared by all tests: shapes of public signatures are checked at run time; one small run, one command line."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_table import (  # noqa: F401  (pytest finds them here)
    figure,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_logreport,
    pytest_terminal_summary,
)
from faults.jobs import Jobs
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes started by tests must not starve each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor tests that run side by side

# Whatever these modules' signatures say about shapes holds while the tests run.
SHAPED = (
    "models",
    "diffusion",
    "data.autoencoder",
    "data.decode",
    "evaluation.features",
    "evaluation.dino",
    "evaluation.inception",
    "evaluation.intervals",
    "evaluation.metrics",
    "evaluation.neighbours",
    "evaluation.statistics",
    "bench.baselines",
)
install_import_hook([f"diffussm.{name}" for name in SHAPED], "beartype.beartype")

# The smallest run that still exercises everything: a tiny model, few images, few steps.
SMALL_RUN = (
    "experiment=digits",
    "model.hidden_size=16",
    "model.depth=1",
    "model.d_state=4",
    "trainer.batch_size=16",
    "trainer.total_images=128",
    "trainer.save_every_images=32",
    "trainer.log_every_images=32",
    "trainer.sample_every_images=null",
    "trainer.warmup_images=0",
    "trainer.decay_images=0",
    "sampler.num_steps=2",
    "evaluation.num_samples=64",
)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def diffussm(in_tmp: Path) -> Callable[..., subprocess.CompletedProcess]:
    """The command line in a process of its own, in an empty directory."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "diffussm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Where jobs are started from, once for all tests."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.close()


@pytest.fixture
def jobs(nursery: Jobs) -> Iterator[Jobs]:
    """Starts commands as processes that can be killed; whatever a test leaves running is its failure."""
    yield nursery
    left = nursery.orphans()
    assert not left, f"processes outlive their job: {left}"
