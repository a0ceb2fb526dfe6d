"""Whoever starts the processes of a job, it is the same run: SLURM, as its templates ask for it, and torchrun."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from test_trainer import fingerprint, records

SLURM = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
TEMPLATES = sorted(SLURM.glob("*.sbatch"))
LONGER = ("trainer.total_images=480", "trainer.log_every_images=16")

# What SLURM's own do, as far as the templates rely on it: a task each for SLURM_NTASKS, signals to all, and the
# highest of their exit codes; tasks that are left behind are killed, at once or when the wait is over.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
options = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--"))
words = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
deadline = None
while None in (codes := [task.poll() for task in tasks]):
    if deadline is None and any(code is not None for code in codes):
        deadline = time.monotonic() + float(options["wait"])
    if deadline and time.monotonic() > deadline or options["kill-on-bad-exit"] == "1" and any(codes):
        for task in tasks:
            task.kill()
    time.sleep(0.01)
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
case $1 in show) echo 127.0.0.1; echo elsewhere;; requeue) echo "$2" >> "$REQUEUED";; esac
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """SLURM's programs, and `diffussm`, on the PATH of a job of two tasks; returns what is queued again."""
    programs = tmp_path / "bin"
    programs.mkdir()
    install(programs / "srun", SRUN.format(python=sys.executable))
    install(programs / "scontrol", SCONTROL)
    install(programs / "diffussm", f'#!/bin/sh\nexec {sys.executable} -m diffussm "$@"\n')
    job = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued")}
    for name, value in {**job, **paths}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "requeued"


def command(path: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "diffussm", "train", *SMALL_RUN, f"run_dir={path}", "name=run", *overrides]


def wait_for_images(path: Path, images: int) -> None:
    log = path / "metrics.jsonl"
    while not (log.exists() and records(path) and records(path)[-1]["images"] >= images):
        time.sleep(0.05)


def install(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


def free_port() -> int:
    """Where the templates look for one: 20000 and the number of the job."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that `train` has started itself."""
    path = tmp_path_factory.mktemp("launchers") / "whole"
    result = subprocess.run(command(path, *LONGER, "trainer.num_processes=2"), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    return path


def test_a_job_of_slurm_is_the_same_run_over_its_time_limit(cluster, whole, tmp_path):
    path = tmp_path / "run"
    job = ["bash", str(SLURM / "train.sbatch"), *SMALL_RUN, f"run_dir={path}", "name=run", *LONGER]
    first = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
    wait_for_images(path, 96)
    found = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGUSR1)  # to srun, for its tasks
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 75 and said.count("stopped by signal") == 1, said
    assert cluster.read_text() == f"{os.environ['SLURM_JOB_ID']}\n"
    assert records(path)[-1]["images"] < 480
    again = subprocess.run(job, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "continues from" in again.stderr, again.stderr
    assert cluster.read_text().count("\n") == 1
    assert fingerprint(path) == fingerprint(whole) and records(path) == records(whole)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("code", "restarts", "lasted", "is_queued"),
    [(0, 0, 0, False), (2, 0, 0, False), (65, 0, 0, False), (74, 0, 0, False), (75, 0, 0, True), (75, 90, 0, True),
     (137, 0, 0, True), (137, 19, 0, True), (137, 20, 0, False), (137, 20, 700, True), (1, 0, 0, True)],
)  # fmt: skip
def test_what_another_start_would_change_is_queued_again(
    cluster, template, code, restarts, lasted, is_queued, tmp_path, monkeypatch
):
    is_queued &= (template.stem, code) != ("evaluate", 1)  # a gate's limit
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("SECONDS", str(lasted))
    tells = tmp_path / "told"
    stub = f'#!/bin/sh\necho "$@ $MASTER_ADDR" >> {tells}\nsleep 0.$SLURM_PROCID\nexit {code}\n'
    install(tmp_path / "bin" / "diffussm", stub)
    result = subprocess.run(["bash", str(template), "name=my run"], capture_output=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert cluster.exists() == is_queued
    assert tells.read_text().splitlines() == [f"{template.stem} name=my run 127.0.0.1"] * 2


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_ask_slurm_for_what_the_package_needs(template):
    assert subprocess.run(["bash", "-n", str(template)], check=False).returncode == 0
    asked = [line.split()[1] for line in template.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(asked)  # without B: to the tasks


def test_two_nodes_of_torchrun_are_the_same_run(whole, tmp_path):
    path, port = tmp_path / "run", free_port()
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    nodes = []
    for _ in range(2):
        nodes.append(
            subprocess.Popen([*agent, *command(path, *LONGER)[1:]], env=environment, stderr=subprocess.PIPE)
        )
        time.sleep(0.5)
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert fingerprint(path) == fingerprint(whole) and records(path) == records(whole)
