"""Evaluation in training, on all processes, and the checkpoint that it finds best."""

import json
import os
import signal
from pathlib import Path

import pytest
from faults.runs import checkpoints, command, train_state

from diffussm.training.best import CANDIDATE, BestCheckpoint

EVALUATED = ("sampler=ddim", "evaluation.every_images=64", "evaluation.num_samples=600")


@pytest.fixture
def published(tmp_path) -> Path:
    """Three checkpoints, as far as files go."""
    for step in (1, 2, 3):
        path = tmp_path / "checkpoints" / f"step-{step:012d}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text(f"weights {step}")
    return tmp_path / "checkpoints"


def kept(checkpoints: Path) -> list[str]:
    return [path.read_text() for path in sorted(checkpoints.parent.glob("best/step-*/model.safetensors"))]


def test_the_least_first_metric_is_kept_and_outlives_the_others(published):
    best = BestCheckpoint(published)
    for step, value, is_better in ((1, 5.0, True), (2, 6.0, False), (2, float("nan"), False), (3, 4.0, True)):
        assert best.offer(step, {"FID": value, "IS": 100 * step}) == is_better
        best.keep()
        assert kept(published) == [f"weights {3 if step == 3 else 1}"]
    linked = next(published.parent.glob("best/step-*/model.safetensors"))
    assert linked.stat().st_nlink == 2  # no second copy of the bytes
    (published / "step-000000000003" / "model.safetensors").unlink()
    assert kept(published) == ["weights 3"]
    assert BestCheckpoint(published).offer(4, {"sFID": 9.0})  # of another metric nothing is known


def test_a_candidate_waits_for_its_checkpoint_through_a_kill(published):
    BestCheckpoint(published).offer(4, {"FID": 5.0})
    BestCheckpoint(published).keep()
    assert kept(published) == [] and (published.parent / "best" / CANDIDATE).exists()
    (published / "step-000000000004").mkdir()
    (published / "step-000000000004" / "model.safetensors").write_text("weights 4")
    BestCheckpoint(published).keep()  # of the process that continues
    assert kept(published) == ["weights 4"] and not (published.parent / "best" / CANDIDATE).exists()


def test_what_cannot_be_kept_costs_a_remark(published):
    (published.parent / "best").write_text("a file")
    said: list[str] = []
    best = BestCheckpoint(published, said.append)
    best.offer(1, {"FID": 5.0})
    best.keep()
    assert len(said) == 1 and said[0].startswith("going on without keeping the best checkpoint")


def evaluations(path: Path) -> dict[int, dict]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {record["images"]: record["evaluation"] for record in found if "evaluation" in record}


@pytest.mark.fault("G2")
def test_a_stop_during_an_evaluation_loses_neither_steps_nor_images(jobs, tmp_path, figure):
    """Of the process that is not the first; what is evaluated by then is not generated again."""
    many = (*EVALUATED, "trainer.num_processes=2", "trainer.keep_checkpoints=9")
    job = jobs.start(*command(tmp_path / "run", *many), faults=[("slow_ranges", 0.3)])
    job.wait_until(lambda: list(tmp_path.glob("run/evaluation/0*.safetensors")))
    os.kill(job.children()[1], signal.SIGTERM)
    assert job.wait() == 75 and "stopped by signal at 64 images" in job.said, job.said
    state = train_state(tmp_path / "run")
    assert state["pending"] == ["evaluation"] and not evaluations(tmp_path / "run")
    done = {file: file.stat().st_ino for file in tmp_path.glob("run/evaluation/0*.safetensors")}
    jobs.run(*command(tmp_path / "run", *many))
    jobs.run(*command(tmp_path / "whole", *many))
    ours, whole = evaluations(tmp_path / "run"), evaluations(tmp_path / "whole")
    figure(f"stopped after {len(done)} of 3 ranges of an evaluation: {len(ours)}/2 evaluations in the end")
    assert sorted(ours) == [64, 128]
    for images, metrics in whole.items():
        assert metrics["num_samples"] == ours[images]["num_samples"] == 600
        assert ours[images]["FID-digits"] == pytest.approx(metrics["FID-digits"], rel=1e-9)
    best = min(ours, key=lambda images: ours[images]["FID-digits"])
    (path,) = tmp_path.glob("run/best/step-*")
    assert path.name == f"step-{best // 16:012d}" and path.name in {
        found.name for found in checkpoints(tmp_path / "run")
    }
    assert not (tmp_path / "run" / "evaluation").exists()


def test_the_best_is_not_kept_where_it_is_not_wanted(jobs, tmp_path):
    jobs.run(*command(tmp_path / "run", *EVALUATED, "trainer.keep_best=false", "evaluation.num_samples=64"))
    assert len(evaluations(tmp_path / "run")) == 2 and not (tmp_path / "run" / "best").exists()
