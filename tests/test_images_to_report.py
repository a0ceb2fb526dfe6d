"""From a folder of photographs to a report, by the script that the README names."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data.damaged import make_folder
from data.tiny_vae import make_tiny_vae
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "images_to_report.sh"
UNTRAINED = """\
_target_: diffussm.evaluation.evaluator.Evaluation
extractor:
  _target_: diffussm.evaluation.inception.Inception.untrained
reference: ???
num_samples: 64
every_images: null
k: 3
class_agreement: false
intervals: false
extrapolate: false
"""


@pytest.mark.slow  # some minutes
def test_the_script_leads_from_images_to_a_report(tmp_path):
    make_folder(tmp_path / "images")
    make_tiny_vae(tmp_path / "vae")
    (tmp_path / "configs" / "evaluation").mkdir(parents=True)
    (tmp_path / "configs" / "evaluation" / "untrained.yaml").write_text(UNTRAINED)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, command in (("diffussm", "-m diffussm"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "IMAGES_SEEN": "6k",
    }  # fmt: skip
    out = tmp_path / "out"
    measured = ["evaluation=untrained", "--config-dir", str(tmp_path / "configs")]
    script = [
        "bash",
        str(SCRIPT),
        *map(str, (tmp_path / "images", tmp_path / "vae")),
    ]
    for _ in range(2):  # the second time, all is there
        result = subprocess.run(
            [*script, str(out), *measured],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("finished at 6,016 images; nothing to do") == 2
    for name in ("diffussm", "dit"):
        run = out / "runs" / name
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert sum(record.get("event") == "resume" for record in events) == (name == "diffussm")
        assert json.loads((run / "results.json").read_text())["metrics"]["FID"] > 0
    assert json.loads((out / "latents" / "manifest.json").read_text())["source"]["num_images"] == 73
    for folder in ("compare", "report"):
        page = (out / folder / "report.html").read_text()
        assert "2 runs compared" in page and "data:image/" in page
    pictures = [*out.glob("**/*.png")]
    assert len(pictures) > 20
    for picture in pictures:
        Image.open(picture).verify()
    for path in out.rglob("*.json*"):
        documents = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        assert all(json.loads(document) is not None for document in documents)
    for path in out.rglob("*.npy"):
        assert len(np.load(path)) > 0
    with np.load(out / "reference.npz") as reference:
        assert len(reference["mu"]) > 0 and len(reference["arr_0"]) > 0
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert len(list(tensors.keys())) > 0
    tables = [*out.rglob("*.csv")]
    assert tables and all(len({len(row) for row in csv.reader(path.open())}) == 1 for path in tables)


def test_without_an_evaluation_it_tells_how_it_is_used(tmp_path):
    given = [str(tmp_path), "vae", str(tmp_path / "out")]
    result = subprocess.run(["bash", str(SCRIPT), *given], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and not result.stdout and not (tmp_path / "out").exists()
    said = result.stderr.splitlines()
    assert "IMAGES VAE OUT evaluation=NAME" in said[0] and said[-1].endswith("or only reports.")
    assert "RESOLUTION=64" in result.stderr and "set -euo" not in result.stderr
