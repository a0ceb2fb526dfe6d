"""The shards of a latent set in the making: where they are, and what is known of the finished ones.

A shard is finished when its record, shards/00000k.json, is there: it is written after the moments, and each of
both appears whole or not at all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffussm.data.latents import SHARDS, shard_name
from diffussm.runtime.run_dir import sync_directory, write_atomically


@dataclass(frozen=True)
class BadEntry:
    """An image that could not be read: its index in the source, its name, and why."""

    index: int
    file: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    Args:
        count: images in it, without the bad ones.
        size: of the file, in bytes.
        sum: expectation of the sum of its scaled latents; `sum_of_squares` likewise.
        process: the rank of who encoded it.
        encoded_with: what the last bits depend on.
    """

    count: int
    size: int
    sha256: str
    sum: float
    sum_of_squares: float
    labels: Sequence[int]
    bad: Sequence[BadEntry]
    process: int
    encoded_with: Mapping[str, Any]


class Shards:
    """The shards of a set by number: shard k holds images k `shard_size` to (k + 1) `shard_size` of the source.

    Args:
        path: of the set.
        num_images: of the whole source, bad ones included.
    """

    def __init__(self, path: Path, num_images: int, shard_size: int) -> None:
        self.path, self.num_images, self.shard_size = path, num_images, shard_size

    def __len__(self) -> int:
        return -(-self.num_images // self.shard_size)

    def images(self, shard: int) -> range:
        """The indices in the source of what a shard is made from."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def moments_path(self, shard: int) -> Path:
        """Where its moments are."""
        return self.path / shard_name(shard)

    def record(self, shard: int) -> ShardRecord | None:
        """What is known of a shard; None unless it is finished."""
        try:
            found: Mapping[str, Any] = json.loads(self._record_path(shard).read_bytes())
            record = ShardRecord(**{**found, "bad": [BadEntry(**entry) for entry in found["bad"]]})
            is_whole = self.moments_path(shard).stat().st_size == record.size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if is_whole else None

    def finished(self) -> Iterator[ShardRecord]:
        """The records that are there, in the order of the shards."""
        for shard in range(len(self)):
            if (record := self.record(shard)) is not None:
                yield record

    def finish(self, shard: int, record: ShardRecord) -> None:
        """Declare a shard finished, whose moments are on the disk."""
        self.sync()  # so that the record cannot outlive what it tells of
        write_atomically(self._record_path(shard), json.dumps(asdict(record), allow_nan=False).encode())

    def reopen(self, shard: int) -> None:
        """Declare a finished shard unfinished."""
        self._record_path(shard).unlink()
        self.sync()

    def sync(self) -> None:
        """Make what was written and removed durable."""
        sync_directory(self.path / SHARDS)

    def _record_path(self, shard: int) -> Path:
        return self.moments_path(shard).with_suffix(".json")
