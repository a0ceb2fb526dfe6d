"""Search for good values with Optuna: each trial is a run and its evaluation, by the commands that one types.

    python scripts/tune.py NAME METRIC TRIALS [key=value ...]       # needs diffussm[optuna]
    python scripts/tune.py lr FID-digits 20 experiment=digits model.d_state=8,16 'optimizer.lr=interval(1e-3,2e-2)'

An interval, interval(1e-3,2e-2,log) too, or a list of values is searched, every other override is fixed. METRIC,
of results.json, is to be small. Trials are kept in runs/NAME/study.log: run again, the command goes on
until there are as many. (Hydra's own Optuna sweeper asks for Optuna 2, whose storage does not work with the
SQLAlchemy of today.)
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

INTERVAL = re.compile(r"interval\(([^,]+),([^,]+?)(,\s*log)?\)")


def suggest(trial: optuna.Trial, key: str, values: str) -> str:
    """An override of `key`, chosen by Optuna where there is something to choose."""
    if found := INTERVAL.fullmatch(values):
        return f"{key}={trial.suggest_float(key, float(found[1]), float(found[2]), log=found[3] is not None)}"
    choices = values.split(",")
    is_list = len(choices) == 1 or values[:1] in "[{'\""
    return f"{key}={values if is_list else trial.suggest_categorical(key, choices)}"


def main(name: str, metric: str, count: int, overrides: list[str]) -> None:
    root = Path("runs") / name
    root.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(root / "study.log"))), study_name=name, load_if_exists=True
    )

    def measure(trial: optuna.Trial) -> float:
        chosen = [suggest(trial, *override.split("=", 1)) for override in overrides]
        run = root / f"trial-{trial.number}"
        for arguments in (["train", *chosen, f"run_dir={run}"], ["evaluate", f"checkpoint={run}"]):
            command = [sys.executable, "-m", "diffussm", *arguments]
            code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
            if code == 75:
                study.stop()
            if code:
                raise RuntimeError(f"{' '.join(command)}: exit code {code}")
        metrics = json.loads((run / "results.json").read_text())["metrics"]
        if metric not in metrics:
            raise SystemExit(f"METRIC={metric}: was not measured: choose one of {', '.join(metrics)}")
        return metrics[metric]

    def finished() -> list[optuna.trial.FrozenTrial]:
        return study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])

    study.optimize(measure, n_trials=max(0, count - len(finished())), catch=RuntimeError)
    if not finished():
        raise SystemExit("no trial has come to its end: see above")
    print(f"{metric} {study.best_value:.4g}: {' '.join(f'{k}={v}' for k, v in study.best_params.items())}")


if __name__ == "__main__":
    if len(sys.argv) < 5 or not sys.argv[3].isdecimal() or not all("=" in override for override in sys.argv[4:]):
        sys.exit("usage: tune.py NAME METRIC TRIALS key=value ...")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
