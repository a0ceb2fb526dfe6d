"""Whole models compile without graph breaks; in processes of their own, without the shape checks of the tests."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from diffussm.models import *
model = eval(sys.argv[1])
torch.manual_seed(0)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
inputs = torch.randn(2, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([1, 2]), torch.tensor([0.9, 0.0])
results = []
for network in (model, torch.compile(model, fullgraph=True, backend=sys.argv[2])):
    model.zero_grad()
    output = network(*inputs)
    output.square().sum().backward()
    results.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
for eager, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
"""
SMALL = "in_channels=3, num_classes=5, hidden_size=8, depth=2"


def check(model: str, backend: str = "aot_eager") -> None:
    command = [sys.executable, "-c", SCRIPT, model, backend]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "options",
    [
        "",
        ", reading='equation', token_order='serpentine', positions='sincos'",
        ", bidirectional=False, token_order='alternating', activation_checkpointing=True",
    ],
)
def test_diffussm_compiles_in_one_graph_and_trains_alike(options):
    check(f"DiffuSSM({SMALL}, d_state=4{options})")


HEADER = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(not (shutil.which("g++") and HEADER.exists()), reason="inductor needs a compiler and Python.h")
def test_diffussm_trains_alike_with_generated_code():
    check(f"DiffuSSM({SMALL}, d_state=4)", "inductor")
