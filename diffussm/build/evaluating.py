"""The configured evaluation, found to fit the images."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from diffussm.build.instantiation import construct
from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.features import FeatureExtractor
from diffussm.runtime.errors import ConfigError

PACKAGE_PREFIX = "diffussm:"  # marks a path inside the installed package


def build_evaluation(
    config: DictConfig, image_shape: Sequence[int], preprocessing: str | None = None
) -> Evaluation | None:
    """The configured evaluation of images (C, H, W) that were prepared like this; None for evaluation=none."""
    if not config.evaluation:
        return None
    node = config.evaluation.copy()
    node.reference = str(shipped_path(str(node.reference)))
    evaluation: Evaluation = construct(node, "evaluation")
    _check_extractor(evaluation.extractor, image_shape, "another evaluation, or evaluation=none")
    evaluation.reference.refuse_images(image_shape, preprocessing)
    return evaluation


def shipped_path(text: str) -> Path:
    """A path as it stands, or, after `diffussm:`, inside the installed package."""
    if text.startswith(PACKAGE_PREFIX):
        return Path(__file__).resolve().parents[1] / text.removeprefix(PACKAGE_PREFIX)
    return Path(text)


def build_extractor(evaluation: DictConfig, image_shape: Sequence[int]) -> FeatureExtractor:
    """The network alone of an evaluation of images (C, H, W), which need not have a reference yet."""
    if not evaluation:
        raise ConfigError("evaluation=none: has no network to measure images with: choose an evaluation")
    extractor: FeatureExtractor = construct(evaluation.extractor, "evaluation.extractor")
    _check_extractor(extractor, image_shape, "another evaluation or other data")
    return extractor


def _check_extractor(extractor: FeatureExtractor, image_shape: Sequence[int], choice: str) -> None:
    wanted = tuple(extractor.image_shape)
    if any(side not in (None, given) for side, given in zip(wanted, image_shape, strict=True)):
        shown = str(wanted).replace("None", "any")
        raise ConfigError(
            f"evaluation.extractor: measures images of shape {shown}, the data has {tuple(image_shape)}: "
            f"choose {choice}"
        )
