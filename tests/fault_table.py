"""What a run has to survive, and how the tests that show it are printed as a table at the end.

A test of row G1 is marked `@pytest.mark.fault("G1")`, and says by the fixture `figure` what it has found:
`figure(f"{identical}/{kills} identical", "30/30 identical")`. Any test may; each figure is a line of the table.
"""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    """A fault, what is promised, and the figure that all tests together reach."""

    fault: str
    promise: str
    figure: str


ROWS = {
    "G1": Row(
        "SIGKILL at any time",
        "the same command continues, with the result of a run that was never killed",
        "30/30 resume, at least 10 killed in a save, final tensors identical",
    ),
    "G2": Row(
        "SIGTERM, SIGUSR1",
        "all ranks stop at the next step with a full checkpoint",
        "12/12, 0 steps lost, 0 orphans",
    ),
    "G3": Row(
        "a rank dies or stalls",
        "no hang, the job starts again unaided",
        "20/20 identical, at most 20 s to the next step",
    ),
    "G4": Row(
        "disk full",
        "one line, older checkpoints intact, one retry, training goes on; the third failure stops",
        "10/10, 0 partial files",
    ),
    "G5": Row(
        "checkpoint truncated, flipped, incomplete",
        "found, named, fallen back from; refused when none is valid",
        "100/100 flips, 40/40 truncations, 0 silent fresh starts",
    ),
    "G6": Row(
        "hostile checkpoint, archive or configuration", "refused, nothing executed or written outside", "12/12"
    ),
    "G8": Row(
        "corrupt or odd images",
        "listed with the reason, skipped; stop above a share",
        "8/8 kinds listed, exact count",
    ),
    "G9": Row(
        "NaN on one rank",
        "step skipped on all, counted; endless NaN stops",
        "ranks equal, stop within 20 steps, nothing non-finite saved",
    ),
    "G10": Row(
        "other ranks, workers or accumulation on resume",
        "the same samples, times, noise and drops in every step",
        "100 % of steps equal, weights within 1e-6 after 200",
    ),
    "G12": Row(
        "loader worker killed", "replaced at the exact position", "no sample lost or repeated, in a save too"
    ),
    "G13": Row("logger raises, hangs, is absent", "training unaffected", "0 lines lost in metrics.jsonl"),
    "G14": Row("bad configuration", "one line, exit 2, under 5 s, no file created", "40/40"),
    "G15": Row("checkpoint of another model, latents of another VAE", "refused, both sides named", "10/10"),
    "G16": Row(
        "configuration drift on resume",
        "what changes the result is refused with a diff; what does not is accepted and told",
        "100 % of keys",
    ),
    "G17": Row(
        "sampling killed, resumed, on other ranks",
        "the requested images, once each",
        "10 kills over 5,000 images: 0 missing, 0 double, same hash",
    ),
    "G18": Row("any N, batch and rank count in evaluation", "statistics over exactly N", "FID equal to 1e-6"),
    "G19": Row(
        "encoding killed; two writers", "resumes by shard; second writer refused", "10 kills, same hash of the set"
    ),
    "G20": Row("data set larger than memory", "bounded private memory", "at most 1 GiB, no slope"),
    "G21": Row("run directory unwritable, a file, in use", "one line, before work", "5/5"),
    "G23": Row("EMA over kills and ranks", "equals the closed form, on every rank", "exact"),
    "G25": Row(
        "long run",
        "no leak, no growth of open files, no zombie",
        "3,000 steps, slope under 0.1 MiB per 100 steps",
    ),
}

KEY = "fault figure"
_outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # row -> test -> outcome
_figures: dict[str, list[tuple[str, str]]] = defaultdict(list)  # row -> (found, wanted)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Tell what was found, for the table; `wanted` is left out where the row says it."""

    def tell(found: str, wanted: str = "") -> None:
        # Such properties come back from other processes too.
        request.node.user_properties.append((KEY, (found, wanted)))

    return tell


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(row): shows a row of the table of faults; pytest -m fault runs and prints all of them"
    )
    config.addinivalue_line("markers", "slow: the full counts of the table of faults; not run by default")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        rows = [row for mark in item.iter_markers("fault") for row in mark.args]
        if unknown := [row for row in rows if row not in ROWS]:
            raise pytest.UsageError(f"{item.nodeid}: no row {unknown[0]} in the table of faults")
        item.user_properties += [("fault row", row) for row in rows]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        rows = [value for key, value in report.user_properties if key == "fault row"]
        for row in rows:
            _outcomes[row][report.nodeid] = report.outcome
            _figures[row] += [tuple(value) for key, value in report.user_properties if key == KEY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _outcomes:
        terminalreporter.section("faults survived")
        for line in _table():
            terminalreporter.line(line)


def _table() -> Iterator[str]:
    """The rows that were tested, wrapped into columns."""
    widths = (4, 26, 38, 32, 44, 9)
    yield from _cells(("row", "fault", "promise", "figure to reach", "found", "tests"), widths)
    yield from _cells(tuple("-" * width for width in widths), widths)
    for name in (name for name in ROWS if name in _outcomes):
        row, outcomes = ROWS[name], list(_outcomes[name].values())
        passed = f"{outcomes.count('passed')}/{len(outcomes)}"
        found = (
            f"{passed} refused or survived"
            if not _figures[name]
            else "\n".join(text + (f" (of {wanted})" if wanted else "") for text, wanted in _figures[name])
        )
        is_lost = set(outcomes) - {"passed", "skipped"}
        yield from _cells(
            (name, row.fault, row.promise, row.figure, found, passed + " FAIL" * bool(is_lost)), widths
        )


def _cells(texts: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = [
        [part for line in text.split("\n") for part in textwrap.wrap(line, width)]
        for text, width in zip(texts, widths, strict=True)
    ]
    for number in range(max(map(len, columns))):
        cells = (
            (column[number] if number < len(column) else "").ljust(width)
            for column, width in zip(columns, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
