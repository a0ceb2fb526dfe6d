"""What a configuration may hold: its schema, its keys, and what types cannot say of it."""

from diffussm.config.keys import drift, leaves, may_change, nearest
from diffussm.config.schema import (
    BENCH_SUITES,
    GATED,
    MODEL_METRICS,
    ROOTS,
    SAMPLE_METRICS,
    EncodeConfig,
    TrainConfig,
    register,
)
from diffussm.config.validation import validate

__all__ = [
    "BENCH_SUITES",
    "GATED",
    "MODEL_METRICS",
    "ROOTS",
    "SAMPLE_METRICS",
    "EncodeConfig",
    "TrainConfig",
    "drift",
    "leaves",
    "may_change",
    "nearest",
    "register",
    "validate",
]
