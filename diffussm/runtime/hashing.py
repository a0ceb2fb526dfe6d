"""SHA-256 of files, a piece at a time, whatever their size, and of texts."""

import hashlib
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 1 << 24


def hash_stream(file: BinaryIO) -> str:
    """The SHA-256 of what is left to read."""
    digest = hashlib.sha256()
    while piece := file.read(PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hash_stream(file)


def hash_text(text: str) -> str:
    """The SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
