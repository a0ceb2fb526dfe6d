"""Parameter groups, schedules, averages and the metrics log."""

import json
import resource
import signal

import pytest
import torch
from torch import nn

from diffussm.models import DiffuSSM
from diffussm.runtime.errors import StorageError
from diffussm.training.ema import ModelAverages
from diffussm.training.logging import MetricsLog, Progress
from diffussm.training.optim import adamw, describe_groups, learning_rate_factor


def test_groups_follow_the_roles():
    model = DiffuSSM(hidden_size=8, depth=1)
    optimizer = adamw(model.named_parameters(), lr=1e-4, ssm_lr=1e-3, weight_decay=0.1)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: (g["lr"], g["weight_decay"]) for role, g in groups.items()} == {
        "decay": (1e-4, 0.1), "no_decay": (1e-4, 0.0), "ssm": (1e-3, 0.0),
    }  # fmt: skip
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(
        list(model.parameters())
    )
    ssm = {id(p) for p in groups["ssm"]["params"]}
    expected = {"log_dt", "log_A_real", "A_imag", "B"}
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if id(p) in ssm} == expected
    assert any("1e-03" in line or "0.001" in line for line in describe_groups(optimizer))


def test_an_untagged_parameter_is_an_error():
    with pytest.raises(AssertionError, match="weight has no optimiser role"):
        adamw(nn.Linear(2, 2).named_parameters())


@pytest.mark.parametrize(
    ("options", "key"),
    [({"lr": 0.0}, "lr=0"), ({"ssm_lr": float("nan")}, "ssm_lr=nan"), ({"weight_decay": -1.0}, "weight_decay=-1")],
)
def test_bad_numbers_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        adamw(DiffuSSM(hidden_size=8, depth=1).named_parameters(), **options)


def test_learning_rate_warms_up_stays_and_decays():
    factor = lambda images: learning_rate_factor(images, 100, 200, 1000)  # noqa: E731
    assert [factor(i) for i in (0, 50, 100, 500, 800, 900, 1000)] == [0, 0.5, 1, 1, 1, 0.5, 0]
    assert learning_rate_factor(5, 0, 0, 10) == 1


@pytest.mark.fault("G23")
def test_averages_follow_the_closed_form():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averages = ModelAverages(model, [0.9, 0.5])
    history = []
    for _ in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        averages.update(model)
        history.append(model.weight.detach().clone())
    for decay in (0.9, 0.5):
        expected = history[0]
        for weight in history[1:]:
            expected = decay * expected + (1 - decay) * weight
        assert torch.allclose(averages.state()[f"ema_{decay}"]["weight"], expected, atol=1e-6)
    assert averages.num_updates == 6 and not averages.first.training


def test_averages_continue_from_their_state():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    one, two = ModelAverages(model, [0.9]), ModelAverages(nn.Linear(3, 2), [0.9])
    one.update(model)
    two.load({k: {n: t.clone() for n, t in v.items()} for k, v in one.state().items()}, one.num_updates)
    with torch.no_grad():
        model.weight.add_(1)
    one.update(model)
    two.update(model)
    assert torch.equal(one.first.weight, two.first.weight)


def test_log_forgets_what_came_after_the_checkpoint_and_half_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(0)
    for images in (10, 20, 30):
        log.write({"images": images, "loss": 1.0})
    with log.path.open("ab") as file:
        file.write(b'{"images": 1, "loss": "\xff\xfe"}\n[1, 2]\n{"loss": 1}\n{"images": "many"}\n')
        file.write(b'{"images": 35, "lo')
    log.rewind(20)
    assert [json.loads(line)["images"] for line in log.path.read_text().splitlines()] == [10, 20]


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    progress = Progress(total=100, initial=0, unit="img", every_seconds=0)
    progress.advance(50, lambda: {"loss": "0.5"})
    progress.close()
    line = capsys.readouterr().err
    assert "50 / 100 img (50 %)" in line and "ETA" in line and "loss 0.5" in line


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(total=100, initial=20, unit="img")
    progress.advance(50)
    progress.say("a note")
    progress.close()
    shown = capsys.readouterr().err
    assert "70/100" in shown.replace(".0", "") and "a note" in shown


def test_a_last_step_beyond_the_total_leaves_no_time(capsys):
    progress = Progress(total=100, initial=0, unit="img")
    progress._started -= 1000  # so that the step has taken long
    progress.advance(112)
    assert progress.eta_seconds == 0
    assert "112 / 100 img (112 %)  ETA 0:00:00" in capsys.readouterr().err


def test_a_record_that_finds_no_room_waits_and_leaves_no_half_line(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"images": 10})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # room for four bytes more
        log.write({"images": 20})
        with pytest.raises(StorageError, match=r"metrics\.jsonl: File too large: free some space"):
            log.settle()
        assert log.path.read_text() == '{"images": 10}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    log.write({"images": 30})
    assert [json.loads(line)["images"] for line in log.path.read_text().splitlines()] == [10, 20, 30]
