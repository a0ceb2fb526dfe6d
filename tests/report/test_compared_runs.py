"""Comparisons: at equal terms, of equal manner, and beside published figures only where these belong."""

import json
import statistics

import pytest
from made_runs import RESULTS, add_result, make_run, record

from diffussm.report.charts import comparison_charts
from diffussm.report.comparison import compare
from diffussm.report.published import ROWS, SOURCE
from diffussm.report.run_record import Costs, read_run
from diffussm.report.seeds import find_siblings

SETTINGS = {"trainer.batch_size": 16, "model._target_": "diffussm.models.DiffuSSM", "seed": 0, "name": "x"}
IMAGENET = {"data._target_": "diffussm.data.imagenet.ImageNet", "data.resolution": 256}


@pytest.fixture
def make(tmp_path):
    """A run of so many images, logged every 16, at a speed, a cost and with settings of its own."""

    def run(name, images, speed=100.0, macs=1_000_000_000, parameters=1000, settings=(), **known):
        records = [record(i, images_per_second=speed) for i in range(16, images + 1, 16)]
        path = make_run(tmp_path / name, records)
        for step in range(2, images // 16 + 1, 2):
            add_result(path, step, {**RESULTS, "FID-digits": 100.0 / step})
        return read_run(path, name, {**SETTINGS, **dict(settings)}, costs=Costs(parameters, macs), **known)

    return run


def cells(table, column):
    index = [c.title for c in table.columns].index(column)
    return [getattr(row[index], "value", row[index]) for row in table.rows]


def test_by_itself_each_run_is_read_at_its_end(make):
    table = compare([make("a", 160), make("b", 64)]).table
    assert cells(table, "images") == [160, 64] and cells(table, "FID-digits") == [10.0, 25.0]
    assert cells(table, "total Gflops") == [160.0, 64.0] and cells(table, "images/s") == pytest.approx([100, 100])


@pytest.mark.parametrize(
    ("match", "images", "fids"),
    [
        ("images", [160, 160], [10.0, 10.0]),
        ("compute", [160, 80], [10.0, 25.0]),
        ("time", [80, 160], [25.0, 10.0]),
    ],
)
def test_matched_runs_are_read_where_all_have_been(make, match, images, fids):
    runs = [make("slow", 320, speed=50.0), make("dear", 320, macs=2_000_000_000)]
    if match == "images":
        runs[1] = make("short", 160, macs=2_000_000_000)
    if match == "compute":
        runs[0] = make("short", 160)
    if match == "time":
        runs[1] = make("short", 160)
    compared = compare(runs, match)
    assert cells(compared.table, "images") == pytest.approx(images, abs=1)
    assert cells(compared.table, "FID-digits") == fids
    assert cells(compared.table, "loss") == [
        run.last("loss", seen) for run, seen in zip(runs, images, strict=True)
    ]
    assert "the most that all have reached" in compared.terms


def test_what_cannot_be_matched_is_one_line(make, tmp_path):
    unknown = read_run(make_run(tmp_path / "unknown", [record(16)]), "unknown", SETTINGS)
    with pytest.raises(ValueError, match=r"match=compute: .*unknown: its compute is not known"):
        compare([make("a", 32), unknown], "compute")
    empty = read_run(make_run(tmp_path / "empty"), "empty", SETTINGS)
    with pytest.raises(ValueError, match=r"match=time: .*empty: it has no records"):
        compare([make("b", 32), empty], "time")


def test_runs_with_about_as_many_parameters_are_paired(make):
    runs = [make("a", 160), make("b", 64, parameters=1040), make("c", 64, parameters=2000)]
    pairs = compare(runs, "parameters", tolerance=0.05).pairs
    assert [row[:3] for row in pairs.rows] == [["a", "b", 1.04]]
    assert cells(pairs, "FID-digits, difference") == [15.0]
    assert "Without a partner: c." in pairs.notes
    assert len(compare(runs, "parameters", tolerance=0.5).pairs.rows) == 3
    assert compare(runs).pairs is None


def test_the_manner_that_most_runs_share_is_compared(make):
    runs = [make("a", 64), make("b", 64), make("c", 64)]
    add_result(runs[0].path, 4, {"FID-digits": 1.0}, num_steps=500)  # newer, and alone
    runs[0] = read_run(runs[0].path, "a", SETTINGS)
    table = compare(runs).table
    assert cells(table, "FID-digits") == [25.0, 25.0, 25.0] and len(table.notes) == 1
    alone = compare([runs[0], read_run(make_run(runs[0].path.parent / "none"), "none", SETTINGS)]).table
    assert cells(alone, "FID-digits") == [1.0, None]


def test_of_manners_that_no_runs_share_a_run_is_read_in_its_own(make):
    settings = {
        "sampler._target_": "diffussm.diffusion.samplers.ddim",
        "sampler.num_steps": 25,
        "guidance.scale": 1.25,
    }
    run = make("a", 64, settings=settings)
    add_result(run.path, 4, {"FID-digits": 1.0}, num_steps=500)
    run = read_run(run.path, "a", {**SETTINGS, **settings})
    other = make("b", 0)
    assert cells(compare([run, other]).table, "FID-digits") == [25.0, None]
    (_, several), (_, single) = comparison_charts([run, other]), comparison_charts([run])
    assert [line.name for line in several.lines] == ["a"] and several.lines[0].y == [50.0, 25.0]
    assert len(single.lines) == 2


def test_only_settings_that_differ_are_listed(make):
    runs = [make("a", 32), make("b", 32, settings={"seed": 1, "name": "y", "model.init": None})]
    table = compare(runs).differences
    assert table.rows == [["seed", "0", "1"], ["model.init", "absent", "null"]]


def test_of_many_runs_each_is_a_row_of_what_differs(make):
    table = compare([make(f"s{seed}", 32, settings={"seed": seed}) for seed in range(3)]).differences
    assert [column.title for column in table.columns] == ["run", "seed"]
    assert table.rows == [["s0", "0"], ["s1", "1"], ["s2", "2"]]


def test_runs_that_differ_in_their_seed_alone_are_averaged(make):
    """With the deviation of single runs; one of another setting stays alone, and needs no deviation."""
    lengths = (64, 96, 128)
    runs = [
        make(f"m-1__seed-{seed}", images, settings={"seed": seed, "name": f"x/{seed}"})
        for seed, images in enumerate(lengths)
    ]
    runs.append(make("m-2__seed-0", 64, settings={"model.hourglass_ratio": 2}))
    table = compare(runs).seeds
    assert [row[0] for row in table.rows] == ["m-1", "m-2__seed-0"] and cells(table, "seeds") == [3, 1]
    fids = [100.0 / (images // 16) for images in lengths]
    average = table.rows[0][[column.title for column in table.columns].index("FID-digits")]
    assert (average.value, average.deviation) == pytest.approx((statistics.mean(fids), statistics.stdev(fids)))
    assert cells(table, "parameters") == [1000, 1000] and cells(table, "FID-digits")[1] == 25.0
    assert compare(runs[2:]).seeds is None


def test_curves_of_several_seeds_are_their_mean_where_all_have_a_point(make, tmp_path):
    """Thinned after, not before, for the envelopes of runs keep different points."""
    count = 3000
    runs = []
    for seed in (0, 1):
        noisy = [
            record(i, loss=2.0 + (seed + 1) * (i * (seed + 7) % 11) / 100) for i in range(1, count + 1 + seed)
        ]
        path = make_run(tmp_path / f"long_seed{seed}", noisy)
        runs.append(read_run(path, path.name, {**SETTINGS, "seed": seed}, costs=Costs(1, 10**9)))
    other = make("other", 64, settings={"model.hourglass_ratio": 2})
    loss = comparison_charts([*runs, other])[0]
    assert [line.name for line in loss.lines] == ["long, mean of 2", "other"]
    mean, alone = loss.lines
    assert 100 < len(mean.y) < count and mean.x["images"][-1] == count and mean.x["compute"][-1] == count
    for images, y in zip(mean.x["images"], mean.y, strict=True):
        assert y == pytest.approx(2.0 + (images * 7 % 11 + 2 * (images * 8 % 11)) / 200)
    assert alone.x["images"] == [16, 32, 48, 64]


@pytest.mark.parametrize(
    ("own", "others", "called"),
    [
        (["m-seed-10", "m-seed-11"], [], "m"),
        (["m-1", "m-10"], [], "m"),
        (["seed-1__m-2", "seed-2__m-2"], [], "seed-1__m-2, seed-2__m-2"),
        (["m_0", "m_1"], ["m"], "m_0, m_1"),  # so that no other is taken for their mean, or among them
        (["m_0", "m_1"], ["m_2", "m_3"], "m_0, m_1"),
    ],
)
def test_siblings_have_a_name_of_their_own(make, own, others, called):
    runs = [make(name, 32, settings={"seed": seed}) for seed, name in enumerate(own)]
    runs += [make(name, 32, settings={"seed": seed, "model.depth": 2}) for seed, name in enumerate(others)]
    names = [siblings.name for siblings in find_siblings(runs)]
    assert names[0] == called and len(names) == (2 if others else 1) == len(set(names))


def test_a_seed_that_was_run_twice_is_no_other_seed(make):
    """As by two states of a code: these are to be seen beside each other."""
    before, after = ([make(f"{name}{seed}", 64, settings={"seed": seed}) for seed in (0, 1)] for name in "ab")
    assert compare([*before, *after]).seeds is None and compare(before).seeds is not None
    assert [line.name for line in comparison_charts([*before, *after])[0].lines] == ["a0", "a1", "b0", "b1"]


def test_an_interval_does_not_stand_among_deviations(make):
    runs = [make(f"m-seed-{seed}", 64, settings={"seed": seed}) for seed in (0, 1)]
    alone = make("alone", 64, settings={"model.depth": 2})
    add_result(alone.path, 4, {"FID-digits": 7.0, "intervals": {"FID-digits": [6.0, 8.0]}})
    alone = read_run(alone.path, "alone", alone.settings)
    compared = compare([*runs, alone])
    texts = [table.texts()[-1] for table in (compared.table, compared.seeds)]
    assert "7.000 ±1.000" in texts[0] and "7.000" in texts[1]


def test_seeds_without_a_common_point_have_a_curve_each(make):
    """Nor does one that has not begun take the curve of the others; runs of one kind alone have theirs too."""
    seeds = {seed: {"seed": seed} for seed in range(3)}
    other = make("other", 64, settings={"model.depth": 2})
    begun = [make("m-seed-0", 32, settings=seeds[0]), make("m-seed-1", 64, settings=seeds[1])]
    for run, step in zip(begun, (2, 4), strict=True):
        (run.path / "results.jsonl").unlink()
        add_result(run.path, step, RESULTS)
    begun = [read_run(run.path, run.name, run.settings) for run in begun]
    loss, fid = comparison_charts([*begun, make("m-seed-2", 0, settings=seeds[2]), other])
    assert [line.name for line in loss.lines] == ["m, mean of 2", "other"]
    assert [line.name for line in fid.lines] == ["m-seed-0", "m-seed-1", "other"]
    assert [line.name for line in comparison_charts(begun)[0].lines] == ["m-seed-0", "m-seed-1"]


def test_what_was_measured_on_real_images_is_told_apart(make):
    """From the loss of training, with all digits that it needs, and which images these were."""
    runs = [make("a", 64), make("b", 64, settings={"model.depth": 2})]
    for run, value, split in zip(runs, (0.041234, 0.040987), ("held_out", "train"), strict=True):
        (run.path / "results.jsonl").unlink()
        answer = {
            "request": {"checkpoint": {"path": "step-000000000004"}, "data": {"split": split}},
            "image_metrics": {"loss": value, "num_samples": 360},
        }
        (run.path / "results.jsonl").write_text(json.dumps(answer) + "\n")
    table = compare([read_run(run.path, run.name, run.settings) for run in runs]).table
    titles = [column.title for column in table.columns]
    assert len(titles) == len(set(titles)) and cells(table, "loss") == [run.last("loss") for run in runs]
    assert cells(table, "loss, real images") == [0.041234, 0.040987]
    assert [row[titles.index("loss, real images")] for row in table.texts()] == ["0.04123", "0.04099"]
    assert cells(table, "measured") == ["360 real images, held_out", "360 real images, train"]
    assert "Not all were measured in the same way: see the last column." in table.notes and len(table.notes) == 2


def test_what_was_measured_too_late_for_the_terms_is_told(make):
    runs = [make("a", 64, settings={"seed": seed}) if seed else make("b", 64, macs=2 * 10**9) for seed in (0, 1)]
    (runs[0].path / "results.jsonl").unlink()
    add_result(runs[0].path, 4, RESULTS)
    runs[0] = read_run(runs[0].path, "b", runs[0].settings, costs=runs[0].costs)
    compared = compare(runs, "compute")
    assert cells(compared.table, "FID-digits") == [None, 25.0]
    assert any(note.startswith("Measured at a later point only: b.") for note in compared.table.notes)
    assert compared.seeds.caption.endswith(compared.terms) and set(compared.table.notes) < set(
        compared.seeds.notes
    )
    assert not any("later point" in note for note in compare(runs).table.notes)


def test_what_one_seed_lacks_has_no_mean(make, tmp_path):
    unmeasured = read_run(make_run(tmp_path / "b", [record(64)]), "b", {**SETTINGS, "seed": 1})
    table = compare([make("a", 64), unmeasured]).seeds
    assert table.rows[0][0] == "a, b" and cells(table, "FID-digits") == [None] and cells(table, "images") == [64]


def test_losses_of_different_objectives_are_not_to_be_compared(make):
    runs = [make("a", 32), make("b", 32, settings={"objective.prediction": "v"})]
    assert any("losses cannot be compared" in note for note in compare(runs).table.notes)


def test_published_figures_stand_beside_imagenet_at_their_size_and_nothing_else(make):
    shape = {"image_shape": (3, 256, 256)}
    imagenet = [make("a", 32, settings=IMAGENET, **shape), make("b", 32, settings=IMAGENET, **shape)]
    table = compare(imagenet).table
    assert cells(table, "run")[2:] == [row.name for row in ROWS if row.pixels == 256]
    assert cells(table, "FID")[2:] == [row.fid for row in ROWS if row.pixels == 256]
    assert set(cells(table, "measured")[2:]) == {SOURCE}
    assert cells(table, "FID")[:2] == [None, None] and cells(table, "FID-digits")[2] is None
    for others in (
        [make("c", 32), make("d", 32)],
        [imagenet[0], make("e", 32)],
        [make("f", 32, settings=IMAGENET, image_shape=(3, 128, 128))],
        [
            make(
                "g",
                32,
                settings={"data._target_": "diffussm.data.latents.LatentSet", "data.path": "lsun"},
                **shape,
            )
        ],
    ):
        assert len(compare(others).table.rows) == len(others)
    assert len(compare(imagenet, "compute").table.rows) == 2  # they are not at these terms
    latents = {"data._target_": "diffussm.data.latents.LatentSet", "data.path": "latents/imagenet512"}
    wide = make("h", 32, settings=latents, image_shape=(3, 512, 512))
    assert cells(compare([wide]).table, "run")[1:] == ["DiT-XL/2-G", "DiffuSSM-XL-G"]


def test_published_totals_are_images_times_published_cost():
    for row in ROWS:
        if row.name.startswith("DiT-XL/2"):
            macs = {256: 118.64, 512: 524.6}[row.pixels]
            assert row.gflops == pytest.approx(row.images * macs, rel=0.01)


def test_fid_is_drawn_over_images_with_the_published_curves_on_imagenet_only(make, tmp_path):
    shape = {"image_shape": (3, 256, 256)}
    path = make_run(tmp_path / "imagenet", [record(16)])
    add_result(path, 1, {"FID": 20.0})
    run = read_run(path, "imagenet", {**SETTINGS, **IMAGENET}, **shape)
    _, fid = comparison_charts([run])
    assert fid.title == "FID" and [line.name for line in fid.lines][1:] == [
        "DiffuSSM-S (paper)", "DiffuSSM-L (paper)", "DiffuSSM-XL (paper)",
    ]  # fmt: skip
    assert fid.lines[3].x == {"images": [12_800_000, 25_600_000, 51_200_000, 76_800_000, 102_400_000]}
    (_, digits) = comparison_charts([make("a", 64)])
    assert [line.name for line in digits.lines] == ["a"] and digits.title == "FID-digits"
