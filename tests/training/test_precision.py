"""The same losses whatever a step is computed in, and how; TF32 where it may be; loss scales that all share."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN
from test_trainer import make_trainer, records

from diffussm.models import S4D, convolution
from diffussm.runtime.errors import ConfigError
from diffussm.training.compilation import compile_blocks, naming_compile_failures
from diffussm.training.precision import Precision

# A learning rate at which rounding is not blown up within 10 steps.
STEADY = (
    "optimizer.lr=1e-3",
    "model.depth=2",
    "trainer.total_images=160",
    "trainer.log_every_images=16",
    "trainer.save_every_images=160",
)
RECOMPUTING = "model.activation_checkpointing=true"
FP32 = "trainer.precision=fp32"


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> list[dict]:
    """fp32, nothing compiled."""
    path = tmp_path_factory.mktemp("precision") / "exact"
    make_trainer(path, *STEADY, FP32).run()
    return records(path)


def distance(path: Path, exact: list[dict]) -> float:
    """The largest relative difference of the losses of any step."""
    ours = records(path)
    assert len(ours) == len(exact) == 10
    return max(abs(mine["loss"] / theirs["loss"] - 1) for mine, theirs in zip(ours, exact, strict=True))


# What leaves fp32 as it is, reorders sums at most; fp16 rounds to 11 bits, bf16 to 8.
@pytest.mark.parametrize(
    ("tolerance", "is_fused", "overrides"),
    [
        (0, True, []),
        (0, True, ["trainer.tf32=false"]),
        (1e-6, False, []),
        (1e-6, True, [RECOMPUTING]),
        (1e-6, True, ["trainer.device_batch_size=5"]),
        (2e-3, True, ["trainer.precision=bf16"]),
        (2e-3, True, ["trainer.precision=bf16", RECOMPUTING, "trainer.device_batch_size=4"]),
        (2e-4, True, ["trainer.precision=fp16"]),
        (2e-4, False, ["trainer.precision=fp16"]),
    ],
    ids=str,
)
def test_losses_are_those_of_fp32(tmp_path, exact, overrides, tolerance, is_fused):
    trainer = make_trainer(tmp_path, *STEADY, FP32, *overrides)
    if "trainer.precision=fp16" in overrides:  # the default scale overflows at first, by design
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    if not is_fused:
        trainer.optimizer._step_supports_amp_scaling = False
        for group in trainer.optimizer.param_groups:
            group["fused"] = False
    trainer.run()
    assert trainer.skipped_steps == 0
    assert distance(tmp_path, exact) <= tolerance


# In a process of its own, without the shape checks of the tests, and without a compiler of C++.
COMPILED = """
import functools, sys
from diffussm.cli import main
from diffussm.training import trainer

def failing(graph, inputs):
    raise OSError("no compiler")

name = sys.argv.pop(1)
trainer.compile_blocks = functools.partial(trainer.compile_blocks, backend={"failing": failing}.get(name, name))
sys.exit(main())
"""


def train_compiled(path: Path, backend: str, *overrides: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        COMPILED,
        backend,
        "train",
        *SMALL_RUN,
        *STEADY,
        f"run_dir={path}",
        *overrides,
    ]
    command += ["trainer.compile=true", "sampler=none"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("tolerance", "overrides"),
    [
        (1e-6, [FP32]),
        (2e-3, ["trainer.precision=bf16", RECOMPUTING, "trainer.device_batch_size=5"]),
    ],
    ids=str,
)
def test_compiled_losses_are_those_of_fp32(tmp_path, exact, tolerance, overrides):
    result = train_compiled(tmp_path, "aot_eager", *overrides)
    assert result.returncode == 0, result.stderr
    assert distance(tmp_path, exact) <= tolerance


def test_what_cannot_be_compiled_ends_the_run_in_one_line(tmp_path):
    result = train_compiled(tmp_path, "failing", FP32)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("diffussm: trainer.compile=true: a block cannot be compiled")
    assert "no compiler" in last and "set it to false" in last
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_other_errors_pass_by_as_they_are():
    with pytest.raises(RuntimeError, match="another"), naming_compile_failures():
        raise RuntimeError("another")


def test_only_the_blocks_are_compiled_and_no_average_is(tmp_path):
    trainer = make_trainer(tmp_path, "trainer.compile=true")
    plain = make_trainer(tmp_path)
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())
    compiled = [name for name, module in trainer.model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["blocks.0"]
    assert all(module._compiled_call_impl is None for module in trainer.averages.first.modules())


def test_a_model_without_blocks_is_not_compiled():
    with pytest.raises(ConfigError, match=r"trainer\.compile=true: Linear has no blocks"):
        compile_blocks(torch.nn.Linear(1, 1))


def products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("tf32", "expected"), [(True, ("high", True)), (False, ("highest", False))])
def test_tf32_is_as_chosen_within_a_pass_and_as_before_afterwards(tf32, expected):
    before = products()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), Precision("fp32", torch.device("cuda"), tf32).products():
            assert products() == expected
            raise KeyError
        assert products() == before
        with Precision("fp32", torch.device("cpu"), tf32).products():
            assert products() == before


def test_a_state_space_model_sees_no_tf32(monkeypatch):
    seen, product = [], torch.bmm

    def spy(*factors):
        is_new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
        seen.append(torch.backends.cuda.matmul.fp32_precision if is_new else torch.get_float32_matmul_precision())
        return product(*factors)

    monkeypatch.setattr(convolution.torch, "bmm", spy)
    with Precision("fp32", torch.device("cuda")).products():
        S4D(2, d_state=4)(torch.randn(1, 9, 2)).sum().backward()
        assert products() == ("high", True)
    assert len(seen) >= 2 and set(seen) <= {"ieee", "highest"}


OVERFLOWING = """
import hashlib, json, sys
from diffussm.cli import main
from diffussm.training.trainer import Trainer

run = Trainer.run

def run_and_tell(self, **options):
    to_latents, is_last = self.to_latents, self.processes.rank == 1
    self.to_latents = lambda *batch: to_latents(*batch) * (float("inf") if is_last and self.step == 5 else 1)
    run(self, **options)
    weights = b"".join(tensor.numpy().tobytes() for tensor in self.model.state_dict().values())
    told = self.precision.scaler.state_dict(), self.skipped_steps, hashlib.sha256(weights).hexdigest()
    print("TOLD " + json.dumps(told), flush=True)

Trainer.run = run_and_tell
sys.exit(main())
"""


def test_an_overflow_in_one_process_is_skipped_and_scales_down_in_all(tmp_path):
    script = tmp_path / "overflowing.py"
    script.write_text(OVERFLOWING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    overrides = [f"run_dir={tmp_path / 'run'}", "trainer.precision=fp16", "sampler=none"]
    result = subprocess.run(
        [*launcher, "train", *SMALL_RUN, *overrides], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    first, last = (json.loads(text.splitlines()[0]) for text in result.stdout.split("TOLD ")[1:])
    assert first == last
    scale, skipped_steps, _ = first
    assert skipped_steps >= 1 and scale["scale"] == 65536 / 2**skipped_steps
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "train_state.json").read_text())
    assert state["loss_scale"] == scale and state["skipped_steps"] == skipped_steps
