"""Atomic writes: a file is complete or absent, never half-written."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.errors import RunError, UsageError
from utils.names import shown

CHECKSUMS = ".sha256"  # after a file's name: the file with its checksum
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


def append_text(path: str | Path, text: str) -> None:
    """Append to a UTF-8 text file: the whole text, or nothing of it.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            write_whole(file, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_whole(file: io.FileIO, data: bytes) -> None:
    """Write bytes at the end of an unbuffered file; if that fails, none of them stays there."""
    end, view = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        file.truncate(end)
        raise


def umask() -> int:
    """The permission bits that new files do not get, as they were when this process started."""
    return UMASK


def remove_parts(folder: str | Path, nested: bool = False) -> None:
    """Delete what a killed run left half-written; no other run may be writing there (see lock.folder_lock).

    Args:
        nested: look into subfolders, too.
    """
    for path in list((Path(folder).rglob if nested else Path(folder).glob)(f"{PART}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_checksums(path: Path, *others: Path) -> None:
    """Write <path>.sha256, in the format of sha256sum, for a file and others in its folder that belong to it."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in (path, *others)]
    write_text(path.with_name(f"{path.name}{CHECKSUMS}"), "".join(lines))


def verify_checksums(path: Path) -> None:
    """Compare a file, and those that belong to it, with what write_checksums has written; nothing without that.

    Raises:
        UsageError: a file was damaged or replaced, or the list is not readable.
    """
    sums = path.with_name(f"{path.name}{CHECKSUMS}")
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition("  ")
        file = path.with_name(name) if name and Path(name).name == name else None
        if file is None or not file.is_file():
            raise UsageError(f"{sums}: names {shown(name)[:80]!r}, which is not beside it; export the model again")
        if sha256(file) != wanted:
            raise UsageError(f"{file} does not match {sums}: it is damaged, or was replaced; export it again")


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
