"""Commands as processes that a test can kill: they start in a second, for their parent has imported everything."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 240.0  # for anything at all: the machine may be busy


class Job:
    """One command, with all that it starts; of its own session."""

    def __init__(self, jobs: "Jobs", number: int, folder: Path) -> None:
        self.jobs, self.number = jobs, number
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        self.pid = 0
        self.code: int | None = None

    @property
    def said(self) -> str:
        """Its stderr up to now."""
        return self.err.read_text() if self.err.exists() else ""

    def lines(self, word: str) -> list[list[str]]:
        """The lines of stderr that begin with a word, without it, split."""
        return [line.split()[1:] for line in self.said.splitlines() if line.startswith(word + " ")]

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so; fails if the job ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.code is None, f"ended with {self.code}: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until stderr holds a text so many times."""
        self.wait_until(lambda: self.said.count(line) >= times)

    def children(self) -> list[int]:
        """The pids that it has started itself, by age: the ranks of a launcher."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, -N after signal N."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.code is None:
            assert time.monotonic() < deadline, f"hangs: {self.said}"
            time.sleep(0.005)
        return self.code

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()


class Jobs:
    """Starts jobs, and knows what they have left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers, self._jobs = folder, count(), {}
        environment = {
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._is_ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._nursery.stdout:
            message = json.loads(line)
            if "ready" in message:
                self._is_ready.set()
            elif "pid" in message:
                self._jobs[message["id"]].pid = message["pid"]
            else:
                self._jobs[message["id"]].code = message["code"]

    def start(
        self,
        *arguments: str,
        faults: Sequence[Sequence[Any]] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """A command of diffussm, with faults (see `injections`) in all of its processes."""
        assert self._is_ready.wait(PATIENCE_SECONDS)
        job = Job(self, next(self._numbers), self.folder)
        self._jobs[job.number] = job
        request = {
            "id": job.number,
            "arguments": arguments,
            "faults": faults,
            "environment": dict(environment or {}),
            "out": str(job.out),
            "err": str(job.err),
        }
        self._nursery.stdin.write(json.dumps(request) + "\n")
        self._nursery.stdin.flush()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not job.pid:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return job

    def run(self, *arguments: str, code: int = 0, **options: Any) -> Job:
        """A command to its end, which has to be this one."""
        job = self.start(*arguments, **options)
        assert job.wait() == code, job.said
        return job

    def orphans(self, patience: float = 20.0) -> list[str]:
        """What is left of jobs that have ended, after a while in which it may end too."""
        pid, deadline = self._nursery.pid, time.monotonic() + patience
        while True:
            running = {job.pid for job in self._jobs.values() if job.code is None}
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found = [child for child in children if int(child) not in running]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def close(self) -> None:
        """End whatever still runs."""
        for job in self._jobs.values():
            if job.code is None and job.pid:
                os.killpg(job.pid, signal.SIGKILL)
        self._nursery.stdin.close()
        self._nursery.wait(30)
