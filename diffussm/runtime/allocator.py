"""How the process holds memory."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation instead of handing it back to the system.

    A training step on a CPU allocates and frees the same large tensors over and over; by default each comes
    back as fresh pages, which have to be faulted in and zeroed, often at more cost than the arithmetic on
    them. The process holds its peak from then on. Without effect where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older versions refuse more than 32 MiB. Trimming is set only if that worked: by itself it would fix
        # the threshold at its low first value.
        if mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25):
            mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
