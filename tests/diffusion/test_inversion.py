"""DDIM backwards and forwards again comes back to where it began, the closer the more steps or iterations."""

import pytest
import torch
from mixture import Known, draw, no_noise, p_values

from diffussm.diffusion.process import predictor
from diffussm.diffusion.samplers import ddim, ddim_inversion
from diffussm.diffusion.schedule import linear_schedule

SCHEDULE = linear_schedule()
X_0 = draw(300, seed=1)[:, :, None, None]


def perfect(x_t, t, y=None):
    alpha = SCHEDULE.alphas_cumprod[int(t[0])]
    return Known(x_t, alpha.sqrt(), (1 - alpha).sqrt()).eps


PREDICT = predictor(perfect, SCHEDULE)


def there_and_back(num_steps, num_iterations=1, spacing="linspace"):
    """(x_T, root mean square error of x_0)."""
    options = {"num_steps": num_steps, "spacing": spacing}
    x_T = ddim_inversion(PREDICT, SCHEDULE, X_0, None, num_iterations=num_iterations, **options)
    back = ddim(PREDICT, SCHEDULE, x_T, None, no_noise, **options)
    return x_T, float((back - X_0).square().mean().sqrt())


def test_a_thousand_steps_come_back_to_first_order():
    error = there_and_back(1000)[1]
    assert error < 0.02
    assert 3 * error < there_and_back(250)[1] < 5 * error


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_iterations_come_closer(spacing):
    once, five, many = (there_and_back(50, iterations, spacing)[1] for iterations in (1, 5, 40))
    assert five < once / 20
    assert many < 1e-4 * once


def test_what_the_data_came_from_is_standard_normal():
    """x_T of true samples: uncorrelated, of unit variance; true samples again when brought back."""
    x_T = there_and_back(250, num_iterations=5)[0].flatten(1)
    assert torch.allclose(x_T.mean(0), torch.zeros(2).double(), atol=0.15)
    assert torch.allclose(x_T.T.cov(), torch.eye(2).double(), atol=0.2)
    back = ddim(PREDICT, SCHEDULE, x_T[:, :, None, None], None, no_noise, num_steps=250).flatten(1)
    assert min(p_values(back)) > 1e-3


def test_what_has_no_inverse_is_refused():
    with pytest.raises(ValueError, match="num_iterations=0: must be at least 1"):
        ddim_inversion(PREDICT, SCHEDULE, X_0, None, num_iterations=0)
    schedule = linear_schedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"zero_terminal_snr=true: .*has no inverse"):
        ddim_inversion(predictor(perfect, schedule, "v"), schedule, X_0, None)
