"""diffussm: attention-free diffusion. Train, sample and evaluate DiffuSSM and its rivals.

From Python, a model by name, and images of a trained one (`diffussm train experiment=digits` makes such a run):

    from diffussm import create_model, load_checkpoint, sample

    model = create_model("diffussm_s", num_classes=10)
    loaded = load_checkpoint("runs/digits", weights="ema")
    images = sample(loaded, labels=[3, 8], num_steps=25, guidance=1.5, seed=0)  # uint8 (2, 1, 8, 8)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffussm.build import create_model
    from diffussm.notebook import load_checkpoint, sample

__all__ = ["create_model", "load_checkpoint", "sample"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `diffussm --help` does not wait for torch.
    if name == "create_model":
        from diffussm.build import create_model

        return create_model
    if name in __all__:
        from diffussm import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
