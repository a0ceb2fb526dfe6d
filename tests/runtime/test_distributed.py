"""Processes of a job find each other, agree, wait and part; the environment is read as launchers set it."""

import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffussm.runtime.distributed import Processes
from diffussm.runtime.errors import ConfigError

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR",
    "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING}, (5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", **MEETING}, (3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
    ids=["alone", "torchrun", "srun", "within a SLURM job"],
)
def test_the_environment_tells_who_we_are(environment, variables, expected):
    environment(**variables)
    found = Processes.from_environment()
    assert (found.rank, found.world_size, found.local_rank) == expected
    assert found.is_first == (expected[0] == 0)


def test_a_number_that_is_none_is_named(environment):
    environment(RANK="first", WORLD_SIZE="2", LOCAL_RANK="0", **MEETING)
    with pytest.raises(ConfigError, match="RANK=first: the launcher must set it to a number"):
        Processes.from_environment()


def test_alone_nothing_is_waited_for():
    with Processes().start(torch.device("cpu")) as processes:
        assert not dist.is_initialized()
        processes.barrier(lambda: pytest.fail("waited"))
        assert processes.broadcast_object({"a": 1}) == {"a": 1}
        assert [processes.add("x", 2), processes.add("x", 3), processes.add("y", 0)] == [2, 5, 0]
        assert processes.own_device(torch.device("cuda")) == torch.device("cuda")


def test_processes_that_do_not_come_are_one_error(environment, monkeypatch):
    monkeypatch.setattr("diffussm.runtime.distributed.MEETING_SECONDS", 1)
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(ConfigError, match=r"process 0 of 2 does not reach the others at 127\.0\.0\.1"):
        Processes.from_environment().start(torch.device("cpu"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(rank: int, port: int, attempt: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RESTART_COUNT=str(attempt),
    )  # fmt: skip
    with Processes.from_environment().start(torch.device("cpu")) as processes:
        total = torch.tensor(rank + 1.0)
        dist.all_reduce(total)
        assert total == 3
        for round in range(3):
            assert processes.broadcast_object(("from", round) if rank == 0 else None) == ("from", round)
        processes.add("x", rank + 1)
        waited = []
        if rank == 0:
            threading.Event().wait(0.5)
        processes.barrier(lambda: waited.append(1))
        assert bool(waited) == (rank == 1) and processes.add("x", 0) == 3
    assert not dist.is_initialized()


def test_two_processes_agree_and_wait():
    mp.start_processes(work, (free_port(), 0), nprocs=2, start_method="fork")


def test_a_restarted_job_does_not_see_what_the_dead_one_left():
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # as a launcher keeps it
    dist.PrefixStore("diffussm/attempt_0", store).add("x", 100)
    mp.start_processes(work_with_launchers_store, (port, 1), nprocs=2, start_method="fork")


def work_with_launchers_store(rank: int, port: int, attempt: int) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    work(rank, port, attempt)
