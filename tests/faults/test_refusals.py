"""What cannot be is refused in one line before anything is done, in a process of its own; the rest is told."""

import fcntl
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from data.photographs import crop, encoded
from data.stand_ins import PatchProjection
from faults.runs import checkpoints, command
from omegaconf import OmegaConf
from PIL import Image
from test_cli import BAD_INPUT
from test_config import another, set_key

from diffussm.cli import main
from diffussm.commands.train import find_changes
from diffussm.compose import compose
from diffussm.config import leaves, may_change
from diffussm.data.decode import decode
from diffussm.data.encoding import Encoding
from diffussm.data.images import ImageFolder
from diffussm.runtime.errors import BadImage, ConfigError, DataError
from diffussm.runtime.run_dir import RunDirectory


@pytest.mark.fault("G14")
@pytest.mark.parametrize(
    "cases", [BAD_INPUT[:60:10], pytest.param(BAD_INPUT[1:80:2], marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_bad_configurations_end_in_one_line_soon(jobs, tmp_path, figure, cases):
    """In processes of their own, whose interpreter and imports are not counted."""
    right, longest = 0, 0.0
    names = {path.name for path in jobs.folder.iterdir()}
    for arguments, code, says in cases:
        started = time.monotonic()
        job = jobs.start(*arguments)
        assert job.wait() == code, job.said
        longest = max(longest, time.monotonic() - started)
        assert says in job.said and job.said.count("\n") == 1, job.said
        right += 1
        names |= {job.out.name, job.err.name}
    assert {path.name for path in jobs.folder.iterdir()} == names  # which is where they ran
    figure(f"{right}/{len(cases)} in one line, the slowest in {longest:.1f} s, 0 files created")
    assert right == len(cases)


OTHER_MODELS = [
    ("model.hidden_size=32",), ("model.depth=2",), ("model.d_state=8",), ("model.hourglass_ratio=1",),
    ("model.bidirectional=false",), ("model.reading=equation",), ("model.learn_sigma=false",),
    ("model.num_classes=null", "guidance.scale=1"), ("model.class_dropout_prob=0", "guidance.scale=1"),
    ("model=dit_tiny", "model.hidden_size=16", "~model.d_state"), ("trainer.ema_decays=[0.5]",),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("refusals") / "run"
    assert main(command(path, "trainer.total_images=32")) == 0
    return path


@pytest.mark.fault("G15")
def test_a_checkpoint_of_another_model_is_refused_with_both_sides(run, tmp_path, capsys, figure):
    shutil.copytree(run, tmp_path / "run")
    refused = 0
    for overrides in OTHER_MODELS:
        small = [
            key for key in command(tmp_path / "run") if "~model.d_state" not in overrides or "d_state" not in key
        ]
        more = [override for override in overrides if not override.startswith("~")]
        assert main([*small, "trainer.total_images=64", "allow_config_change=true", *more]) == 73, overrides
        said = capsys.readouterr().err.splitlines()[-1]
        both = (" there and " in said and "in the model" in said) or ("ema_0.998" in said and "ema_0.5" in said)
        assert both, said
        refused += both
    assert [found.name for found in checkpoints(tmp_path / "run")] == ["step-000000000002"]
    # What was refused has left no trace: the run is still the one that it was.
    assert main(command(tmp_path / "run", "trainer.total_images=64")) == 0
    figure(f"{refused}/{len(OTHER_MODELS)} refused, both sides named")


@pytest.mark.fault("G16")
def test_every_key_that_changes_is_refused_or_told(run, tmp_path, figure):
    shutil.copytree(run, tmp_path / "run")
    directory, file = RunDirectory(tmp_path / "run"), tmp_path / "run" / "config.yaml"
    config = compose("train", command(run, "trainer.total_images=32")[1:])
    resolved = OmegaConf.to_container(config, resolve=True)
    refused = told = 0
    keys = [key for key, _ in leaves(resolved)]
    for key in keys:
        before = OmegaConf.to_container(config, resolve=True)
        set_key(before, key, another(dict(leaves(resolved))[key]))
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(before)))
        content = file.read_bytes()
        if may_change(key):
            told += any(line.startswith(f"{key}: ") for line in find_changes(directory, config))
        else:
            with pytest.raises(ConfigError, match="holds a run with another configuration") as caught:
                find_changes(directory, config)
            refused += f"({key}: " in str(caught.value) and " -> " in str(caught.value)
        assert file.read_bytes() == content
    figure(f"{refused + told}/{len(keys)} keys: {refused} refused, {told} told")
    assert refused + told == len(keys) > 60 and refused > 20 and told > 20


@pytest.mark.fault("G21")
def test_a_run_directory_that_cannot_be_is_one_line_before_any_work(run, tmp_path, capsys, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to("circle")
    shutil.copytree(run, tmp_path / "used")
    cases = {
        "file": "file is a file",
        "file/run": "file is a file",
        "/proc/run": "/proc",
        "circle": "circle",
        "used": "another process is using it",
        "x" * 300: "File name too long",
    }
    before = sorted(tmp_path.rglob("*"))
    refused = 0
    with (tmp_path / "used" / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, says in cases.items():
            code = main(command(Path(name), "trainer.total_images=64"))
            said = capsys.readouterr().err
            right = code == 73 and said.startswith("diffussm: ") and said.count("\n") == 1 and says in said
            assert right, (name, code, said)
            refused += right
    figure(f"{refused}/{len(cases)} refused in one line")
    assert sorted(tmp_path.rglob("*")) == before


def png(image: Image.Image) -> bytes:
    return encoded(image, "PNG")


BAD_KINDS = {
    "truncated": encoded(crop(1), "JPEG")[:-200],
    "empty": b"",
    "text": b"<html>404</html>",
    "1x1": png(Image.new("RGB", (1, 1))),
    "bomb": png(Image.new("1", (12_000, 12_000))),
    "cut header": png(crop(2))[:60],
    "line": png(Image.new("L", (900, 2))),
    "floats": encoded(Image.new("F", (40, 40), 0.5), "TIFF"),
}


def odd_kinds() -> dict[str, bytes]:
    """Sound images that careless readers spoil."""
    deep = Image.fromarray(np.asarray(crop(3).convert("L")).astype(np.uint16) * 257)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "cmyk": encoded(crop(4).convert("CMYK"), "JPEG"),
        "16 bit": png(deep),
        "rotated": encoded(crop(5, 60, 40), "JPEG", exif=rotated.tobytes()),
        "palette": png(crop(6).convert("P")),
    }


@pytest.mark.fault("G8")
def test_bad_images_of_a_folder_are_listed_and_odd_ones_are_read(tmp_path, figure):
    folder = tmp_path / "images"
    folder.mkdir()
    sound = png(crop(7))
    for index in range(400):
        (folder / f"{index:03d}.png").write_bytes(sound)
    for index, content in enumerate(BAD_KINDS.values()):
        (folder / f"{40 * index:03d}.png").write_bytes(content)
    odd = odd_kinds()
    for index, content in enumerate(odd.values()):
        (folder / f"{40 * index + 7:03d}.png").write_bytes(content)
    names = [f"{40 * index:03d}.png" for index in range(len(BAD_KINDS))]

    def encode(to: Path, fraction: float):
        source = ImageFolder(folder, 32, max_bad_fraction=fraction)
        encoding = Encoding(source, PatchProjection(), to, batch_size=16, shard_size=128)
        encoding.open()
        try:
            return encoding.run()
        finally:
            encoding.close()

    latents = encode(tmp_path / "set", 0.02)
    listed = [json.loads(line) for line in (tmp_path / "set/bad_files.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in listed] == names and all(entry["reason"] for entry in listed)
    assert decode(odd["rotated"]).size == (40, 60)
    with pytest.raises(BadImage):
        decode(BAD_KINDS["truncated"])
    with pytest.raises(DataError, match=r"8 of 400 images cannot be read so far.*max_bad_fraction=0\.019"):
        encode(tmp_path / "strict", 0.019)
    figure(f"{len(listed)}/8 kinds listed, {len(odd)}/4 odd kinds read, {len(latents)} of 400 encoded")
    assert len(latents) == 392
