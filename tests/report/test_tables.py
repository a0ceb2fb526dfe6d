"""Tables: the same numbers as Markdown, CSV and LaTeX, whatever the texts in them are."""

import csv
import io

import pytest

from diffussm.report.tables import Averaged, Column, Measured, Table, metric_text

HOSTILE = 'a|b & <script>alert(1)</script> 100% $x_1$ {y} ~^\\\nnext, "line"'
TABLE = Table(
    "results",
    "A caption of 50%.",
    [Column("run", is_text=True), Column("images"), Column("FID", metric_text)],
    [
        ["one", 96_000, Measured(5.6328, 5.4, 5.8)],
        [HOSTILE, None, Measured(120.25)],
        ["three", 7, float("nan")],
    ],
    ["A note."],
)


def test_markdown_is_aligned_and_no_cell_ends_early():
    lines = TABLE.markdown().splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[1].startswith("| ---") and lines[1].endswith("-: |")
    assert "| one " in lines[2] and "96,000 | 5.633 ±0.200 |" in lines[2]
    assert "<script" not in lines[3] and r"a\|b" in lines[3] and "120.2 |" in lines[3]
    assert lines[4].endswith("   - |")


def test_csv_keeps_the_numbers_and_the_texts_as_they_are():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["run", "images", "FID", "FID low", "FID high"]
    assert rows[1] == ["one", "96000", "5.6328", "5.4", "5.8"]
    assert rows[2] == [HOSTILE, "", "120.25", "", ""]


def test_a_mean_stands_with_its_deviation():
    table = Table(
        "seeds",
        "",
        [Column("FID", metric_text), Column("loss")],
        [[Averaged(6.93, 1.7112), Averaged(0.04321, 0.00123)], [5.0, None], [5.0, Averaged(21_333, 9237.6)]],
    )
    assert table.texts() == [["6.930 ±1.711", "0.04321 ±0.0012"], ["5.000", "-"], ["5.000", "21,333 ±9,238"]]
    assert table.csv().splitlines() == [
        "FID,FID deviation,loss,loss deviation",
        "6.93,1.7112,0.04321,0.00123",
        "5.0,,,",
        "5.0,,21333,9237.6",
    ]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Averaged(40.3257, 3.2638), "40.3 ±3.3"),
        (Measured(40.3257, 39.0, 42.0), "40.3 ±1.5"),
        (Measured(5.5, 5.4, 5.6), "5.500 ±0.100"),
        (Averaged(40.3257, 0.0123), "40.3 ±0.012"),  # which is not nothing
    ],
)
def test_a_spread_has_the_decimals_of_its_number(cell, text):
    assert Column("FID", metric_text).write(cell) == text


def test_latex_escapes_what_it_would_take_for_commands():
    text = TABLE.latex()
    assert r"a|b \& <script>" in text and r"100\% \$x\_1\$ \{y\} \textasciitilde{}\textasciicircum{}" in text
    assert r"\textbackslash{} next" in text and r"5.633 $\pm$0.200 \\" in text
    assert r"\begin{tabular}{lrr}" in text and r"\caption{A caption of 50\%. A note.}" in text
    assert text.count(r" \\") == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.6328, "5.633"), (56.94, "56.9"), (0.0, "0.000"), (0.00123, "0.00123"), (-243.2, "-243.2")],
)
def test_metrics_have_the_digits_they_deserve(value, text):
    assert metric_text(value) == text
