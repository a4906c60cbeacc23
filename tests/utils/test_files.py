"""Files are whole or absent."""

import pytest

from utils.errors import RunError
from utils.files import remove_parts, write_atomic


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
