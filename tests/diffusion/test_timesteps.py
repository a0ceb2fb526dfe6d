"""How timesteps are drawn: unbiased whatever their distribution, where the loss is large once that is known."""

import pytest
import torch

from diffussm.diffusion.loss import DDPMObjective
from diffussm.diffusion.schedule import linear_schedule
from diffussm.diffusion.timesteps import LossSecondMomentTimesteps, UniformTimesteps

LOSSES = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)


def warmed_up(history_size=3, spread=0.0, uniform_share=1e-3, seed=0):
    """One that has seen LOSSES, each history_size times, times 1 - spread .. 1 + spread."""
    sampler = LossSecondMomentTimesteps(len(LOSSES), history_size, uniform_share)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(history_size):
        factor = 1 + spread * (2 * torch.rand(len(LOSSES), generator=generator, dtype=torch.float64) - 1)
        seen.append(LOSSES * factor)
        sampler.observe(torch.arange(len(LOSSES)), seen[-1])
    return sampler, torch.stack(seen)


def weights_of(sampler, count=20_000):
    """The weight of every timestep, as it is drawn."""
    t, weight = sampler.draw(count, torch.Generator().manual_seed(0))
    found = torch.full((len(LOSSES),), float("nan"), dtype=torch.float64)
    found[t] = weight.double()
    return found


def test_probabilities_follow_the_root_of_the_second_moment():
    sampler, seen = warmed_up(spread=0.9)
    expected = seen.square().mean(0).sqrt()
    expected = 0.999 * expected / expected.sum() + 0.001 / len(LOSSES)
    assert torch.allclose(sampler.probabilities, expected)
    assert not torch.allclose(seen.mean(0) / seen.mean(0).sum(), expected, rtol=1e-2)  # the mean would be another


@pytest.mark.parametrize("make", [lambda: warmed_up()[0], lambda: UniformTimesteps(len(LOSSES))])
def test_the_weighted_mean_is_unbiased(make):
    """Enumerated: sum p_t w_t L_t is the uniform mean of L_t, for the p that the draws really follow."""
    sampler = make()
    p = getattr(sampler, "probabilities", torch.full((len(LOSSES),), 1 / len(LOSSES), dtype=torch.float64))
    assert float(p.sum()) == pytest.approx(1)
    assert float((p * weights_of(sampler) * LOSSES).sum()) == pytest.approx(float(LOSSES.mean()), rel=1e-6)
    t, _ = sampler.draw(100_000, torch.Generator().manual_seed(1))
    shares = torch.bincount(t, minlength=len(LOSSES)) / 100_000
    assert torch.allclose(shares.double(), p, atol=0.005)


def test_a_constant_weighted_loss_has_less_variance():
    """What importance sampling is for: w_t L_t is nearly the same everywhere."""
    weighted = weights_of(warmed_up()[0]) * LOSSES
    assert weighted.std() < 0.02 * LOSSES.std()


def test_until_every_timestep_has_its_history_t_is_uniform():
    sampler = LossSecondMomentTimesteps(3, history_size=2)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    for t in ([0, 1, 2], [0, 1]):
        sampler.observe(torch.tensor(t), torch.ones(len(t)) * 5.0 ** torch.tensor(t))
        assert torch.equal(sampler.probabilities, uniform)
        assert torch.equal(sampler.draw(50, torch.Generator().manual_seed(0))[1], torch.ones(50))
    sampler.observe(torch.tensor([2]), torch.tensor([25.0]))
    assert sampler.probabilities[2] > 0.7


def test_only_the_last_losses_count():
    sampler, _ = warmed_up(history_size=3)
    sampler.observe(torch.zeros(3, dtype=torch.int64), torch.full((3,), 0.5))
    assert sampler.probabilities[0] == pytest.approx(float(sampler.probabilities[3]))


def test_losses_that_are_not_finite_are_passed_over():
    sampler, _ = warmed_up()
    before = sampler.probabilities
    sampler.observe(torch.tensor([0, 1]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(sampler.probabilities, before)


def test_no_timestep_is_forgotten_and_no_loss_at_all_is_uniform():
    sampler = LossSecondMomentTimesteps(2, history_size=1)
    sampler.observe(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    assert sampler.probabilities[1] == pytest.approx(0.0005)
    sampler.observe(torch.tensor([0]), torch.tensor([0.0]))
    assert sampler.probabilities.tolist() == [0.5, 0.5]


def test_its_state_continues_exactly():
    ours, _ = warmed_up(spread=0.5)
    other = LossSecondMomentTimesteps(len(LOSSES), 3)
    other.load({name: tensor.clone() for name, tensor in ours.state().items()})
    for step in range(4):
        draws = [s.draw(7, torch.Generator().manual_seed(step)) for s in (ours, other)]
        assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
        for sampler in (ours, other):
            sampler.observe(draws[0][0], LOSSES[draws[0][0]] * (1 + step))
    assert torch.equal(ours.probabilities, other.probabilities)


def test_an_objective_shows_its_sampler_the_losses_without_their_weights():
    """The weights are how often t is drawn: in the history they would cancel what they follow from."""
    objective = DDPMObjective(linear_schedule(5, 1e-4, 1e-3), timesteps="loss_second_moment")
    sampler, _ = warmed_up(history_size=10)
    objective.load(sampler.state())
    draws = objective.draw((40, 1, 1, 1), torch.Generator().manual_seed(0))
    assert draws.weight.unique().numel() > 1
    before = objective.state()["counts"].clone()
    objective.observe(draws, draws.weight * LOSSES[draws.t].float())
    assert torch.equal(objective.state()["counts"] - before, torch.bincount(draws.t, minlength=5))
    expected = LOSSES / LOSSES.sum() * 0.999 + 0.001 / 5
    assert torch.allclose(objective.timesteps.probabilities, expected, rtol=1e-5)
