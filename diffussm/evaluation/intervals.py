"""95% confidence intervals: how far a metric would move with as many other samples of the same model.

The reference is taken as given, and bias stays: FID of few samples is too high by much more than its interval is
wide, which is what FID_inf is for. No metric is averaged over groups of samples, which would have a bias each.

metric                     interval
FID, sFID, KID, IS         infinitesimal jackknife: the spread of each sample's influence on the metric, in closed
                           form, at the cost of one evaluation. For FID it is the first order in 1/N, and asks for
                           more samples than features have dimensions
precision, agreement       Wilson: shares of independent samples
density                    the mean of independent samples
recall, coverage           jackknife over NUM_GROUPS groups: what a reference image meets depends on all samples.
                           It errs on the wide side (Efron and Stein 1981), for recall up to twofold. A bootstrap
                           would repeat samples, and their nearest neighbours would be themselves
"""

import math

from jaxtyping import Float
from torch import Tensor

from diffussm.evaluation.metrics import divergences

Interval = tuple[float, float]

NUM_GROUPS = 20
FEWEST_SAMPLES = 5 * NUM_GROUPS
NORMAL = 1.959964  # 97.5% quantile
STUDENT = 2.093024  # likewise, of Student's t with NUM_GROUPS - 1 degrees of freedom


def by_influence(value: float, influence: Float[Tensor, "N"], least: float = -math.inf) -> Interval:
    """Of a metric that is to first order the mean of these, and `least` at least."""
    return _around(value, NORMAL * float(influence.std()) / math.sqrt(len(influence)), least)


def of_inception_score(value: float, logits: Float[Tensor, "N classes"], split_size: int = 5000) -> Interval:
    """Of the mean over chunks of exp(mean divergence): the divergences are the influence on their own mean."""
    chunks = [divergences(chunk) for chunk in logits.split(split_size)]
    variance = sum(float(d.mean().exp()) ** 2 * float(d.var()) / len(d) for d in chunks if len(d) > 1)
    return _around(value, NORMAL * math.sqrt(variance) / len(chunks), 1.0)


def of_share(share: float, count: int) -> Interval:
    """Of a share of `count` independent cases; sound at 0 and 1 too."""
    squared = NORMAL**2 / count
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def by_jackknife(value: float, without: Float[Tensor, "groups"]) -> Interval:
    """Of a share, from its values without each of NUM_GROUPS groups of the samples."""
    groups = len(without)
    error = math.sqrt((groups - 1) / groups * float((without - without.mean()).square().sum()))
    low, high = _around(value, STUDENT * error, 0.0)
    return low, min(high, 1.0)


def _around(value: float, half: float, least: float) -> Interval:
    return max(value - half, least), value + half
