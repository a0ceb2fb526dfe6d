"""Sampling that is killed, stopped and continued, on other numbers of processes: all images, each of them once."""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from faults.runs import command

slow = pytest.mark.slow
SMALLEST = ("sampler.num_steps=2", "sampling.batch_size=64")


@pytest.fixture(scope="module")
def trained(nursery, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "run"
    nursery.run(*command(path, "trainer.total_images=32", "trainer.save_every_images=32", "sampler=ddim"))
    return path


def sample(run: Path, out: Path, *overrides: str) -> list[str]:
    return ["sample", f"checkpoint={run}", f"out={out}", *SMALLEST, *overrides]


def finished(path: Path) -> int:
    return len(list(path.glob("[0-9]*.*")))


def content(path: Path) -> str:
    """SHA-256 of all files by name, but for what `sample` notes about its own work."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name != "samples.json":
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.mark.fault("G17")
@pytest.mark.parametrize(
    ("count", "kills", "form"),
    [
        pytest.param(500, 2, "png", id="two kills"),
        pytest.param(500, 2, "npz", id="two kills, npz"),
        pytest.param(5000, 10, "png", marks=slow, id="ten kills"),
    ],
)
def test_samples_killed_again_and_again_are_the_same(jobs, trained, tmp_path, figure, count, kills, form):
    draws, size, path = random.Random(0), max(count // 40, 16), tmp_path / "killed"
    asked = (f"num_images={count}", f"format={form}", f"range_size={size}")
    redone = 0
    for kill in range(kills):
        processes = f"num_processes={1 + kill % 2}"
        ranges = path / "unfinished"
        before = {file: file.stat().st_mtime_ns for file in ranges.glob("[0-9]*.json")}
        job = jobs.start(*sample(trained, path, *asked, processes), faults=[("slow_ranges", 0.02)])
        job.wait_until(lambda before=before, ranges=ranges: len(list(ranges.glob("[0-9]*.json"))) > len(before))
        time.sleep(draws.uniform(0.0, 0.3))
        job.kill()
        assert not jobs.orphans()
        redone += sum(file.stat().st_mtime_ns != when for file, when in before.items())
    jobs.run(*sample(trained, path, *asked, "num_processes=2"))
    jobs.run(*sample(trained, tmp_path / "whole", *asked))
    record, whole = (json.loads((out / "samples.json").read_text()) for out in (path, tmp_path / "whole"))
    is_same = record["sha256"] == whole["sha256"] and content(path) == content(tmp_path / "whole")
    names = {file.name for file in path.glob("0*.png")}
    missing, more = 0, 0
    if form == "png":
        wanted = {f"{index:06d}.png" for index in range(count)}
        missing, more = len(wanted - names), len(names - wanted)
    figure(
        f"{kills} kills over {count:,} images as {form}: {missing} missing, {more} double, {redone} ranges drawn "
        f"again, hash {'the same' if is_same else 'ANOTHER'}",
        "0 missing, 0 double, same hash",
    )
    assert is_same and record == whole and not missing and not more and not redone
    assert {file.name for file in path.iterdir()} >= {"samples.json", "grid.png"}
    assert not list(path.rglob(".*")) and not (path / "unfinished").exists()


@pytest.mark.fault("G17")
@pytest.mark.parametrize("target", ["launcher", "rank"])
def test_a_signal_ends_sampling_and_the_same_command_continues(jobs, trained, tmp_path, figure, target):
    asked = sample(trained, tmp_path / "out", "num_images=300", "range_size=10", "num_processes=2")
    job = jobs.start(*asked, faults=[("slow_ranges", 0.1)])
    job.wait_until(lambda: finished(tmp_path / "out" / "unfinished") > 3)
    os.kill(job.pid if target == "launcher" else job.children()[1], signal.SIGTERM)
    assert job.wait() == 75 and job.said.count("of 30 ranges finished: run it again") == 1, job.said
    assert "Traceback" not in job.said
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("0*.png")}
    jobs.run(*asked)
    again = sum(file.stat().st_mtime_ns != when for file, when in before.items())
    drawn = len(list((tmp_path / "out").glob("0*.png")))
    figure(f"SIGTERM to the {target}: exit 75, {drawn}/300 images in the end")
    assert drawn == 300 and again <= 2 * 10  # of the ranges that both were at


@pytest.mark.fault("G17")
def test_a_second_writer_is_refused_in_one_line(jobs, trained, tmp_path):
    asked = sample(trained, tmp_path / "out", "num_images=200", "range_size=10")
    first = jobs.start(*asked, faults=[("slow_ranges", 0.3)])
    first.wait_until(lambda: finished(tmp_path / "out" / "unfinished") > 0)
    second = jobs.run(*asked, code=73)
    assert "another process is using it" in second.said and second.said.count("\n") == 1
    first.kill()
    jobs.run(*asked)


@pytest.mark.fault("G17")
def test_an_evaluation_killed_on_two_processes_measures_what_one_measures(jobs, trained, tmp_path, figure):
    def evaluate(out: Path, *overrides: str) -> list[str]:
        return [
            "evaluate", f"checkpoint={trained}", f"out={out / 'results.json'}", *SMALLEST, "range_size=20",
            "evaluation.num_samples=400", *overrides,
        ]  # fmt: skip

    features = tmp_path / "killed"
    job = jobs.start(*evaluate(features, "num_processes=2"), faults=[("slow_ranges", 0.1)])
    job.wait_until(lambda: len(list(features.glob("*.features-*/0*.safetensors"))) > 3)
    job.kill()
    assert not jobs.orphans()
    before = {file.name for file in features.glob("*.features-*/0*.safetensors")}
    jobs.run(*evaluate(features))
    jobs.run(*evaluate(tmp_path / "whole"))
    found, whole = (
        json.loads((out / "results.json").read_text())["metrics"] for out in (features, tmp_path / "whole")
    )
    for metrics in (found, whole):
        del metrics["images_per_second"]
    name, distance = next(iter(found.items()))
    figure(f"killed on 2 processes after {len(before)} ranges: {name} off by {abs(distance - whole[name]):.1g}")
    assert found == pytest.approx(whole, rel=1e-9, abs=1e-9) and found["num_samples"] == 400
    assert sorted(file.name for file in features.iterdir()) == ["results.json", "results.jsonl"]
