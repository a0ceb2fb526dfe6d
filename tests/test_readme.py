"""What the README says can be done can be done."""

import re
import shlex
from pathlib import Path

import pytest

from diffussm.compose import compose, expand

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [body for kind, body in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if kind == language]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines for command in started(shlex.split(line, comments=True))]


def started(words: list[str]) -> list[list[str]]:
    """The commands of diffussm that a line starts: its own, torchrun's, or those of the SLURM scripts."""
    if words[:1] == ["diffussm"]:
        return [words]
    if words[:1] == ["torchrun"]:
        return [words[words.index("diffussm") :]]
    found: list[list[str]] = []
    for word in words if "scripts/slurm/" in " ".join(words[:3]) else ():
        if word in ("encode", "train", "evaluate") or word.endswith(".sbatch"):
            found.append(["diffussm", Path(word).stem])
        elif found and not word.startswith("--"):
            found[-1].append(word)
    return found


def test_there_are_commands():
    assert len(commands()) >= 5
    assert len(started(shlex.split("sbatch --nodes=2 scripts/slurm/train.sbatch seed=1"))) == 1
    assert len([line for line in commands() if line[1:3] == ["train", "experiment=imagenet256_diffussm_xl"]]) >= 4


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_composes(command):
    overrides = [argument for argument in command[2:] if not argument.startswith("--")]
    if command[1] == "status":
        return  # it has no configuration
    if command[1] == "import":
        assert "=" not in overrides.pop(0)  # FILE
    if command[1] in ("compare", "report"):
        overrides = [override for override in overrides if "=" in override]  # the others are run directories
    if "--help" in command:
        return
    if overrides[:1] == ["-m"]:
        _, jobs = expand([override for override in overrides[1:] if not override.startswith("hydra")])
        assert len(jobs) > 1 and all(compose(command[1], job) for _, job in jobs)
        return
    trained = compose("train", ["experiment=digits"])
    parts = {key: trained[key] for key in ("sampler", "guidance", "sampling", "evaluation", "data", "autoencoder")}
    assert compose(command[1], overrides, from_checkpoint=parts)


def test_the_python_example_runs():
    # The export's example needs an export: tests/test_pipeline.py runs the same code from a model card.
    # Nor is there a run to load: tests/test_notebook.py makes one, and runs that block.
    elsewhere = ("from_pretrained", "load_checkpoint")
    for block in (block for block in blocks("python") if not any(name in block for name in elsewhere)):
        names: dict = {}
        exec(block, names)
        assert names["output"].shape == (2, 8, 16, 16)


def test_the_map_names_files_that_exist_and_all_of_them():
    shown = set(re.findall(r"\w+\.(?:py|sh)", next(b for b in blocks("") if b.startswith("configs/"))))
    shipped = {path.name for path in (ROOT / "diffussm").rglob("*.py")} - {"__init__.py", "__main__.py", "grid.py"}
    assert shipped <= shown
    assert all(list(ROOT.glob(f"**/{name}")) for name in shown)
