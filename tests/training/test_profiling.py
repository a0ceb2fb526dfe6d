"""The profile: what is written, when, and that the run does not notice."""

import json
import re

import pytest
from test_trainer import fingerprint, make_trainer

from diffussm.training import profiling
from diffussm.training.profiling import PARTS, NoProfile

LONG = ("trainer.total_images=400", "trainer.save_every_images=160")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "run"
    make_trainer(path, *LONG, "trainer.profile=true").run()
    return path


def test_a_trace_and_a_table_of_a_steps_parts_are_written(profiled):
    trace = json.loads((profiled / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {"data wait", "forward", "backward", "optimizer", "EMA"} <= set(names)
    assert names.count("EMA") == profiling.TRACED_STEPS
    table = (profiled / "profile" / "profile.md").read_text()
    rows = dict(re.findall(r"^\| ([\w ]+) \| ([\d.,]+) \| [\d.]+ \|$", table.split("operators")[0], re.MULTILINE))
    assert {"data wait", "host to device", "draws", "forward", "backward", "clipping", "optimizer"} <= set(rows)
    assert set(rows) <= {*PARTS, "other", "a step"}
    parts = sum(float(milliseconds) for name, milliseconds in rows.items() if name != "a step")
    assert parts == pytest.approx(float(rows["a step"]), abs=0.1)
    assert f"mean of {profiling.TIMED_STEPS} steps" in table


def test_the_run_is_the_same(profiled, tmp_path):
    make_trainer(tmp_path, *LONG).run()
    assert fingerprint(tmp_path) == fingerprint(profiled)
    assert not (tmp_path / "profile").exists()


def test_it_is_written_once(profiled):
    table = profiled / "profile" / "profile.md"
    before = table.stat().st_mtime_ns
    make_trainer(profiled, *LONG[1:], "trainer.total_images=800", "trainer.profile=true").run()
    assert table.stat().st_mtime_ns == before


def test_a_run_that_is_too_short_says_so(tmp_path, capsys):
    make_trainer(tmp_path, "trainer.profile=true", "trainer.total_images=112").run()  # ends while it is traced
    assert "no profile: the run has ended after 7 steps, and it takes 9" in capsys.readouterr().err
    assert not (tmp_path / "profile" / "profile.md").exists()


def test_a_profile_that_cannot_be_written_ends_the_profile_alone(tmp_path, capsys):
    (tmp_path / "profile").write_text("in the way")
    trainer = make_trainer(tmp_path, *LONG, "trainer.profile=true")
    trainer.run()
    assert trainer.images == 400
    assert "profiling ended: " in capsys.readouterr().err


def test_without_it_a_part_costs_a_call():
    profile = NoProfile()
    assert profile.span("forward") is profile.span("backward")
