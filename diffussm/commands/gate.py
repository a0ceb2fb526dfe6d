"""The gate of `evaluate`: judge results by limits and a baseline, or add them to one."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffussm.build import shipped_path
from diffussm.commands import note
from diffussm.commands.in_processes import FAILED
from diffussm.config import GATED, MODEL_METRICS
from diffussm.evaluation.baseline import Baseline
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.gate import Rule, Spread, Verdict, judge, name_of
from diffussm.report.verdicts import junit, markdown
from diffussm.runtime.errors import ConfigError
from diffussm.runtime.run_dir import refuse_unwritable, write_atomically


class Gate:
    """What `gate.` asks for, found before anything is measured to be possible of these metrics and this request.

    Args:
        config: the `gate` of a configuration.
        request: what will be answered.
        measured: the names of the metrics that will be known.
    """

    def __init__(self, config: DictConfig, request: Mapping[str, Any], measured: Collection[str]) -> None:
        self.request, self.deviations = request, config.deviations
        self.rules = {
            name: Rule(side, config[f"{name}_{side}"], config[f"{name}_tolerance"]) for name, side in GATED.items()
        }
        for name, rule in self.rules.items():
            if rule.limit is not None and name not in measured:
                remedy = "set evaluation.extrapolate=true" if name == "fid_inf" else "add it to metrics"
                raise ConfigError(
                    f"gate.{name}_{rule.side}={rule.limit:g}: {name} is not measured: {remedy}, or choose from "
                    f"{', '.join(measured)}"
                )
        self.junit, self.summary, self.to_add = (_path(config, key) for key in ("junit", "summary", "add_to"))
        self.baseline: dict[str, Spread] = {}
        if config.relative_to is not None:
            self.baseline = self._read(shipped_path(config.relative_to), measured)
        if self.to_add is not None and self.to_add.exists():
            Baseline.read(self.to_add, "gate.add_to").refuse_other(request)

    def judge(self, results: Mapping[str, Any]) -> list[Verdict]:
        """The verdicts, none without limits; before, add the results to the baseline that they were for."""
        metrics = {**results.get("image_metrics", {}), **results.get("metrics", {})}
        if self.to_add is not None:
            kept = {title: value for title, value in metrics.items() if name_of(title) in GATED}
            known = {title: value for title, value in kept.items() if value is not None}
            count = Baseline(self.to_add, "gate.add_to").add(self.request, known)
            print(f"baseline     {self.to_add}: {count} result(s)")
        return judge(metrics, self.rules, self.baseline, self.deviations)

    def facts(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Of what was judged, for those who read the verdicts elsewhere."""
        facts = {}
        if checkpoint := self.request.get("checkpoint"):
            facts["checkpoint"] = f"{checkpoint['path']} ({checkpoint['sha256'][:8]})"
        if "weights" in results:
            facts["weights"] = str(results["weights"])
        if "metrics" in results:
            facts["samples"] = f"{results['metrics']['num_samples']:,}"
        if "reference" in self.request:
            facts["reference"] = str(self.request["reference"]["file"])
        return facts

    def _read(self, path: Path, measured: Collection[str]) -> dict[str, Spread]:
        baseline = Baseline.read(path, "gate.relative_to")
        baseline.refuse_other(self.request)
        spreads = baseline.spreads([name for name in GATED if name in measured])
        if not spreads:
            raise ConfigError(f"gate.relative_to={path}: has none of {', '.join(measured)}: add to metrics")
        for title, spread in spreads.items():
            name = name_of(title)
            if spread.std is None and not self.rules[name].tolerance:
                raise ConfigError(
                    f"gate.relative_to={path}: one result has no spread: add others to it (gate.add_to), or set "
                    f"gate.{name}_tolerance"
                )
        for name, rule in self.rules.items():
            if rule.tolerance is not None and name not in map(name_of, spreads):
                raise ConfigError(
                    f"gate.{name}_tolerance={rule.tolerance:g}: {path.name} and the metrics do not share {name}: "
                    f"choose from {', '.join(map(name_of, spreads))}"
                )
        return spreads


def conclude(judged: Sequence[tuple[Gate, Mapping[str, Any]]]) -> int:
    """Print a line for each verdict, write what was asked for; the exit code: 0, or 1 if a limit is broken.

    Args:
        judged: what each of the things that were measured is held to, and its results.
    """
    suites = [(verdicts, gate.facts(results)) for gate, results in judged if (verdicts := gate.judge(results))]
    if not suites:
        return 0
    first, _ = judged[0]  # all have the same settings
    broken: list[str] = []
    for verdicts, facts in suites:
        if len(judged) > 1:
            print(f"gate         of {facts.get('checkpoint')}:")
        for verdict in verdicts:
            print(f"gate         {verdict}")
        broken += [verdict.metric for verdict in verdicts if not verdict.passed]
    if first.junit is not None:
        write_atomically(first.junit, junit(suites))
    if first.summary is not None:
        first.summary.parent.mkdir(parents=True, exist_ok=True)
        with first.summary.open("a") as file:
            file.writelines(markdown(verdicts, facts) for verdicts, facts in suites)
    if broken:
        note(f"gate failed: {', '.join(dict.fromkeys(broken))}")
    return FAILED if broken else 0


def measured_names(evaluation: Evaluation | None, chosen: Collection[str]) -> list[str]:
    """The names of the metrics that are known once the `chosen` ones have been measured."""
    if evaluation is None:
        return list(chosen)
    available = {*evaluation.comparison.available, *MODEL_METRICS}
    names = [name for name in chosen if name in available]
    return [*names, *(["fid_inf"] if "fid" in names and evaluation.comparison.extrapolate else [])]


def _path(config: DictConfig, key: str) -> Path | None:
    """A file that can be written where the configuration says, as far as can be told before."""
    if config[key] is None:
        return None
    path = Path(config[key])
    if path.is_dir():
        raise ConfigError(f"gate.{key}={path}: is a directory: name a file")
    refuse_unwritable(path.parent, f"gate.{key}={path}", f"gate.{key}")
    return path
