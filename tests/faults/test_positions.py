"""On resume with other processes, workers or parts every step sees what it would have seen; averages are exact."""

import signal
from pathlib import Path

import pytest
import torch
from faults.runs import checkpoints, command, fingerprint, images, records
from faults.test_ranks import MANY, start_ranks, weights_by_step
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

slow = pytest.mark.slow
# Small steps, so that what rounding does is not blown up by Adam's division by small second moments.
STEADY = ("optimizer.lr=1e-4", "optimizer.ssm_lr=1e-4", "trainer.save_every_images=1M")
OTHERS = {
    "2 ranks": ["trainer.num_processes=2"],
    "2 ranks, accumulating": ["trainer.num_processes=2", "trainer.device_batch_size=3"],
    "2 workers": ["trainer.num_workers=2"],
    "accumulating": ["trainer.device_batch_size=5"],
    "3 unequal ranks": ["trainer.num_processes=3", "trainer.num_workers=1"],
}


def seen(path: Path) -> dict[tuple[int, int], str]:
    """What was drawn for every (step, sample); the first two passes of a start are thrown away, and repeat it."""
    found: dict[tuple[int, int], str] = {}
    for file in path.parent.glob(f"{path.name}.*"):
        for line in file.read_text().splitlines():
            step, sample, value = line.split()
            assert found.setdefault((int(step), int(sample)), value) == value
    return found


@pytest.mark.fault("G10")
@pytest.mark.parametrize(
    ("steps", "names"),
    [(20, ["2 ranks, accumulating"]), pytest.param(200, list(OTHERS), marks=slow)],
    ids=["few", "all"],
)
def test_a_run_resumed_otherwise_sees_the_same(jobs, tmp_path, figure, steps, names):
    total, half = f"trainer.total_images={16 * steps}", f"trainer.total_images={8 * steps}"

    def draws(path: Path) -> list[tuple[str, str]]:
        return [("tell_draws", str(path.with_suffix(".draws")))]

    jobs.run(*command(tmp_path / "whole", *STEADY, total), faults=draws(tmp_path / "whole"))
    expected = seen(tmp_path / "whole.draws")
    assert len(expected) == 16 * steps
    weights = load_file(checkpoints(tmp_path / "whole")[-1] / "model.safetensors")
    for number, name in enumerate(names):
        path = tmp_path / f"run{number}"
        jobs.run(*command(path, *STEADY, half), faults=draws(path))
        jobs.run(*command(path, *STEADY, total, *OTHERS[name]), faults=draws(path))
        found = seen(path.with_suffix(".draws"))
        equal = sum(found.get(key) == value for key, value in expected.items())
        others = load_file(checkpoints(path)[-1] / "model.safetensors")
        apart = max(float((weights[key] - others[key]).abs().max()) for key in weights)
        percent = 100 * equal / len(expected)
        figure(f"{name}: {percent:.4g} % equal, weights within {apart:.1g} after {steps} steps")
        assert found == expected and apart <= 1e-6


@pytest.mark.fault("G23")
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=slow)])
def test_averages_equal_the_closed_form_over_kills_and_ranks(jobs, tmp_path, figure, kills):
    path, decays = tmp_path / "run", [0.9, 0.99]
    (tmp_path / "weights").mkdir()
    overrides = [*MANY[1:], "trainer.ema_decays=[0.9,0.99]", "trainer.save_every_images=48"]
    faults = [("tell_weights",), ("keep_weights", str(tmp_path / "weights")), ("slow_steps", 0.02)]
    equal = told = 0

    def compare(ranks) -> None:
        nonlocal equal, told
        one, other = map(weights_by_step, ranks)
        both = one.keys() & other.keys()
        equal, told = equal + sum(one[step] == other[step] for step in both), told + len(both)

    for number in range(kills):
        ranks = start_ranks(jobs, path, *overrides, faults=faults)
        ranks[0].wait_for(f"WEIGHTS {4 + 4 * number} ")
        for rank in ranks:
            rank.send(signal.SIGKILL)
        assert [rank.wait() for rank in ranks] == [-9, -9]
        compare(ranks)
    ranks = start_ranks(jobs, path, *overrides, faults=faults)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    compare(ranks)
    assert images(path) == 480 and told >= 24
    history = [torch.load(file, weights_only=True) for file in sorted((tmp_path / "weights").iterdir())]
    assert len(history) == 30
    farthest, exact = 0.0, True
    for decay in decays:
        average = load_file(checkpoints(path)[-1] / f"ema_{decay}.safetensors")
        update = get_ema_multi_avg_fn(decay)
        for name, tensor in average.items():
            terms = [state[name].double() for state in history]
            closed = decay ** (len(terms) - 1) * terms[0]
            for age, term in enumerate(reversed(terms[1:])):
                closed = closed + (1 - decay) * decay**age * term
            # Of the largest number in it, which single precision rounds to no better than that.
            farthest = max(farthest, float((closed - tensor).abs().max() / closed.abs().max().clamp(min=1)))
            stepwise = [history[0][name].clone()]
            for state in history[1:]:
                update(stepwise, [state[name]], None)
            exact &= torch.equal(stepwise[0], tensor)
    figure(
        f"{kills} kills: {equal}/{told} steps with equal ranks; the sum in float64 within {farthest:.1g}, its "
        f"recursion {'bit for bit' if exact else 'NOT bit for bit'}"
    )
    assert equal == told and exact and farthest < 1e-6


@pytest.mark.fault("G12")
@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=slow)])
def test_workers_killed_every_few_steps_and_in_saves_cost_no_sample(jobs, tmp_path, figure, workers):
    overrides = ("trainer.total_images=480", f"trainer.num_workers={workers}")
    jobs.run(*command(tmp_path / "whole", *overrides), faults=[("tell_draws", str(tmp_path / "whole draws"))])
    faults = [("kill_workers", 3), ("tell_draws", str(tmp_path / "run draws"))]
    job = jobs.run(*command(tmp_path / "run", *overrides), faults=faults)
    kills = len(job.lines("KILLED"))
    same = fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    expected, found = seen(tmp_path / "whole draws"), seen(tmp_path / "run draws")
    equal = sum(found[key] == value for key, value in expected.items())
    figure(f"{kills} kills of {workers} workers: {equal}/480 samples equal")
    assert kills >= 9 * workers and same and found == expected
    assert records(tmp_path / "run") == records(tmp_path / "whole")
