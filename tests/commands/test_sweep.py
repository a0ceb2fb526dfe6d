"""-m: what is refused, where jobs go, what is run again, and how a sweep ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN
from PIL import Image

from diffussm.cli import main
from diffussm.commands import sweep
from diffussm.commands.sweep import _names
from diffussm.runtime.run_dir import write_json

TRAIN = ("train", "-m", *SMALL_RUN)


@pytest.fixture
def ran(monkeypatch, in_tmp) -> list[tuple[str, ...]]:
    """The commands of jobs, none of which is really run; a seed of 7 fails."""
    commands: list[tuple[str, ...]] = []

    def pretend(command, directory, log, stop, *, is_worker):
        commands.append(tuple(command))
        (directory / log).parent.mkdir(parents=True, exist_ok=True)
        (directory / log).write_text("diffussm: first\n\ndiffussm: data: is gone\n")
        return 65 if "seed=7" in command else 0

    monkeypatch.setattr(sweep, "run_job", pretend)
    return commands


REFUSED = [
    (("trainer.batch_size=8",), "-m: there is nothing to choose from"),
    (("seed=interval(0,1)",), "seed=interval(0,1): is no list of choices"),
    (("seed=0,1", "trainer.batch_sise=8"), "trainer.batch_sise: no such key (did you mean batch_size?)"),
    (("seed=0,-1",), "seed=-1: must be at least 0"),
    (("model=diffussm_tiny,dit_tinny",), "did you mean dit_tiny?"),
    (("sweep=hourglas",), "sweep=hourglas: choose direction"),
    (("name=a,b",), "name: is not one of the choices"),
    (("seed=0,1", "hydra/launcher=nowhere"), "hydra/launcher=nowhere: no such launcher"),
    (("seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_job=2"), "Key 'n_job' not in"),
    (("seed=0,1", "hydra/sweeper=optuna"), "hydra/sweeper=optuna: of Hydra, -m takes hydra/launcher="),
    (("seed=0,1", "trainer.dry_run=true"), "trainer.dry_run=true: tells of one run: leave out -m"),
    (("seed=0,1", "run_dir=file"), "run_dir=file"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_before_any_job(overrides, says, ran, in_tmp, capsys):
    Path("file").touch()
    code = main([*TRAIN, *overrides])
    error = capsys.readouterr().err
    assert code in (2, 73) and says in error and error.count("\n") == 1
    assert not ran and [path.name for path in in_tmp.iterdir()] == ["file"]


@pytest.mark.parametrize("override", ["seed=0,1", "model=diffussm_tiny,dit_tiny", "sweep=hourglass"])
def test_several_values_without_m_are_refused(override, in_tmp, capsys):
    assert main(["train", *SMALL_RUN, override]) == 2
    assert f"{override}: makes several runs: add -m" in capsys.readouterr().err


def test_torchrun_around_a_sweep_is_refused(ran, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main([*TRAIN, "seed=0,1"]) == 2
    assert "trainer.num_processes=N" in capsys.readouterr().err and not ran


def test_a_run_of_the_same_name_is_not_written_into(ran, capsys):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").touch()
    assert main([*TRAIN, "name=mine", "seed=0,1"]) == 73
    assert "run_dir=runs/mine: holds a run of its own" in capsys.readouterr().err


def test_jobs_are_named_for_their_choices_and_the_worst_of_them_is_told(ran, capsys):
    assert main([*TRAIN, "sweep=hourglass", "model.patch_size=2", "seed=3,7"]) == 65
    out, error = capsys.readouterr()
    names = [f"hourglass_ratio-{ratio}__seed-{seed}" for ratio in (1, 2, 4) for seed in (3, 7)]
    for name, command in zip(names, ran, strict=True):
        assert f"run_dir='runs/digits_hourglass/{name}'" in command and f"name=digits_hourglass-{name}" in command
        assert "model.patch_size=2" in command
    assert [line.split()[1] for line in out.splitlines()[2:]] == names
    assert [line.split()[-2] for line in out.splitlines()[2:]] == ["0", "65"] * 3
    assert error.count("seed-7: data: is gone") == 3
    jobs = json.loads(Path("runs/digits_hourglass/sweep.json").read_text())["jobs"]
    assert jobs[names[0]] == {"model.hourglass_ratio": "1", "seed": "3"}


def test_a_second_sweep_adds_to_the_first(ran):
    main([*TRAIN, "name=both", "seed=0,1"])
    main([*TRAIN, "name=both", "model.bidirectional=choice(false)", "seed=0,1"])
    assert len(json.loads(Path("runs/both/sweep.json").read_text())["jobs"]) == 4


def test_a_choice_that_is_written_twice_is_one_job(ran, capsys):
    assert main([*TRAIN, "seed=0,1,0"]) == 0
    assert len(ran) == 2 and capsys.readouterr().out.count("seed-0") == 1


def test_names_are_short_plain_and_different():
    assert _names([{"model.depth": "1", "data.depth": "2"}]) == ["model.depth-1__data.depth-2"]
    assert _names([{"guidance.interval": "[1, 2]"}, {"guidance.interval": "null"}]) == [
        "interval-1-2",
        "interval-null",
    ]
    for values in (["a b", "a-b"], ["x" * 200, "x" * 201]):
        names = _names([{"data.path": value} for value in values])
        assert len(set(names)) == 2 and all(len(name) <= 100 for name in names)
        assert names[1] == _names([{"data.path": value} for value in [*values[::-1], "else"]])[0]
    assert _names([{"a": "1"}, {"a": "1"}]) == ["a-1", "a-1"]


JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "launcher",
    [(), pytest.param(JOBLIB, marks=slow), pytest.param(("hydra/launcher=submitit_local",), marks=slow)],
)
def test_a_failing_job_ends_no_other_and_only_it_is_tried_again(launcher, diffussm, in_tmp):
    """Of grey and colour models of colour images, one fails."""
    if launcher:
        pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('=')[2].partition('_')[0]}_launcher")
    (in_tmp / "images").mkdir()
    for index in range(16):
        Image.new("RGB", (8, 8), (index, 0, 99)).save(in_tmp / "images" / f"{index}.png")
    small = [override for override in SMALL_RUN if not override.startswith("evaluation.")]
    data = (
        "evaluation=none",
        "data=image_folder",
        "data.path=images",
        "data.resolution=8",
        "model.num_classes=null",
    )
    ends = (
        "model.num_classes=null",
        "guidance.scale=1",
        "trainer.total_images=16",
        "model.in_channels=1,3",
        "name=both",
    )
    first = diffussm("train", "-m", *small, *data, *ends, *launcher)
    status = (in_tmp / "runs/both/in_channels-3/status.json").read_text()
    second = diffussm("train", "-m", *small, *data, *ends, *launcher)
    for result in (first, second):
        assert result.returncode == 2, result.stderr
        rows = [line.split() for line in result.stdout.splitlines()[2:]]
        assert [row[1::2] for row in rows] == [
            ["in_channels-1", "failed", "|", "|"], ["in_channels-3", "finished", "16", "0"]
        ]  # fmt: skip
        assert "in_channels-1: model.in_channels=1: the data gives 3 channel(s)" in result.stderr
    assert (in_tmp / "runs/both/in_channels-3/status.json").read_text() == status
    assert (in_tmp / "runs/both/in_channels-1/output.log").read_text().count("model.in_channels=1") == 2


@pytest.mark.parametrize("launcher", [pytest.param((), marks=slow), pytest.param(JOBLIB, marks=slow)])
def test_stopping_a_sweep_saves_its_runs_and_begins_no_other(launcher, in_tmp):
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    number = 2 if launcher else 1
    choices = f"seed=range({number + 1})"
    command = [sys.executable, "-m", "diffussm", *TRAIN, choices, *launcher, "trainer.total_images=100k"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [in_tmp / f"runs/digits_sweep/seed-{seed}" for seed in range(number + 1)]
    while not all((run / "metrics.jsonl").exists() for run in runs[:-1]):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    for run in runs[:-1]:
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "preempted" and list((run / "checkpoints").glob("step-*/manifest.json"))
    assert not runs[-1].exists()
    states = [line.split("|")[2].strip() for line in out.splitlines()[2:]]
    assert states == [*["preempted"] * number, "not finished"]


def test_evaluations_of_one_checkpoint_are_kept_apart_and_those_of_several_stay_with_them(in_tmp, capsys):
    for seed in (0, 1):
        assert main(["train", *SMALL_RUN, f"name=run{seed}", f"seed={seed}", "trainer.total_images=16"]) == 0
    drawn: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_job", lambda command, *_, **__: drawn.append(tuple(command)) or 0)
        assert main(["evaluate", "-m", "checkpoint=runs/run0", "guidance.scale=1.0,2.0"]) == 0
        assert main(["evaluate", "-m", "checkpoint=runs/run0,runs/run1", "metrics=[fid]"]) == 0
        assert main(["evaluate", "-m", "checkpoint=runs/run0", "out=x.json", "guidance.scale=1.0,2.0"]) == 2
        assert main(["evaluate", "-m", "checkpoint=runs/run0", "gate.junit=x.xml", "guidance.scale=1,2"]) == 2
        assert main(["evaluate", "-m", "checkpoint=runs/run0", "sampling.seed=0,-1"]) == 2
        assert main(["evaluate", "-m", "checkpoint=runs/run0", "sweep=guidance", "--print-config"]) == 0
    assert [command[-1] for command in drawn] == [
        "out='runs/run0/evaluate/scale-1.0/results.json'",
        "out='runs/run0/evaluate/scale-2.0/results.json'",
        "metrics=[fid]",
        "metrics=[fid]",
    ]
    # what one has measured stands in the table
    write_json(Path("runs/run0/results.json"), {"metrics": {"FID-digits": 12.345, "num_samples": 64}})
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_job", lambda command, *_, **__: 70 if "checkpoint=runs/run1" in command else 0)
        assert main(["evaluate", "-m", "checkpoint=runs/run0,runs/run1", "metrics=[fid]"]) == 70
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["job", "state", "FID-digits", "num_samples", "exit code"]
    assert table[2:] == [
        ["checkpoint-runs-run0", "done", "12.35", "64", "0"], ["checkpoint-runs-run1", "failed", "", "", "70"]
    ]  # fmt: skip
