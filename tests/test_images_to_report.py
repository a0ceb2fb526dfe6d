"""From a folder of photographs to a report, by the script that the README names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data.damaged import make_folder
from data.tiny_vae import make_tiny_vae
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
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
        str(ROOT / "scripts" / "images_to_report.sh"),
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
