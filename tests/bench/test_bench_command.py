"""`diffussm bench` from the command line to its files."""

import json

import pytest

from diffussm.bench import suites
from diffussm.cli import main

TINY = (
    "bench", "suites=[layer,convolution,gemm]", "lengths=[16,64]", "hidden_size=64", "d_state=4", "depth=1",
    "batch_size=1", "repetitions=2",
)  # fmt: skip


def test_a_run_prints_its_tables_and_writes_valid_json_and_markdown(in_tmp, capsys):
    assert main(TINY) == 0
    captured = capsys.readouterr()
    document = json.loads((in_tmp / "bench" / "bench.json").read_text())
    assert document["complete"] and document["command"].startswith("diffussm bench 'suites=[layer")
    assert {m["suite"] for m in document["measurements"]} == {"layer", "convolution", "gemm"}
    assert {m["length"] for m in document["measurements"]} == {16, 64}
    assert not document["skipped"] and all(c["goal"] is None for c in document["comparisons"])
    text = (in_tmp / "bench" / "bench.md").read_text()
    assert text in captured.out and "textbook S4D / S4D, time" in text
    assert sum("ms x 2" in line for line in captured.err.splitlines()) == len(document["measurements"])


def test_an_interrupted_run_keeps_what_was_measured(in_tmp, monkeypatch, capsys):
    def interrupt(setup, length):
        raise KeyboardInterrupt

    monkeypatch.setitem(suites.SUITES, "gemm", (interrupt, ("forward",), 4096))
    assert main(TINY) == 130
    document = json.loads((in_tmp / "bench" / "bench.json").read_text())
    assert {m["suite"] for m in document["measurements"]} == {"layer", "convolution"}
    assert document["complete"] is False and "stopped before its end" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bench.json", "bench.md"])
def test_earlier_results_are_never_overwritten(name, in_tmp, capsys):
    (in_tmp / "bench").mkdir()
    (in_tmp / "bench" / name).write_text("mine")
    assert main(TINY) == 73
    assert f"out=bench: {name} is there already" in capsys.readouterr().err
    assert [path.read_text() for path in (in_tmp / "bench").iterdir()] == ["mine"]
