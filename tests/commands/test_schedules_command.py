"""`diffussm schedules`: a picture, a row for each schedule, and refusals in one line."""

import pytest
import torch
from PIL import Image

from diffussm.build import construct
from diffussm.cli import main
from diffussm.commands import schedules
from diffussm.compose import compose_group, group_options
from diffussm.diffusion.schedule import Schedule


def rows(printed: str) -> dict[str, dict[str, str]]:
    """The table by its first column, each row by the names of its columns."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    columns, _, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(columns[1:], cells[1:], strict=True)) for cells in rest}


def test_every_preset_with_a_schedule_has_a_row_and_the_plot_is_written(in_tmp, capsys):
    assert main(["schedules"]) == 0
    table = rows(capsys.readouterr().out)
    built = {name: construct(compose_group("diffusion", name, {}), name) for name in group_options("diffusion")}
    expected = {name: process for name, process in built.items() if isinstance(process, Schedule)}
    assert list(table) == list(expected)
    assert {"linear", "quadratic", "scaled_linear", "sigmoid", "cosine"} <= set(table)
    for name, schedule in expected.items():
        for column, t in (("T/4", 250), ("T/2", 500), ("3T/4", 750), ("T", 1000)):
            alpha = schedule.alphas_cumprod[t - 1].item()
            assert float(table[name][f"alphabar {column}"]) == pytest.approx(alpha, rel=1e-3)
        for column, index in (("start", 0), ("end", -1)):
            assert float(table[name][f"log-SNR {column}"]) == pytest.approx(
                schedule.log_snr[index].item(), abs=0.01
            )
    assert [path.name for path in in_tmp.iterdir()] == ["schedules.png"]
    with Image.open(in_tmp / "schedules.png") as image:
        assert image.format == "PNG" and image.width > image.height > 500


def test_a_chosen_schedule_takes_overrides_and_replaces_the_plot(in_tmp, capsys):
    (in_tmp / "mine.png").write_bytes(b"old")
    overrides = ["diffusion=cosine", "diffusion.num_timesteps=4001", "diffusion.zero_terminal_snr=true"]
    assert main(["schedules", *overrides, "out=mine.png"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["cosine"]
    row = table["cosine"]
    assert (row["timesteps"], row["alphabar T"], row["log-SNR end"]) == ("4,001", "0", "-inf")
    assert float(row["alphabar T/2"]) == pytest.approx(0.4937, rel=1e-3)
    assert (in_tmp / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_alphabar_and_snr_against_time(in_tmp, monkeypatch):
    drawn = []
    monkeypatch.setattr(schedules, "save_curves", lambda panels, path: drawn.extend(panels))
    assert main(["schedules", "diffusion=linear", "diffusion.zero_terminal_snr=true"]) == 0
    signal, ratio = drawn
    (times, alphas_cumprod), (_, snr) = signal.curves["linear"], ratio.curves["linear"]
    assert torch.allclose(times, torch.arange(1, 1001) / 1000) and ratio.is_log and not signal.is_log
    assert torch.allclose(alphas_cumprod / (1 - alphas_cumprod), snr) and snr[-1] == 0


def test_processes_without_a_schedule_are_left_out_or_refused(in_tmp, monkeypatch, capsys):
    build = schedules.construct
    monkeypatch.setattr(
        schedules, "construct", lambda node, key: object() if "sigmoid" in node._target_ else build(node, key)
    )
    assert main(["schedules"]) == 0
    table = rows(capsys.readouterr().out)
    assert "sigmoid" not in table and "linear" in table
    (in_tmp / "schedules.png").unlink()
    assert main(["schedules", "diffusion=sigmoid"]) == 2
    assert "diffusion=sigmoid: has no noise schedule" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("num_timesteps=0", "diffusion.num_timesteps=0: must be at least 1"),
        ("num_timesteps=1.5", "diffusion.num_timesteps=1.5: must be an integer"),
        ("num_timesteps=10", ": must rise within (0, 1) when scaled by 1000/num_timesteps=100"),
        ("beta_end=fast", "diffusion.beta_end=fast: must be a number"),
        ("zero_terminal_snr=1", "diffusion.zero_terminal_snr=1: must be true or false"),
        ("beta_strat=1", "diffusion.beta_strat: no such key (did you mean beta_start?)"),
    ],
)
@pytest.mark.parametrize("preset", ["linear", "quadratic", "scaled_linear", "sigmoid"])
def test_a_schedule_that_cannot_be_is_one_line_and_draws_nothing(preset, override, says, in_tmp, capsys):
    assert main(["schedules", f"diffusion={preset}", f"diffusion.{override}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said
    assert list(in_tmp.iterdir()) == []


def test_an_unwritable_plot_is_one_line(capsys):
    assert main(["schedules", "diffusion=linear", "out=/proc/nowhere/schedules.png"]) == 74
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("diffussm: /proc/nowhere")


def test_print_config_shows_the_chosen_schedule_and_does_nothing(in_tmp, capsys):
    assert main(["schedules", "diffusion=sigmoid", "--print-config"]) == 0
    assert "sigmoid_schedule" in capsys.readouterr().out and list(in_tmp.iterdir()) == []
