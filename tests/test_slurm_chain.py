"""The chain of SLURM jobs: what it asks sbatch for, and what it refuses before anything is queued."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "scripts" / "slurm"
SBATCH = """#!/bin/sh
for word; do printf '<%s>' "$word" >> "$QUEUED"; done; echo >> "$QUEUED"
echo "$((100 + $(wc -l < "$QUEUED")));cluster"
"""
DIFFUSSM = f'#!/bin/sh\necho "$@" >> "$CHECKED"\nexec {sys.executable} -m diffussm "$@"\n'
ENCODE = ("encode", "data=fake", "to=latents/of mine")
TRAIN = ("train", "--nodes=2", "experiment=digits", "name=mine")
EVALUATE = ("evaluate", "checkpoint=runs/mine")


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Run the script with stand-ins for SLURM; gives its result, what was queued and what was checked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, content in (("sbatch", SBATCH), ("diffussm", DIFFUSSM)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    told = {name: tmp_path / name.lower() for name in ("QUEUED", "CHECKED")}

    def run(*words: str) -> tuple[subprocess.CompletedProcess, list[str], list[str]]:
        for name, path in told.items():
            monkeypatch.setenv(name, str(path))
            path.write_text("")
        result = subprocess.run(
            ["bash", str(SLURM / "chain.sh"), *words], capture_output=True, text=True, timeout=120, check=False
        )
        return result, told["QUEUED"].read_text().splitlines(), told["CHECKED"].read_text().splitlines()

    return run


def test_each_stage_waits_for_the_one_before_it_to_end_well(chain):
    result, queued, checked = chain(*ENCODE, *TRAIN, *EVALUATE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["encode 101", "train 102", "evaluate 103"]
    after = "<--dependency=afterok:{}><--kill-on-invalid-dep=yes>"
    assert queued == [
        f"<--parsable><{SLURM}/encode.sbatch><data=fake><to=latents/of mine>",
        f"<--parsable>{after.format(101)}<--nodes=2><{SLURM}/train.sbatch><experiment=digits><name=mine>",
        f"<--parsable>{after.format(102)}<{SLURM}/evaluate.sbatch><checkpoint=runs/mine>",
    ]
    assert [line.split()[0] for line in checked] == ["encode", "train"]


def test_stages_that_are_done_are_left_out(chain):
    result, queued, _ = chain(*EVALUATE)
    assert result.returncode == 0, result.stderr
    assert queued == [f"<--parsable><{SLURM}/evaluate.sbatch><checkpoint=runs/mine>"]


def test_experiments_of_ones_own_are_found(chain, tmp_path):
    (tmp_path / "my own" / "experiment").mkdir(parents=True)
    (tmp_path / "my own" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
    result, queued, _ = chain("train", "--config-dir=my own", "data=digits", "experiment=mine")
    assert result.returncode == 0, result.stderr
    assert queued == [f"<--parsable><{SLURM}/train.sbatch><--config-dir=my own><data=digits><experiment=mine>"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "chain.sh: nothing to do"),
        (("train", "--config-dir", "mine"), "chain.sh: --config-dir: write --config-dir=DIR"),
        (("data=fake", *ENCODE), "chain.sh: data=fake: belongs to no stage"),
        ((*TRAIN, *ENCODE), "chain.sh: encode: comes too late"),
        ((*TRAIN, *TRAIN), "chain.sh: train: comes twice"),
        ((*ENCODE, "train", "experiment=digit"), "diffussm: experiment=digit: choose"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_told_before_anything_is_queued(chain, words, told):
    result, queued, _ = chain(*words)
    assert result.returncode == 2 and not queued
    assert result.stderr.startswith(told) and result.stderr.count("\n") == 1


def test_a_queue_that_refuses_ends_the_chain(chain, tmp_path):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    result, _, _ = chain(*TRAIN, *EVALUATE)
    assert result.returncode == 1 and result.stderr.count("no such partition") == 1 and not result.stdout


def test_it_is_sound_shell():
    assert subprocess.run(["bash", "-n", str(SLURM / "chain.sh")], check=False).returncode == 0
