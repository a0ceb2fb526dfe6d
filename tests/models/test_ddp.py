"""Under DistributedDataParallel two processes have the gradients of one that sees both halves of the batch."""

import subprocess
import sys

SCRIPT = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from diffussm.models import DiffuSSM, DiT

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
small = dict(in_channels=3, num_classes=5, hidden_size=8, depth=2)
for model in (
    DiffuSSM(**small, d_state=4),
    DiffuSSM(**small, d_state=4, activation_checkpointing=True),
    DiT(**small, input_size=4, num_heads=2),
):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(4, 3, 4, 4), torch.arange(4) * 50, torch.arange(4), torch.tensor([0.9, 0.0, 0.5, 0.01])
    model(*inputs).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    mine = [tensor[2 * rank : 2 * rank + 2] for tensor in inputs]
    wrapped = DistributedDataParallel(model)
    wrapped(*mine).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
