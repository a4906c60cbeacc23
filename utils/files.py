"""Atomic writes: a file is complete or absent, never half-written."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.errors import RunError

PART = ".part-"  # prefix of files and folders that are still being written


def _read_umask() -> int:
    """The umask can only be read by setting it for a moment, during which other threads' files would be public."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()


def write_atomic(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Raises:
        RunError: the folder or the disk cannot be written to.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=path.suffix)
        os.close(handle)
        part = Path(name)
        write(part)
        with open(part, "r+b") as written:  # Windows flushes only files that are open for writing
            os.fsync(written.fileno())
        # mkstemp makes files private; set the permissions that open() would have set.
        part.chmod(0o666 & ~umask())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def umask() -> int:
    """The permission bits that new files do not get, as they were when this process started."""
    return UMASK


def remove_parts(folder: str | Path) -> None:
    """Delete files that a killed run left half-written; no other run may be writing there (see lock.folder_lock)."""
    for path in Path(folder).glob(f"{PART}*"):
        if path.is_file():
            path.unlink()


def delete_older(paths: Iterable[Path], keep: int) -> None:
    """Delete all but the last written `keep` files, or folders with the files directly in them."""
    ordered = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in ordered[max(0, keep) :]:
        if not path.is_dir():
            path.unlink()
            continue
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
