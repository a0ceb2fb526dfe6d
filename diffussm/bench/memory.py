"""Peak memory of a call: measured, and predicted without running it."""

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measured_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` has allocated at its worst, beyond what there was before.

    On a CPU the sum of all events of torch's allocator, so that work space inside FFT and matrix libraries
    does not count; on a GPU the caching allocator's own maximum.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        call()
    finally:
        with _silent_stderr():
            profiler.stop()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without the lines that the profiler's library writes to file descriptor 2 when it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def predicted_peak(prepare: Callable[[], Callable[[], object]]) -> int:
    """Bytes that the call made by `prepare` would hold at its worst, its own inputs and parameters included.

    Everything runs on fake tensors. Memory that an opaque operator takes and gives back is not seen.
    """
    live = _LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        prepare()()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operators return, until they are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size
