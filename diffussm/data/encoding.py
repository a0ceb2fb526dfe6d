"""Images to a latent set, shard by shard, on any number of processes, through any number of interruptions.

Shard k holds the images of one range of the source, encoded in batches that never cross its ends. So what is in
it depends neither on who encodes it nor on what was encoded before, and the finished set is the same, byte for
byte, however it came about. Until it is finished, images that could not be read are looked at again at each start.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm.data.bad_files import listing
from diffussm.data.images import ImageSource
from diffussm.data.latents import (
    BAD_FILES,
    DTYPES,
    FORMAT_VERSION,
    LABELS,
    MANIFEST,
    REQUEST,
    SHARDS,
    LatentSet,
    differences,
)
from diffussm.data.reading import Images, in_batches, read_images
from diffussm.data.shards import BadEntry, ShardRecord, Shards
from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import (
    BadImage,
    DataError,
    Preempted,
    RunDirectoryError,
    StorageError,
)
from diffussm.runtime.hashing import hash_stream
from diffussm.runtime.run_dir import OwnedDirectory, atomic_file, sync_directory, write_atomically, write_json


class Encoder(Protocol):
    """The part of an autoencoder that latents come from.

    It may tell more: by `encoding`, which settings change what it gives; by `rounding`, what only the last bits of
    that depend on.
    """

    scale: float
    shift: float
    is_stochastic: bool

    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]: ...
    def encode(self, images: Tensor) -> Tensor: ...


class Encoding:
    """A latent set in the making.

    Args:
        path: the directory it is written to.
        batch_size: images in one pass of the autoencoder.
        dtype: of the stored moments.
        shard_size: images of the source in a shard.
        num_workers: processes that read images, for each process that encodes.
        stop: becomes true when the process has been asked to stop.
    """

    def __init__(
        self,
        source: ImageSource,
        autoencoder: Encoder,
        path: Path,
        *,
        batch_size: int = 32,
        dtype: str = "fp16",
        shard_size: int = 4096,
        num_workers: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        processes: Processes | None = None,
        stop: Callable[[], object] = lambda: False,
    ) -> None:
        self.source, self.autoencoder, self.path = source, autoencoder, path
        self.batch_size, self.num_workers = batch_size, num_workers
        self.device, self.processes, self.stop = device, processes or Processes(), stop
        self.dtype = DTYPES[dtype]
        channels, *sides = autoencoder.latent_shape(source.image_shape)
        self.row_shape = ((2 if autoencoder.is_stochastic else 1) * channels, *sides)
        self.images_per_row = 2 if source.horizontal_flip else 1
        self.directory = OwnedDirectory(path, "to", "directory")
        self.shards = Shards(path, len(source), shard_size)
        self.num_done = 0
        # Through JSON, so that what is read back compares equal.
        self.request: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "source": dict(source.fingerprint),
                    "image_shape": source.image_shape,
                    "autoencoder": dict(autoencoder.fingerprint),
                    "encoding": getattr(autoencoder, "encoding", {}),
                    "scale": autoencoder.scale,
                    "shift": autoencoder.shift,
                    "latent_shape": (channels, *sides),
                    "posterior": autoencoder.is_stochastic,
                    "flips": source.horizontal_flip,
                    "dtype": dtype,
                    "shard_size": shard_size,
                }
            )
        )

    @property
    def encoded_with(self) -> dict[str, Any]:
        """What does not change the request, but perhaps the last bits of its result; nothing that tells where."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "batch_size": self.batch_size,
            **getattr(self.autoencoder, "rounding", {}),
        }

    @property
    def num_bytes(self) -> int:
        """What the whole set takes, roughly."""
        values = self.images_per_row * int(np.prod(self.row_shape))
        return len(self.source) * values * self.dtype.itemsize

    def open(self) -> bool:
        """Take the directory for all processes of the job; returns whether the set is complete already.

        `num_done` is then, in the first process, how many images are in finished shards, bad ones included.

        RunDirectoryError if someone else writes to it, or if it holds anything but this very request.
        """
        outcome: bool | RunDirectoryError | StorageError | None = None
        if self.processes.is_first:
            try:
                outcome = self._take()
            except (RunDirectoryError, StorageError) as error:
                self.close()
                outcome = error
        outcome = self.processes.broadcast_object(outcome, self._check_stop)
        if isinstance(outcome, Exception):
            raise outcome
        return bool(outcome)

    def _take(self) -> bool:
        path = self.path
        self.directory.check()
        ours = {".lock", REQUEST, f".{REQUEST}.tmp"}
        if path.exists() and not (path / REQUEST).exists() and {file.name for file in path.iterdir()} - ours:
            raise RunDirectoryError(f"to={path}: exists and is no latent set: choose another directory")
        self.directory.open()
        try:
            there = json.loads((path / REQUEST).read_bytes()) if (path / REQUEST).exists() else None
        except ValueError:
            raise RunDirectoryError(f"{path / REQUEST}: damaged: choose another directory") from None
        if there is None:
            write_json(path / REQUEST, self.request)
        elif found := differences(there, self.request):
            raise RunDirectoryError(
                f"to={path}: holds latents of another request ({'; '.join(found)}): choose another directory"
            )
        (path / SHARDS).mkdir(exist_ok=True)
        finished = [shard for shard in range(len(self.shards)) if self.shards.record(shard)]
        self.num_done = sum(len(self.shards.images(shard)) for shard in finished)
        return (path / MANIFEST).exists()

    def close(self) -> None:
        """Give the directory back."""
        self.directory.close()

    def run(self, advance: Callable[[int], object] = lambda done: None) -> LatentSet:
        """Encode what is missing, and assemble the set when all processes have done their part.

        Args:
            advance: called in the first process with the number of images that all have encoded since `open`, less
                those in finished shards that have to be encoded again.
        """
        self._advance = advance
        mine = range(self.processes.rank, len(self.shards), self.processes.world_size)
        if not (self.path / MANIFEST).exists():
            self._reopen_mended(mine)
        records = {shard: self.shards.record(shard) for shard in mine}
        for record in records.values():
            if record is not None:
                self._count_bad(record.bad)
        self._encode([shard for shard, record in records.items() if record is None])
        self.processes.barrier(self._poll)
        outcome: DataError | StorageError | None = None
        if self.processes.is_first:
            try:
                self._assemble()
            except (DataError, StorageError) as error:
                outcome = error
        outcome = self.processes.broadcast_object(outcome, self._check_stop)
        if outcome is not None:
            raise outcome
        return LatentSet(self.path)

    def _reopen_mended(self, shards: Sequence[int]) -> None:
        """Have finished shards encoded again that an image was left out of which can be read by now."""
        records = ((shard, self.shards.record(shard)) for shard in shards)
        left_out = {entry.index: shard for shard, record in records if record for entry in record.bad}
        batches = in_batches(list(left_out), self.batch_size)
        mended: set[int] = set()
        with self._read(batches, lambda bad: None) as read:
            for images in read:
                self._check_stop()
                mended |= {left_out[index] for index in images.indices}
        for shard in sorted(mended):
            self.shards.reopen(shard)
            self.processes.add("images", -len(self.shards.images(shard)))

    def _encode(self, shards: Sequence[int]) -> None:
        if not shards:
            return
        num_threads = torch.get_num_threads()
        if self.device.type == "cpu":
            # Sums are split between threads, and rounded so: with any other number the bits would differ.
            torch.set_num_threads(1)
        try:
            bad: list[BadImage] = []
            batches = [indices for shard in shards for indices in self._batches(shard)]
            with self._read(batches, bad.extend) as read:
                for shard in shards:
                    self._encode_shard(shard, read, bad)
                    bad.clear()
        finally:
            torch.set_num_threads(num_threads)

    def _read(
        self, batches: Sequence[Sequence[int]], tell: Callable[[list[BadImage]], object]
    ) -> AbstractContextManager[Iterator[Images]]:
        images = read_images(self.source, batches, self.num_workers, tell, poll=self._check_stop)
        return contextlib.closing(images)

    def _encode_shard(self, shard: int, read: Iterator[Images], met: list[BadImage]) -> None:
        """Encode what is read next; `met` are the bad images of this shard among what has been read."""
        labels: list[int] = []
        bad: list[BadEntry] = []
        total = total_of_squares = 0.0
        with atomic_file(self.shards.moments_path(shard)) as file:
            file.write(self._header(self.shards.shard_size))  # of its final length
            for indices in self._batches(shard):
                self._check_stop()
                batch = next(read)
                left_out = [index for index in indices if index not in batch.indices]
                new = [
                    BadEntry(index, error.name, error.reason)
                    for index, error in zip(left_out, met[len(bad) :], strict=True)
                ]
                bad += new
                self._count_bad(new, bad)
                if batch.indices:
                    moments = self._moments(batch)
                    file.write(moments.data)
                    labels += batch.labels
                    sums = self._spread_sums(moments)
                    total, total_of_squares = total + sums[0], total_of_squares + sums[1]
                self.processes.add("images", len(indices))
                self._show()
            size = file.tell()
            file.seek(0)
            file.write(self._header(len(labels)))
            file.seek(0)
            sha256 = hash_stream(file)
        record = ShardRecord(
            count=len(labels),
            size=size,
            sha256=sha256,
            sum=total,
            sum_of_squares=total_of_squares,
            labels=labels,
            bad=bad,
            process=self.processes.rank,
            encoded_with=self.encoded_with,
        )
        self.shards.finish(shard, record)

    def _header(self, count: int) -> bytes:
        stream = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (count, self.images_per_row, *self.row_shape),
        }
        np.lib.format.write_array_header_1_0(stream, description)  # leaves room for a longer count
        return stream.getvalue()

    @torch.no_grad()
    def _moments(self, batch: Images) -> np.ndarray:
        """(n, 1 or 2, K, h, w) as they are stored. DataError names the first image whose are not finite."""
        images = batch.images.to(self.device)
        mirrored = (images, images.flip(-1))[: self.images_per_row]
        passes = [self.autoencoder.encode(pixels).float().cpu() for pixels in mirrored]
        moments = torch.stack(passes, dim=1)
        channels = self.row_shape[0]
        assert moments.shape[2:] == self.row_shape or not self.autoencoder.is_stochastic
        moments = moments[:, :, :channels]
        finite = moments.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            name = self.source.name_of(batch.indices[int(finite.int().argmin())])
            raise DataError(
                f"{name}: the autoencoder gives latents that are not finite: let it compute in fp32, "
                "or remove the image"
            )
        if self.dtype == DTYPES["fp16"]:
            limit = torch.finfo(torch.float16).max
            moments = moments.clamp(-limit, limit)
        return np.ascontiguousarray(moments.numpy(), self.dtype)

    def _spread_sums(self, moments: np.ndarray) -> tuple[float, float]:
        """Expectations of the sum and the sum of squares of the scaled latents, in float64.

        By numpy, whose sums do not depend on the number of threads.
        """
        scale, shift = self.autoencoder.scale, self.autoencoder.shift
        exact = moments.astype(np.float64)
        channels = self.request["latent_shape"][0]
        mean = (exact[:, :, :channels] - shift) * scale
        squares = np.square(mean)
        if self.autoencoder.is_stochastic:
            squares += np.exp(exact[:, :, channels:]) * scale**2
        return float(mean.sum()), float(squares.sum())

    def _assemble(self) -> None:
        records = list(self.shards.finished())
        assert len(records) == len(self.shards)
        labels = np.array([label for record in records for label in record.labels], np.dtype("<i8"))
        bad = [entry for record in records for entry in record.bad]
        if not len(labels):
            raise DataError(f"none of the {len(self.source):,} images can be read: see {self.path / BAD_FILES}")
        self._write_bad_files(bad)
        content = io.BytesIO()
        np.lib.format.write_array(content, labels, version=(1, 0))
        write_atomically(self.path / LABELS, content.getvalue())
        values = len(labels) * self.images_per_row * int(np.prod(self.request["latent_shape"]))
        mean = sum(record.sum for record in records) / values
        variance = sum(record.sum_of_squares for record in records) / values - mean**2
        ways = [record.encoded_with for record in records]
        manifest = {
            "format_version": FORMAT_VERSION,
            **self.request,
            "num_images": len(labels),
            "num_bad_files": len(bad),
            "num_classes": self.source.num_classes,
            "class_names": list(self.source.class_names),
            "encoded_with": [one for place, one in enumerate(ways) if one not in ways[:place]],
            "spread": {"mean": mean, "std": max(variance, 0.0) ** 0.5},
            "labels": {"size": len(content.getvalue()), "sha256": hashlib.sha256(content.getvalue()).hexdigest()},
            "shards": [{"count": one.count, "size": one.size, "sha256": one.sha256} for one in records],
        }
        write_json(self.path / MANIFEST, manifest)
        sync_directory(self.path)

    def _batches(self, shard: int) -> list[Sequence[int]]:
        return in_batches(self.shards.images(shard), self.batch_size)

    def _count_bad(self, new: Sequence[BadEntry], unpublished: Sequence[BadEntry] = ()) -> None:
        """Stop as soon as it is certain that too many images are bad. The first process to see it lists them."""
        if not new:
            return
        count, total, limit = self.processes.add("bad", len(new)), len(self.source), self.source.max_bad_fraction
        if count / total <= limit:
            return
        if self.processes.add("stopped", 1) == 1:
            finished = [entry for record in self.shards.finished() for entry in record.bad]
            self._write_bad_files([*finished, *unpublished])
        raise DataError(
            f"{count:,} of {total:,} images cannot be read so far, more than data.max_bad_fraction={limit:g} "
            f"allows: mend those in {self.path / BAD_FILES} and run it again, or raise data.max_bad_fraction; "
            "to remove them makes another data set, for another to="
        )

    def _write_bad_files(self, bad: Sequence[BadEntry]) -> None:
        write_atomically(self.path / BAD_FILES, listing({entry.file: entry.reason for entry in bad}))

    def _check_stop(self) -> None:
        if self.stop():
            finished = sum(1 for _ in self.shards.finished())
            raise Preempted(
                f"stopped by signal with {finished:,} of {len(self.shards):,} shards finished: run it again"
            )

    def _show(self) -> None:
        if self.processes.is_first:
            self._advance(self.processes.add("images", 0))

    def _poll(self) -> None:
        self._show()
        self._check_stop()
