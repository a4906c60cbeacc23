"""Files are whole or absent."""

import os
import stat
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from utils.errors import RunError
from utils.files import delete_older, remove_parts, umask, write_atomic, write_text


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_disk_is_one_clear_error(tmp_path):
    def fail(part):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_atomic(tmp_path / "a.txt", fail)


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in (".part-x.png", ".part-y", "kept.png", ".hidden"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.png"]


def test_what_is_flushed_to_disk_is_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses to flush a file that is open for reading only."""
    flushed = []

    def windows_fsync(descriptor):
        os.write(descriptor, b"")
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", windows_fsync)
    write_text(tmp_path / "a.txt", "whole")
    assert flushed == [5]
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_the_umask_is_read_once_when_the_process_starts(tmp_path):
    program = (
        "import os; os.umask(0o027)\n"
        "from utils.files import umask, write_text\n"
        "os.umask = None\n"
        f"write_text({str(tmp_path / 'a.txt')!r}, 'x'); print(umask())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) == 0o027
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert os.umask(umask()) == umask()


def test_older_files_and_folders_are_deleted(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    delete_older(tmp_path.iterdir(), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle"}
    delete_older(tmp_path.iterdir(), 0)
    assert not list(tmp_path.iterdir())
