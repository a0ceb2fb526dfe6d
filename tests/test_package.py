"""The wheel works outside the checkout, with nothing of the checkout in sight."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_ships_configs_weights_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"diffussm/configs/{config.relative_to(ROOT / 'configs')}" in names
    for name in ("digits_cnn.safetensors", "digits_reference.npz"):
        assert f"diffussm/evaluation/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "scripts")) for name in names)


def test_wheel_trains_outside_the_checkout(wheel, tmp_path):
    from conftest import SMALL_RUN

    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "elsewhere").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import diffussm; from diffussm.cli import main; "
        "print(diffussm.__file__); sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "train", *SMALL_RUN],
        cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert result.stdout.startswith(str(site))
    assert (tmp_path / "elsewhere" / "runs" / "digits" / "status.json").exists()
