"""What a person's environment says about where files lie on this machine."""

import os


def inception_weights() -> str | None:
    """The file that DIFFUSSM_INCEPTION_WEIGHTS names, None if it is not set."""
    return os.environ.get("DIFFUSSM_INCEPTION_WEIGHTS") or None
