"""A baseline keeps results of one request: what joins it, and what is refused."""

import copy
import multiprocessing
from pathlib import Path

import pytest

from diffussm.config import GATED
from diffussm.evaluation.baseline import Baseline
from diffussm.evaluation.gate import Spread
from diffussm.runtime.errors import ConfigError, DataError

REQUEST = {
    "checkpoint": {"path": "runs/a", "sha256": "a"},
    "sampling": {"seed": 0, "batch_size": 64, "precision": "fp32"},
    "sampler": {"num_steps": 25},
    "evaluation": {"num_samples": 1000, "reference": "here.npz", "intervals": False},
    "reference": {"file": "here.npz", "sha256": "r"},
    "extractor": {"sha256": "e"},
    "versions": {"torch": "2.15.0"},
}


def changed(key: str, value: object) -> dict:
    request = copy.deepcopy(REQUEST)
    *parents, last = key.split(".")
    node = request
    for parent in parents:
        node = node[parent]
    node[last] = value
    return request


def add(path: Path, fid: float, request=REQUEST) -> int:
    return Baseline(path, "gate.add_to").add(request, {"FID": fid, "recall": 0.5})


def test_results_are_kept_and_their_spread_is_theirs(tmp_path):
    path = tmp_path / "new" / "b.json"
    assert [add(path, fid, changed("checkpoint.sha256", str(fid))) for fid in (5.0, 6.0, 7.0)] == [1, 2, 3]
    baseline = Baseline.read(path, "gate.relative_to")
    assert baseline.spreads(["fid"]) == {"FID": Spread(6.0, 1.0, 3)}
    assert set(baseline.spreads(GATED)) == {"FID", "recall"}
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


def test_a_result_counts_once_however_often_it_is_added(tmp_path):
    path = tmp_path / "b.json"
    assert [add(path, 5.0), add(path, 9.0, changed("checkpoint.path", "moved")), add(path, 6.0)] == [1, 1, 1]
    assert Baseline.read(path, "k").spreads(["fid"])["FID"].mean == 6.0
    assert add(path, 7.0, changed("sampling.seed", 1)) == 2


FREE = (
    "checkpoint.sha256", "sampling.seed", "sampling.batch_size", "versions.torch", "reference.file",
    "evaluation.reference", "evaluation.intervals", "metrics",
)  # fmt: skip
DECISIVE = (
    "sampling.precision", "sampler.num_steps", "sampler.eta", "evaluation.num_samples", "reference.sha256",
    "extractor.sha256",
)  # fmt: skip


@pytest.mark.parametrize("key", DECISIVE)
def test_another_request_is_refused_by_name_and_the_file_stays(tmp_path, key):
    add(tmp_path / "b.json", 5.0)
    before = (tmp_path / "b.json").read_bytes()
    with pytest.raises(
        ConfigError, match=rf"gate\.add_to=.*b\.json: answers another request: {key}=.* and 7 here"
    ):
        add(tmp_path / "b.json", 5.0, changed(key, 7))
    assert (tmp_path / "b.json").read_bytes() == before
    without = {group: value for group, value in REQUEST.items() if group != "sampler"}
    with pytest.raises(ConfigError, match=r"sampler\.num_steps=25 there and nothing here"):
        Baseline.read(tmp_path / "b.json", "k").refuse_other(without)


@pytest.mark.parametrize("key", FREE)
def test_what_changes_no_meaning_is_accepted(tmp_path, key):
    add(tmp_path / "b.json", 5.0)
    Baseline.read(tmp_path / "b.json", "k").refuse_other(changed(key, 7))


def test_many_differences_are_counted():
    baseline = Baseline(Path("b.json"), "k")
    baseline.request = {"sampler": {str(i): i for i in range(5)}}
    with pytest.raises(ConfigError, match=r"sampler\.2=2 there and nothing here and 2 more: ask"):
        baseline.refuse_other({})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "request": {}, "results": [{}]}',
        '{"format": 1, "request": {}, "results": []}',
        '{"format": 1, "request": {}, "results": [{"checkpoint": "a", "seed": 0, "metrics": {"FID": "x"}}]}',
    ],
)
def test_what_is_no_baseline_is_named(tmp_path, content):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(DataError, match=r"gate\.relative_to=.*b\.json: no baseline: .*make it anew"):
        Baseline.read(tmp_path / "b.json", "gate.relative_to")
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        Baseline.read(tmp_path / "nowhere.json", "gate.relative_to")


def test_processes_that_add_at_once_lose_no_result(tmp_path):
    fork = multiprocessing.get_context("fork")
    requests = [changed("sampling.seed", seed) for seed in range(16)]
    adding = [fork.Process(target=add, args=(tmp_path / "b.json", 5.0, request)) for request in requests]
    for process in adding:
        process.start()
    for process in adding:
        process.join()
        assert process.exitcode == 0
    assert len(Baseline.read(tmp_path / "b.json", "k").results) == 16
