"""One run per folder: who holds the lock, and what is left of a lock whose process has ended."""

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, two_ranks
from tests.quick_start import Process
from utils import distributed, lock
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.lock import GUARD, NAME, folder_lock

ALONE = Run(0, 1, torch.device("cpu"))
HOLDER = """
import os, sys, time, torch
os.setsid()
from utils.distributed import Run
from utils.lock import folder_lock
with folder_lock(sys.argv[1], Run(0, 1, torch.device("cpu"))):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)  # as a loader worker that outlives its rank
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, how: str = "alone") -> Process:
    process = Process(["-c", HOLDER, str(folder), how], REPOSITORY, {})
    process.wait_for("held\n")
    return process


def end(process: Process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_lock_says_whose_it_is_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a/b"
    with folder_lock(folder, ALONE):
        owner = json.loads((folder / NAME).read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        assert 0 <= time.time() - owner["since"] < 60
    # Folders that it has made, and that are empty, go too.
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_and_does_not_touch_the_lock(tmp_path):
    process = hold(tmp_path)
    try:
        before = (tmp_path / NAME).read_text()
        with pytest.raises(UsageError) as error, folder_lock(tmp_path, ALONE):
            pass
        assert f"{tmp_path}: process {process.pid} on {socket.gethostname()} writes here (since 20" in str(error.value)
        assert (tmp_path / NAME).read_text() == before
        # Deleting the file that names the owner does not let a second run in.
        (tmp_path / NAME).unlink()
        with pytest.raises(UsageError, match="another process writes here"), folder_lock(tmp_path, ALONE):
            pass
    finally:
        end(process)


def test_a_killed_run_holds_no_lock(tmp_path):
    process = hold(tmp_path)
    end(process)
    assert (tmp_path / NAME).exists()
    with folder_lock(tmp_path, ALONE):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_workers_of_a_killed_run_hold_no_lock(tmp_path):
    process = hold(tmp_path, "fork")
    try:
        process.kill()
        process.communicate()
        with folder_lock(tmp_path, ALONE):
            pass
    finally:
        end(process)


def test_a_live_process_of_the_same_number_does_not_count(tmp_path):
    """Neither its existence nor its start is asked for: the operating system knows who holds the lock."""
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "since": time.time()}
    (tmp_path / NAME).write_text(json.dumps(owner))
    with folder_lock(tmp_path, ALONE):
        pass


def test_a_run_of_another_host_counts_and_its_file_stays(tmp_path):
    text = json.dumps({"pid": 7, "host": "elsewhere", "since": 0.0})
    (tmp_path / NAME).write_text(text)
    says = r"process 7 on elsewhere writes here .*delete .*\.lock only if"
    with pytest.raises(UsageError, match=says), folder_lock(tmp_path, ALONE):
        pass
    assert (tmp_path / NAME).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_file_system_without_locks_uses_the_file_alone(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock(tmp_path, ALONE):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on "), folder_lock(tmp_path, ALONE):
            pass
        assert (tmp_path / NAME).exists()
    assert NAME not in {path.name for path in tmp_path.iterdir()}


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    def denied(path: Path, **_) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunError, match="cannot be written"), folder_lock(tmp_path / "folder", ALONE):
        pass


def test_a_folder_that_its_last_holder_removes_is_made_again(tmp_path, monkeypatch):
    folder, acquire = tmp_path / "locked", lock.FileLock.acquire
    removals = []

    def removed_before(guard: lock.FileLock) -> object:
        if len(removals) < 3:
            removals.append(folder.rmdir())
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder / GUARD))
        return acquire(guard)

    monkeypatch.setattr(lock.FileLock, "acquire", removed_before)
    with folder_lock(folder):
        assert (folder / NAME).exists()
    assert len(removals) == 3
    assert not folder.exists()


def _contend(folder: str, times: int, counted: str) -> None:
    while times:
        try:
            with folder_lock(folder, ALONE):
                # Two at once would make one of these fail.
                handle = os.open(counted + ".inside", os.O_CREAT | os.O_EXCL)
                os.close(handle)
                with open(counted, "a") as file:
                    file.write("x")
                os.unlink(counted + ".inside")
            times -= 1
        except UsageError:
            pass


def test_a_folder_that_is_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    folder, is_dir = tmp_path / "locked", Path.is_dir
    folder.mkdir()
    removals = []

    def removed_before(path: Path, **options: object) -> bool:
        if path == folder and not removals:
            removals.append(folder.rmdir())
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", removed_before)  # Path.mkdir asks it where a path exists
    with folder_lock(folder):
        assert (folder / NAME).exists()
    assert removals == [None]


def test_no_two_of_many_contenders_hold_the_lock(tmp_path):
    """Locks are removed as they are released; a contender must not take one that has just been removed."""
    arguments = (str(tmp_path / "locked"), 50, str(tmp_path / "count"))
    program = f"from tests.utils.test_lock import _contend; _contend{arguments}"
    processes = [Process(["-c", program], REPOSITORY, {}) for _ in range(4)]
    assert [(process.communicate(), process.returncode) for process in processes] == [(("", ""), 0)] * 4
    assert (tmp_path / "count").stat().st_size == 200
    assert list(tmp_path.glob("locked/*")) == []  # the last one may have made the folder, and removed it


def _lock_in_rank(run: Run, folder: Path) -> None:
    with folder_lock(folder, run):
        assert json.loads((folder / NAME).read_text())["host"] == socket.gethostname()
        assert (folder / GUARD).exists()
        distributed.barrier()
    distributed.barrier()
    assert list(folder.iterdir()) == []
    distributed.barrier()
    if run.is_main:
        (folder / NAME).write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": 0.0}))
    with pytest.raises(UsageError, match="process 7 on elsewhere"), folder_lock(folder, run):
        pass


def test_all_ranks_get_the_lock_or_the_refusal(tmp_path):
    two_ranks(_lock_in_rank, tmp_path)


@pytest.mark.parametrize("name", ["results.csv", "results.csv/new"])
def test_a_file_in_place_of_the_folder_is_wrong_use(name, tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("kept")
    with pytest.raises(UsageError, match="is a file, where a folder is needed"), folder_lock(tmp_path / name):
        pass
    assert file.read_text() == "kept"
