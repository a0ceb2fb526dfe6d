"""What reports read from run directories: places on the axes, measurements, and what is damaged."""

import json

import pytest
from made_runs import RESULTS, add_result, make_run, record
from PIL import Image

from diffussm.commands.run_collection import find_runs
from diffussm.report.charts import Chart, Line, comparison_charts, run_charts, save_chart
from diffussm.report.curves import COLORS
from diffussm.report.run_record import Costs, read_run
from diffussm.runtime.errors import RunDirectoryError

SETTINGS = {
    "trainer.batch_size": 16,
    "sampler._target_": "diffussm.diffusion.samplers.ddim",
    "sampler.num_steps": 25,
    "guidance.scale": 1.25,
}


def test_compute_and_hours_follow_the_images(tmp_path):
    speeds = {1000: 100.0, 2000: None, 3000: 50.0}
    path = make_run(tmp_path / "run", [record(i, images_per_second=speed) for i, speed in speeds.items()])
    run = read_run(path, "run", SETTINGS, costs=Costs(10, 2_000_000_000))
    assert run.at("compute", 500) == 1000.0
    assert [run.at("hours", i) for i in (0, 500, 1000, 2000, 3000, 9000)] == pytest.approx(
        [seconds / 3600 for seconds in (0, 5, 10, 10, 30, 30)]
    )
    assert read_run(path, "run", SETTINGS).at("compute", 500) is None


def test_the_newest_record_of_a_state_counts_and_damaged_lines_do_not(tmp_path):
    path = make_run(tmp_path / "run", [record(16), record(32), record(32, loss=9.0), record(48, loss=None)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"images": "many", "loss": 1}\nnonsense\n{"images": 64, "lo')
    run = read_run(path, "run", SETTINGS)
    assert run.values("loss") == ([16, 32], [1.0 + 1000 / 16, 9.0])
    assert run.last("loss") == 9.0 and run.last("loss", 31) == 1.0 + 1000 / 16


def test_measurements_in_training_and_after_it_share_their_manner(tmp_path):
    evaluation = {"images": 32, "step": 2, "evaluation": {**RESULTS, "num_samples": 64, "images_per_second": 9.0}}
    path = make_run(tmp_path / "run", [record(16), evaluation, record(64)])
    add_result(path, 4, {**RESULTS, "FID-digits": 4.0, "intervals": {"FID-digits": [3.5, 4.5]}},
               real_against_real={"FID-digits": 3.0, "num_samples": 360})  # fmt: skip
    add_result(path, 4, RESULTS, num_steps=5)
    with (path / "results.jsonl").open("a") as file:
        file.write("nonsense\n" + json.dumps({"request": {"checkpoint": {"path": "elsewhere"}}}) + "\n[1]\n")
    run = read_run(path, "run", SETTINGS)
    first, second, third = run.measurements
    assert (first.images, second.images, third.images) == (32, 64, 64)
    assert first.how == second.how == "ema, ddim 25 steps, guidance 1.25, 64 samples" != third.how
    assert first.fid == "FID-digits" and "images_per_second" not in first.metrics
    assert second.intervals == {"FID-digits": [3.5, 4.5]}
    assert [m.how for m in run.real] == ["real against real, 360 images"]


def test_what_a_sweep_of_evaluations_has_measured_belongs_to_the_run(tmp_path):
    path = make_run(tmp_path / "run", [record(64)])
    for num_steps, fid in ((10, 9.0), (50, 4.0)):
        directory = path / "evaluate" / f"num_steps-{num_steps}"
        directory.mkdir(parents=True)
        add_result(directory, 4, {"FID-digits": fid}, num_steps=num_steps)
    add_result(path, 4, {"FID-digits": 5.0})
    run = read_run(path, "run", SETTINGS)
    assert [(m.how, m.metrics["FID-digits"]) for m in run.measurements] == [
        (f"ema, ddim {num_steps} steps, guidance 1.25, 64 samples", fid)
        for num_steps, fid in ((10, 9.0), (50, 4.0), (25, 5.0))
    ]


def test_a_long_run_is_drawn_with_few_points_and_all_spikes(tmp_path):
    records = [record(256 * i, loss=5.0 if i == 7001 else 1.0 + 1 / i, mse=1.0) for i in range(1, 20_001)]
    run = read_run(make_run(tmp_path / "run", records), "run", SETTINGS, costs=Costs(10, 1000))
    for chart in run_charts(run):
        for line in chart.lines:
            assert len(line.y) <= 1000 and {len(x) for x in line.x.values()} == {len(line.y)}
    loss = run_charts(run)[0].lines[0]
    assert 5.0 in loss.y and loss.x["images"][-1] == 256 * 20_000
    assert len(json.dumps([chart.content() for chart in run_charts(run)])) < 500_000


def test_a_chart_is_also_a_picture(tmp_path):
    run = read_run(make_run(tmp_path / "run", [record(16), record(32)]), "run", SETTINGS, costs=Costs(10, 1000))
    (chart,) = comparison_charts([run, run])
    save_chart(chart, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "run ends at" in chart.summary


def test_a_single_measurement_is_to_be_seen_in_its_picture(tmp_path):
    line = Line("a", {"images": [16], "compute": [2.0]}, [5.0], is_measured=True)
    save_chart(Chart("FID", "FID", "FID", [line], is_log=True), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        left = picture.convert("RGB").crop((0, 0, picture.width // 2, picture.height))
    assert left.tobytes().count(bytes.fromhex(COLORS[0][1:])) > 50


def test_runs_are_found_below_a_directory_each_once(tmp_path, monkeypatch):
    for name in ("b", "a", "deep/er/c"):
        make_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "compare").mkdir()
    monkeypatch.chdir(tmp_path / "sweep")
    found = find_runs([tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [path.name for path in found] == ["a", "b", "c"]
    with pytest.raises(RunDirectoryError, match="compare: holds no run"):
        find_runs([tmp_path / "sweep" / "compare"])
    with pytest.raises(RunDirectoryError, match="nowhere: no such directory"):
        find_runs([tmp_path / "nowhere"])
