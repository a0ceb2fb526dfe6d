"""Loggers that raise, hang, die, are slow or absent: training is told, waits for none, and loses no line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import backends
import pytest
from conftest import SMALL_RUN
from test_trainer import fingerprint, make_trainer, records

from diffussm.runtime.errors import ConfigError
from diffussm.training import loggers
from diffussm.training.loggers import numbers
from diffussm.training.logging import MetricsLog
from diffussm.training.relay import Relay

PATIENCE = 3.0


def relay_of(backend, path: Path, said: list[str], **options) -> Relay:
    options = {"patience": PATIENCE, **options}
    return Relay("fake", backend, path, "run", {"a": 1}, said.append, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The fingerprint of a run without loggers."""
    path = tmp_path_factory.mktemp("relay") / "whole"
    make_trainer(path).run()
    return fingerprint(path)


def told(path: Path) -> list[str]:
    file = path / "told.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_a_backend_hears_everything_in_order(tmp_path):
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [relay_of(backends.Faithful(), tmp_path, said)])
    log.start(64)
    log.write({"images": 80, "loss": 0.5, "none": None, "nested": {"x": 1}})
    log.show(80, "samples", tmp_path / "picture.png")
    log.close()
    assert told(tmp_path) == [
        "start run 64 1",
        "write 80 ('images', 80.0) ('loss', 0.5) ('nested/x', 1.0)",
        "show 80 samples picture.png",
        "close",
    ]
    assert said == []


def test_what_a_backend_prints_goes_to_a_file_and_its_remark_to_the_terminal(tmp_path, capfd):
    relay = relay_of(backends.Chatty(), tmp_path, [])
    relay.start(0)
    relay.close()
    shown = capfd.readouterr()
    assert shown.err == "diffussm: logger fake: all is well\n" and shown.out == ""
    assert (tmp_path / "fake" / "output.log").read_text() == "chatter\n"


@pytest.mark.fault("G13")
@pytest.mark.parametrize(
    ("backend", "says", "says_in_process"),
    [
        (backends.Raising(), [], ["write failed (no such server)", "20 of 22 calls failed"]),
        (backends.NeverStarting(), ["records dropped"], ["does not start (no licence)"]),
        (backends.Hanging(), ["not ready after 3 s"], []),
        (backends.HangingAtTheEnd(), ["logger fake: not ready after 3 s"], []),
        (backends.Dying(), ["its process has ended (exit code 11)", "records dropped"], []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, backends.Faithful) else "",
)
def test_training_goes_on_past_a_backend_that_fails(
    tmp_path, whole, backend, says, says_in_process, capfd, figure
):
    said: list[str] = []
    trainer = make_trainer(tmp_path, "trainer.log_every_images=16")
    relay = relay_of(backend, tmp_path, said)
    trainer.log.relays = [relay]
    trainer.run()
    process = relay._process
    if isinstance(backend, backends.NeverStarting | backends.Dying):
        process.wait(60)
    for _ in range(12):
        relay.write({"images": 0})
    trainer.log.close()
    assert process.poll() is not None  # nothing of it outlives the log
    lost = set(range(16, 129, 16)) - {record["images"] for record in records(tmp_path)}
    figure(f"{type(backend).__name__}: {len(lost)} of 8 lines lost")
    assert not lost and len(records(tmp_path)) == 8
    assert fingerprint(tmp_path) == whole
    assert [expected in line for expected, line in zip(says, said, strict=True)] == [True] * len(says), said
    in_process = [line for line in capfd.readouterr().err.splitlines() if line.startswith("diffussm: logger")]
    assert [a in b for a, b in zip(says_in_process, in_process, strict=True)] == [True] * len(in_process)


@pytest.mark.fault("G13")
def test_records_that_a_slow_backend_has_no_time_for_are_dropped_counted_and_told_of(tmp_path, figure):
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [relay_of(backends.Hanging(), tmp_path, said, capacity=10)])
    log.start(0)
    started = time.monotonic()
    for images in range(5000):  # more than the queue and the pipe hold
        log.write({"images": images, "text": "x" * 100, **{f"value {i}": 1.0 for i in range(20)}})
    assert time.monotonic() - started < 60  # it would have been for ever
    log.close()
    written = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    figure(f"too slow: {5000 - written} of 5,000 lines lost")
    assert written == 5000
    assert said[0].startswith("logger fake: too slow") and "not ready after" in said[1] and len(said) == 2
    assert int(said[1].split()[2].replace(",", "")) > 1000


def test_a_slow_backend_is_waited_for_at_the_end(tmp_path):
    said: list[str] = []
    relay = relay_of(backends.Slow(), tmp_path, said, patience=60.0)
    relay.start(0)
    for images in range(20):
        relay.write({"images": images})
    relay.close()
    assert len(told(tmp_path)) == 22 and said == []


def test_the_process_of_a_backend_ends_when_training_is_killed(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; import backends; "
        "from diffussm.training import relay; "
        "r = relay.Relay('fake', backends.Faithful(), Path(sys.argv[1]), 'run', {}); r.start(0); "
        "r.write({'images': 1}); time.sleep(1); print(r._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment, timeout=60
    )
    pid, deadline = int(result.stdout), time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert told(tmp_path)[-1] == "close"


@pytest.mark.fault("G13")
def test_a_hanging_package_keeps_no_command_from_ending(tmp_path, figure):
    """The whole way: a module named wandb that hangs in `init`, in a run of the command line."""
    (tmp_path / "wandb.py").write_text("import time\ntime.sleep(10_000)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-m", "diffussm", "train", *SMALL_RUN, f"run_dir={run}", "logger=wandb"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "logger wandb: " in result.stderr and "not ready after 10 s" in result.stderr
    figure(f"a package that hangs: {4 - len(records(run))} of 4 lines lost")
    assert len(records(run)) == 4
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


WANDB = """
class Settings:
    def __init__(self, **options): self.options = options

class Run:
    def define_metric(self, *a, **k): pass
    def log(self, row): print("row", sorted(row))
    def finish(self): print("finished")

class Image:
    def __init__(self, path): self.path = path

def teardown(): print("torn down")

def init(mode, id, settings, **options):
    print("init", mode, id, options["resume"], settings.options["init_timeout"])
    if mode == "online": raise TimeoutError("the server does not answer\\nreally")
    return Run()
"""


def test_wandb_goes_offline_and_keeps_its_id(tmp_path, monkeypatch, capfd):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    for start in range(2):
        relay = Relay("wandb", loggers.WandB(init_seconds=7), run, "name", {"seed": 0})
        relay.start(start)
        relay.write({"images": 1, "loss": 2.0})
        relay.show(1, "samples", tmp_path / "x.png")
        relay.close()
    shown = capfd.readouterr().err
    assert shown.count("diffussm: logger wandb: offline (the server does not answer)") == 2
    identity = (run / "wandb" / "id").read_text()
    assert (run / "wandb" / "output.log").read_text().splitlines() == 2 * [
        f"init online {identity} allow 7",
        "torn down",
        f"init offline {identity} allow 7",
        "row ['images', 'loss']",
        "row ['images', 'samples']",
        "finished",
    ]


def test_tensorboard_has_scalars_and_pictures_and_forgets_what_was_taken_back(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (30, 20)).save(tmp_path / "grid.png")
    for first, last in ((0, 4), (2, 5)):  # the second start goes on from 2
        relay = relay_of(loggers.TensorBoard(), tmp_path, [], patience=60.0)
        relay.start(first)
        for images in range(first + 1, last + 1):
            relay.write({"images": images, "loss": float(10 * first + images)})
        relay.show(last, "samples", tmp_path / "grid.png")
        relay.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0),
    ]  # fmt: skip
    (picture,) = shown.Images("samples")
    assert (picture.width, picture.height, picture.step) == (30, 20, 5)


@pytest.mark.fault("G13")
@pytest.mark.parametrize("backend", [loggers.TensorBoard, loggers.WandB])
def test_a_missing_package_is_named_with_its_extra(backend, monkeypatch, figure):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = backend.__name__.lower()
    with pytest.raises(ConfigError, match=rf"logger={name}: .*pip install 'diffussm\[{name}\]'"):
        backend()
    figure(f"{name} is absent: refused before the run, with its extra")


def test_numbers_of_a_record():
    record = {"images": 1, "loss": None, "nan": float("nan"), "flag": "x", "evaluation": {"FID": 5.5}}
    assert numbers(record) == {"images": 1.0, "evaluation/FID": 5.5}
