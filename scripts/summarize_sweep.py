"""Mean and spread over seeds of what `diffussm evaluate` measured on the runs of a sweep.

python scripts/summarize_sweep.py runs/SWEEP    # prints a table; writes summary.csv and summary.md there
"""

import csv
import json
import statistics
import sys
from pathlib import Path


def read(sweep: Path) -> dict[tuple[tuple[str, str], ...], list[dict[str, float]]]:
    """The metrics of each seed, by the other choices."""
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, float]]] = {}
    for name, chosen in json.loads((sweep / "sweep.json").read_text())["jobs"].items():
        key = tuple((key, value) for key, value in chosen.items() if key != "seed")
        runs = groups.setdefault(key, [])
        path = sweep / name / "results.json"
        if path.exists():
            results = json.loads(path.read_text())
            found = {**results.get("metrics", {}), **results.get("image_metrics", {})}
            runs.append({key: value for key, value in found.items() if isinstance(value, float)})
    return groups


def summarize(sweep: Path) -> list[list[str]]:
    """A heading and a row for each of the choices: mean ± standard deviation of every metric."""
    groups = read(sweep)
    keys = list(dict.fromkeys(key for group in groups for key, _ in group))
    metrics = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run))
    rows = [[*keys, "seeds", *metrics]]
    for group, runs in groups.items():
        cells = []
        for metric in metrics:
            values = [run[metric] for run in runs if metric in run]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        rows.append([*(dict(group).get(key, "") for key in keys), str(len(runs)), *cells])
    return rows


def main(sweep: Path) -> None:
    rows = summarize(sweep)
    with (sweep / "summary.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    (sweep / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "sweep.json").exists():
        sys.exit("usage: summarize_sweep.py runs/SWEEP, the directory of a sweep")
    main(Path(sys.argv[1]))
