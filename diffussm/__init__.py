"""diffussm: attention-free diffusion. Train, sample and evaluate DiffuSSM and its rivals."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffussm.build import create_model

__all__ = ["create_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `diffussm --help` does not wait for torch.
    if name == "create_model":
        from diffussm.build import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
