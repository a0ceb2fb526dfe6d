"""The suite `evaluation`: how fast images become features, and features a distance.

Inception, with random weights, in our pipeline (sums of features included) and in torch-fidelity's own loop over
the same tensors; the Frechet distance of 2048 dimensions by eigenvalues and by scipy's matrix square root.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffussm.bench.timing import alternate
from diffussm.bench.workload import Measurement, Phase, Setup, Skip
from diffussm.evaluation.inception import Inception
from diffussm.evaluation.metrics import frechet_distance
from diffussm.evaluation.observed import Observed
from diffussm.evaluation.statistics import FeatureStatistics

FEATURES, CHANNELS_LAST, FIDELITY = "features", "features, channels last", "features, torch-fidelity"
DISTANCE, SQRTM = "Frechet distance", "Frechet distance, scipy's sqrtm"
RESOLUTION, BATCH, BATCHES, GPU_BATCHES = 256, 16, 2, 64
AREA, DIM = RESOLUTION**2, 2048


class _Images(Dataset):
    """Random images, as torch-fidelity wants a data set."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, 3, RESOLUTION, RESOLUTION)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def measure_evaluation(setup: Setup, note: Callable[[str], None]) -> Iterator[Measurement | Skip]:
    """Measure features, then distances."""
    count = BATCH * (GPU_BATCHES if setup.device.type == "cuda" else BATCHES)
    note(f"evaluation: features of {count} images of {RESOLUTION} pixels")
    yield from _measure("features", AREA, extractions(_Images(count), setup.device), count, setup)
    note(f"evaluation: Frechet distance of {DIM} dimensions")
    calls = distances(setup.device)
    if SQRTM not in calls:
        yield Skip("evaluation", "distance", SQRTM, DIM, "scipy is missing: pip install scipy")
    yield from _measure("distance", DIM, calls, 0, setup)


def _measure(
    phase: Phase, length: int, calls: Mapping[str, Callable[[], object]], items: int, setup: Setup
) -> Iterator[Measurement]:
    for name, timing in alternate(calls, setup.repetitions, setup.seconds).items():
        yield Measurement("evaluation", phase, name, length, timing, 0, 0, 0, items)


def extractions(data: _Images, device: torch.device) -> dict[str, Callable[[], object]]:
    """By name, what brings the features of all these images into the main memory; each was called once."""
    from torch_fidelity.utils import get_featuresdict_from_dataset  # here, for it loads much

    plain = Inception.untrained().to(device)

    @torch.no_grad()
    def ours(extractor: Inception) -> Tensor:
        observed = Observed(("pool",), ("pool", "logits"))
        for start in range(0, len(data), BATCH):
            batch = data.images[start : start + BATCH].to(device)
            observed.update(range(start, start + len(batch)), extractor(batch))
        return observed.rows("pool")

    def theirs() -> Tensor:
        on_gpu = device.type == "cuda"
        found = get_featuresdict_from_dataset(data, plain.network, BATCH, on_gpu, save_cpu_ram=True, verbose=False)
        return found["2048"]

    fast = Inception.untrained(channels_last=True).to(device)
    calls: dict[str, Callable[[], object]] = {
        FEATURES: lambda: ours(plain),
        CHANNELS_LAST: lambda: ours(fast),
        FIDELITY: theirs,
    }
    for call in calls.values():
        call()
    return calls


def distances(device: torch.device) -> dict[str, Callable[[], float]]:
    """By name, what computes the distance of the same two Gaussians from their moments."""
    generator = torch.Generator().manual_seed(0)
    moments: list[Tensor] = []
    for scale in (1.0, 1.1):
        statistics = FeatureStatistics(DIM, device)
        statistics.update((scale * torch.randn(2 * DIM, DIM, generator=generator)).relu().to(device))
        moments += [statistics.mean, statistics.covariance]
    calls = {DISTANCE: lambda: frechet_distance(*moments)}
    try:
        from scipy.linalg import sqrtm
    except ImportError:
        return calls
    mu1, sigma1, mu2, sigma2 = (x.cpu().numpy() for x in moments)

    def by_sqrtm() -> float:
        root = sqrtm(sigma1 @ sigma2).real
        return float(((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2 - 2 * root).trace())

    return {**calls, SQRTM: by_sqrtm}
