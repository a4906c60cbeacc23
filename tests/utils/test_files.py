"""Files are whole or absent."""

import errno
import io
import os
import stat
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from utils.errors import RunError, UsageError
from utils.files import (
    delete_older,
    remove_parts,
    umask,
    verify_checksums,
    write_atomic,
    write_checksums,
    write_text,
    write_whole,
)


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


def test_a_checksum_tells_of_a_flipped_bit_and_of_another_file(tmp_path):
    path, part = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    path.write_bytes(b"model")
    part.write_bytes(b"weights")
    verify_checksums(path)  # without a list, there is nothing to compare with
    write_checksums(path, part)
    verify_checksums(path)
    for file in (path, part):
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(UsageError, match=f"{file.name} does not match"):
            verify_checksums(path)
        file.write_bytes(whole)
    (tmp_path / "model.onnx.sha256").write_text("0  ../../etc/passwd\n")
    with pytest.raises(UsageError, match="which is not beside it"):
        verify_checksums(path)


def test_half_a_line_does_not_stay(tmp_path):
    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:3])

    path = tmp_path / "rows.csv"
    path.write_bytes(b"first\n")
    with Full(path, "ab") as file, pytest.raises(OSError, match="No space"):
        write_whole(file, b"second\n")
    assert path.read_bytes() == b"first\n"


def test_what_a_killed_run_has_left_goes_also_folders_and_below(tmp_path):
    (tmp_path / ".part-a/sub").mkdir(parents=True)
    (tmp_path / ".part-a/sub/x.png").touch()
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps/.part-b.png").touch()
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heatmaps"]
    remove_parts(tmp_path, nested=True)
    assert list((tmp_path / "heatmaps").iterdir()) == []
