"""What can end a command, and the exit code that tells a scheduler about it.

    0 done    1 gate failed    2 config    65 data    70 diverged    71 out of memory    73 run directory    74 I/O
    75 preempted

Each error's message is one line for a person: what is wrong, where, and what to change.
"""

import sys


def note(line: str) -> None:
    """A remark for a person, on stderr."""
    print(f"diffussm: {line}", file=sys.stderr, flush=True)


class UserError(Exception):
    """An end that the command line reports as one line, with the class's exit code."""

    exit_code = 1
    is_reported = False  # whether another process of the job says it and writes it down


class PeerError(UserError):
    """Other processes of the job that ended, stalled or were not reached: all have to start again."""


def exit_code_of(error: BaseException) -> int:
    """What a command that ends with this error tells its caller."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError):
        return StorageError.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    # torch's, without importing it
    return OutOfMemoryError.exit_code if type(error).__name__ in ("OutOfMemoryError", "MemoryError") else 1


class ConfigError(UserError):
    """A configuration key or value that cannot work."""

    exit_code = 2


class DataError(UserError):
    """Data that is missing, damaged or not what the configuration says."""

    exit_code = 65


class BadImage(DataError):  # noqa: N818
    """One image of a data set that cannot be read: its name there, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: not a readable image ({reason}): repair or remove it")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # workers send it to the main process
        return type(self), (self.name, self.reason)


class DivergedError(UserError):
    """Training that no longer produces finite gradients."""

    exit_code = 70


class OutOfMemoryError(UserError):
    """A step that does not fit on the device."""

    exit_code = 71


class RunDirectoryError(UserError):
    """A run directory that is in use, unusable, or holds another run or damaged checkpoints."""

    exit_code = 73


class StorageError(UserError):
    """A write that failed: disk full, quota, permissions."""

    exit_code = 74


class Preempted(UserError):  # noqa: N818  (an orderly stop)
    """A stop by signal after a full checkpoint; the same command continues."""

    exit_code = 75
