"""Millions of names, in little memory."""

from array import array
from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """A fixed sequence of byte strings, kept as two arrays.

    A list would take several times the memory, and forked workers would come to copy it by merely reading it.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        joined, ends = bytearray(), array("q", [0])
        for string in strings:
            joined += string
            ends.append(len(joined))
        self._joined, self._ends = np.frombuffer(joined, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._joined[self._ends[index] : self._ends[index + 1]].tobytes()
