"""The arrows of the design: who may import whom, where Hydra lives, who reads the environment."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffussm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Module or package -> what it may import of ours, besides itself: whole packages, or one module of a package.
ALLOWED = {
    "runtime": set(),
    "models": set(),
    "diffusion": set(),
    "data": {"runtime"},
    "training": {"runtime"},
    "evaluation": {"runtime"},
    "report": {"runtime"},
    "plan": {"training"},
    "config": {"runtime"},
    "compose": {"config", "runtime"},
    "build": {"compose", "config", "runtime", "models", "diffusion", "data", "training", "evaluation", "report"},
    "commands": {
        "build", "compose", "config", "runtime", "pipeline", "plan",
        "models", "diffusion", "data", "training", "evaluation", "report", "bench",
    },
    "pipeline": {"models", "diffusion", "data"},
    "bench": {"build", "models", "diffusion", "data", "training", "evaluation", "runtime"},
    "cli": {"commands", "runtime"},
    "notebook": {"build", "commands", "evaluation", "runtime", "training"},
    "__main__": {"cli"},
    "__init__": {"build", "notebook"},
}  # fmt: skip
# Within a package: file -> files of the same package that it may import.
ALLOWED_WITHIN = {
    "models": {
        "layers": set(),
        "convolution": set(),
        "ssm": {"layers", "convolution"},
        "diffussm": {"layers", "ssm"},
        "dit": {"layers"},
        "classifier": {"layers", "ssm", "diffussm"},
        "layouts": {"layers"},
        "complexity": set(),
        "__init__": {"ssm", "diffussm", "dit", "classifier"},
    },
    "diffusion": {
        "schedule": set(),
        "process": {"schedule"},
        "timesteps": set(),
        "objective": {"process", "schedule"},
        "loss": {"objective", "process", "schedule", "timesteps"},
        "classification": {"objective", "process", "schedule"},
        "guidance": {"process"},
        "samplers": {"process", "schedule"},
        "solvers": {"process", "samplers", "schedule"},
        "flow": {"objective", "process", "samplers"},
        "likelihood": {"loss", "objective", "process", "samplers", "schedule"},
        "__init__": set(),
    },
    "bench": {
        "timing": set(), "memory": set(), "baselines": set(),
        "workload": {"memory", "timing"},
        "loading": {"timing", "workload"},
        "training": {"timing", "workload"},
        "evaluating": {"timing", "workload"},
        "scaling": {"memory", "timing", "workload"},
        "suites": {"baselines", "evaluating", "loading", "scaling", "training", "workload"},
        "report": {"scaling", "suites", "timing", "workload"},
        "__init__": set(),
    },
    "config": {
        "schema": set(), "keys": {"schema"}, "validation": {"keys", "schema"},
        "__init__": {"keys", "schema", "validation"},
    },
    "build": {
        "instantiation": set(),
        "weights": set(),
        "costs": {"instantiation"}, "evaluating": {"instantiation"}, "checks": {"instantiation"},
        "system": {"checks", "instantiation", "weights"},
        "training": {"costs", "evaluating", "instantiation", "system"},
        "__init__": {"checks", "costs", "evaluating", "instantiation", "system", "training", "weights"},
    },
    "runtime": {
        "errors": set(), "allocator": set(), "hashing": set(), "seeding": set(), "signals": set(),
        "run_dir": {"errors"},
        "jobs": {"errors", "signals"},
        "launch": {"errors"}, "distributed": {"errors", "launch"}, "environment": set(),
        "run_status": {"errors", "run_dir"}, "work_list": {"distributed", "errors", "run_dir"},
        "__init__": set(),
    },
}  # fmt: skip
READS_THE_ENVIRONMENT = {"launch", "environment"}  # of runtime
HYDRA_LIVES_IN = {"config", "compose", "build", "commands"}


def imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # what only the type checker sees is no arrow
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "diffussm":
                yield from (f"diffussm.{alias.name}" for alias in node.names)


def place(path: Path) -> tuple[str, str]:
    """("models", "ssm") for diffussm/models/ssm.py, ("cli", "cli") for diffussm/cli.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0], parts[-1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    package, file = place(path)
    for name in imports(path):
        if not name.startswith("diffussm."):
            continue
        target, *rest = name.split(".")[1:]
        if target != package:
            assert target in ALLOWED[package], f"{path.name} imports {name}"
        elif rest and package in ALLOWED_WITHIN and rest[0] != file:
            assert rest[0] in ALLOWED_WITHIN[package][file], f"{path.name} imports {name}"


def test_every_module_has_its_place():
    assert {place(path)[0] for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_and_the_environment_stay_where_they_belong(path):
    package, file = place(path)
    roots = {name.split(".")[0] for name in imports(path)}
    if package not in HYDRA_LIVES_IN:
        assert not roots & {"hydra", "omegaconf"}
    if package == "runtime":
        assert roots - {"diffussm", "torch"} <= sys.stdlib_module_names
    if package != "runtime" or file not in READS_THE_ENVIRONMENT:
        assert "os.environ" not in path.read_text() and "getenv" not in path.read_text()


def test_only_build_instantiates():
    users = [path.name for path in MODULES if "instantiate(" in path.read_text()]
    assert users == ["instantiation.py"]


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.splitlines()}
    agreed = {"pyproject.toml", "README.md", "configs", "diffussm", "scripts", "tests", "LICENSE"}
    assert {name for name in names if not name.startswith(".")} <= agreed


def test_importing_the_package_and_its_command_line_loads_nothing_heavy():
    heavy = {"torch", "hydra", "diffusers", "sklearn", "matplotlib"}
    code = f"import sys, diffussm, diffussm.cli; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
