"""The run directory: one writer, whole files, clear refusals."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from diffussm.runtime.errors import RunDirectoryError, StorageError
from diffussm.runtime.run_dir import RunDirectory, append_line, write_atomically
from diffussm.runtime.signals import StopRequest


def test_a_second_writer_is_refused(tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open()
    with pytest.raises(RunDirectoryError, match="another process is using it"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_file_in_the_way_is_named_and_nothing_created(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match=f"{tmp_path / 'file'} is a file"):
        RunDirectory(tmp_path / "file" / "run").open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_line_is_not_added_to_one_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    append_line(path, "one")
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    path.write_text("one\ntw")
    append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"


def test_status_is_read_back_with_its_facts(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_status() is None
    run.write_status("preempted", images=7, exit_code=75)
    status = run.read_status()
    assert (status["state"], status["images"], status["exit_code"]) == ("preempted", 7, 75)
    assert json.loads((tmp_path / "status.json").read_text()) == status


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b"null", b'{"images": 7}'])
def test_a_status_that_is_none_is_damaged_and_gives_way_to_the_next(tmp_path, content):
    run = RunDirectory(tmp_path)
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"status\.json: damaged: delete it"):
        run.read_status()
    run.write_status("running")
    assert (run.read_status() or {})["state"] == "running"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_signals_become_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop and stop.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_missing_parents_are_checked_up_to_one_that_exists(tmp_path: Path):
    RunDirectory(tmp_path / "a" / "b" / "c").check()
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path):
    fork = multiprocessing.get_context("fork")
    run = RunDirectory(tmp_path / "run")
    run.open()
    ended, started = fork.Event(), fork.Event()
    child = fork.Process(target=lambda: (started.set(), ended.wait(60)))
    child.start()
    assert started.wait(60)
    run.close()  # as its death would
    again = RunDirectory(tmp_path / "run")
    again.open()
    again.close()
    ended.set()
    child.join()
