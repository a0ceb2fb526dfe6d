"""Workers may die, hang or fail: no batch is lost, repeated or changed, and nothing of them outlives its use."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_loader import Latents, Numbers, assert_equal

from diffussm.data import workers as module
from diffussm.data.loader import BatchLoader
from diffussm.data.workers import MAX_DEATHS
from diffussm.runtime.errors import DataError, OutOfMemoryError, Preempted
from diffussm.runtime.signals import StopRequest


class Slow(Numbers):
    """Takes its time, so that a kill falls into the middle of a batch."""

    def __getitem__(self, index):
        time.sleep(0.001)
        return super().__getitem__(index)


class Deadly(Numbers):
    """Some images kill who reads them."""

    def __init__(self, length, deadly, number):
        super().__init__(length)
        self.deadly, self.number = deadly, number

    def __getitem__(self, index):
        if index == self.deadly:
            faulthandler.disable()  # pytest's, which would tell about it at length
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.name == "loader worker"]


def kill(pid: int) -> None:
    """Kill a worker, and see it dead."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def is_alive(pid: int | str) -> bool:
    """Whether a process runs; one that waits for its parent to take notice of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.fault("G12")
@pytest.mark.parametrize("source", [Slow(50), Latents()], ids=["images", "latents"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_workers_change_nothing(source, num_workers):
    reference = list(islice(BatchLoader(source, 8, 1, True).starting_at(5), 40))
    notes = []
    batches = BatchLoader(source, 8, 1, True, num_workers, warn=notes.append).starting_at(5)
    seen, kills = [], 0
    for step in range(40):
        seen.append(next(batches))
        if step % 3 == 0:
            for pid in workers()[: 1 + step % 2]:
                kill(pid)
                kills += 1
    batches.close()
    assert_equal(seen, reference)
    assert kills >= 14 and len(notes) >= kills - num_workers  # the last ones may not have been missed
    assert all("was killed by SIGKILL" in note for note in notes)


@pytest.mark.fault("G12")
def test_a_worker_killed_while_it_works_or_waits_is_not_missed():
    """At any moment, rather than between two batches."""
    reference = list(islice(BatchLoader(Slow(50), 8, 1, True).starting_at(0), 30))
    batches = BatchLoader(Slow(50), 8, 1, True, 2, warn=str).starting_at(0)
    seen = [next(batches)]
    for delay in range(1, 30):
        time.sleep(delay / 5000)
        os.kill(workers()[0], signal.SIGKILL)
        seen.append(next(batches))
    batches.close()
    assert_equal(seen, reference)


def test_a_death_does_not_interrupt_what_the_main_process_is_doing():
    before = signal.getsignal(signal.SIGCHLD)
    batches = BatchLoader(Slow(50), 8, 1, True, 2, warn=str).starting_at(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    for pid in workers():
        kill(pid)
    for _ in range(1000):  # a save, say: a handler would raise here
        pass
    assert next(batches).labels.shape == (8,)
    batches.close()


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGKILL, OutOfMemoryError, "killed by SIGKILL .*memory .*lower num_workers"),
        (signal.SIGSEGV, DataError, "killed by SIGSEGV .*set num_workers=0 .*a damaged file"),
    ],
)
def test_deaths_without_progress_end_the_run(number, error, said):
    notes = []
    loader = BatchLoader(Deadly(40, 7, number), 4, 0, True, 2, warn=notes.append)
    order = [i for batch in islice(BatchLoader(Numbers(40), 4, 0, True).starting_at(0), 10) for i in batch.labels]
    batches, read = loader.starting_at(0), 0
    with pytest.raises(error, match=said) as caught:
        for _ in batches:
            read += 1
    assert read == order.index(7) // 4 and f"batch of step {read} " in str(caught.value)
    assert len(notes) == MAX_DEATHS - 1 and "\n" not in str(caught.value)
    assert not workers()


def test_a_fault_of_ours_comes_with_its_traceback():
    class Faulty(Numbers):
        def __getitem__(self, index):
            return {}["no such key"]

    with pytest.raises(RuntimeError, match=r"(?s)in a loader worker.*no such key"):
        next(BatchLoader(Faulty(10), 4, 0, True, 1).starting_at(0))
    assert not workers()


def test_batches_stay_as_they_are_while_later_ones_are_read():
    batches = BatchLoader(Numbers(50), 8, 1, True, 2).starting_at(0)
    kept = [next(batches) for _ in range(12)]
    batches.close()
    assert_equal(kept, islice(BatchLoader(Numbers(50), 8, 1, True).starting_at(0), 12))


class Stuck(Numbers):
    """Hangs at the second batch, deaf to everything."""

    def __getitem__(self, index):
        if getattr(self, "read", 0) >= 4:
            while True:
                time.sleep(1)
        self.read = getattr(self, "read", 0) + 1
        return super().__getitem__(index)


@pytest.mark.parametrize("stop", [False, True], ids=["deaf", "stopped"])
def test_a_hanging_worker_does_not_outlive_its_use(stop):
    batches = BatchLoader(Stuck(40), 4, 0, True, 2).starting_at(0)
    next(batches)
    pids = workers()
    if stop:
        os.kill(pids[0], signal.SIGSTOP)
    batches.close()
    assert len(pids) == 2 and not any(map(is_alive, pids))


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """What waits for ever fails instead."""

    def fail(*_):
        raise AssertionError("waited for ever")  # no OSError, which would be taken for a worker's death

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_who_waits_for_a_hanging_worker_hears_a_request_to_stop(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)

    def poll():
        if not stop:
            os.kill(os.getpid(), signal.SIGTERM)  # by now it waits
        else:
            raise Preempted(f"stopped by {stop.signal}")

    with deadline(20), StopRequest() as stop:
        batches = BatchLoader(Stuck(40), 4, 0, True, 2, poll=poll).starting_at(0)
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            list(islice(batches, 9))
    assert not workers()


ENDS = {
    "returns": "",
    "fails": "raise ValueError",
    "exits": "sys.exit(3)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("end", ENDS)
def test_no_worker_outlives_the_main_process(end):
    code = (
        "import os, signal, sys\n"
        "from test_workers import BatchLoader, Numbers, Stuck, workers\n"
        f"source = {'Numbers' if end == 'is killed' else 'Stuck'}(40)\n"
        "batches = BatchLoader(source, 4, 0, True, 2).starting_at(0)\n"
        "next(batches)\n"
        "print(*workers(), flush=True)\n" + ENDS[end]
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    pids = process.stdout.split()
    assert len(pids) == 2, process.stderr
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_workers_outlast_the_signals_that_ask_the_main_process_to_stop():
    batches = BatchLoader(Slow(50), 8, 1, True, 2, warn=pytest.fail).starting_at(0)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        for pid in workers():
            os.kill(pid, number)
    assert_equal(list(islice(batches, 6)), islice(BatchLoader(Slow(50), 8, 1, True).starting_at(1), 6))
    batches.close()


def test_memory_and_open_files_do_not_grow_with_steps_and_deaths():
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    batches = BatchLoader(Numbers(50), 8, 1, True, 2, warn=str).starting_at(0)
    counts = set()
    for step in range(30):
        next(batches)
        if step % 5 == 0:
            kill(workers()[0])
        elif step % 5 == 4:
            counts.add(open_files())
    batches.close()
    assert max(counts) - min(counts) <= 1 and open_files() == before


def test_workers_use_one_thread_each():
    class Threads(Numbers):
        def __getitem__(self, index):
            return torch.full((1, 1, 2), torch.get_num_threads(), dtype=torch.uint8), 0

    batch = next(BatchLoader(Threads(10), 4, 0, True, 1).starting_at(0))
    assert batch.images.unique().tolist() == [1]
