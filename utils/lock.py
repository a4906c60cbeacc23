"""Let only one run write to a folder.

The operating system holds the lock, on the file GUARD, and releases it when the process ends, however it ends. The file
NAME beside it says whose lock it is; a second file, because on Windows nobody can read a locked one.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils import distributed
from utils.distributed import Run
from utils.errors import RunError, UsageError

NAME = ".lock"
GUARD = ".lock.guard"
ATTEMPTS = 100  # to lock in a folder that others remove
# What file systems without locks answer, e.g. some network file systems.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def folder_lock(folder: str | Path, run: Run | None = None) -> Iterator[None]:
    """Keep other runs out of a folder; rank 0 holds the lock for all ranks. Folders that stay empty are removed.

    Args:
        run: None to lock without the other ranks, for what one rank does alone.

    Raises:
        UsageError: another run holds the lock, or may do so on another host; or there is a file in place of the folder.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    guards: list[FileLock | None] = []
    if run is None:
        guards.append(_acquire(folder))
    else:
        # No rank starts before rank 0 holds the lock.
        distributed.on_main(lambda: guards.append(_acquire(folder)))
    try:
        yield
    finally:
        if run is None or run.is_main:
            (folder / NAME).unlink(missing_ok=True)
            _release(folder / GUARD, guards[0])
            with suppress(OSError):  # it is not empty
                for path in made:
                    path.rmdir()


def _acquire(folder: Path) -> FileLock | None:
    """Take the lock; returns None where the file system has no locks, so that only the file NAME keeps others out."""
    # Its own fallback to a lock without the operating system would be NAME twice.
    guard = FileLock(folder / GUARD, blocking=False, fallback_to_soft=False)
    try:
        _lock_in(folder, guard)
    except Timeout:
        raise UsageError(_refusal(folder, "wait for it, or choose another folder")) from None
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        if file is not None:
            raise UsageError(f"{folder}: {file} is a file, where a folder is needed; choose another name") from None
        if error.errno not in NO_LOCKS:
            raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error
        guard = None
    try:
        _write_owner(folder, own_host_is_checked=guard is not None)
    except BaseException as error:
        _release(folder / GUARD, guard)
        if isinstance(error, OSError):
            raise RunError(f"{folder / NAME}: cannot be written ({error.strerror or error})") from error
        raise
    return guard


def _lock_in(folder: Path, guard: FileLock) -> None:
    """Make a folder and take the lock in it; whoever held it before may remove the folder in between."""
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            guard.acquire()
            return
        # mkdir raises FileExistsError if the folder was there when it tried, but no longer when it looked.
        except (FileNotFoundError, FileExistsError):
            if attempt == ATTEMPTS - 1:
                raise


def _write_owner(folder: Path, own_host_is_checked: bool) -> None:
    """Write the file NAME, in place of one whose process has ended.

    Args:
        own_host_is_checked: this process holds the guard, so no other process of this host has the lock. A process of
            another host may still have it, since locks do not reach every host of some network file systems.

    Raises:
        UsageError: the process of the present file may be alive.
    """
    path = folder / NAME
    owner = _owner(path)
    if own_host_is_checked and (owner is None or owner["host"] == socket.gethostname()):
        path.unlink(missing_ok=True)
    try:
        # "x" fails if the file is there: of two hosts without common locks, one gets it.
        with path.open("x", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, file)
    except FileExistsError:
        advice = f"wait for it, or choose another folder (delete {path} only if that process has ended)"
        raise UsageError(_refusal(folder, advice)) from None


def _owner(path: Path) -> dict | None:
    """What a lock's file says: pid, host, since; None if it is missing or broken."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "since": float(holder["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refusal(folder: Path, advice: str) -> str:
    owner = _owner(folder / NAME)
    if owner is None:
        return f"{folder}: another process writes here; {advice}"
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    return f"{folder}: process {owner['pid']} on {owner['host']} writes here (since {started}); {advice}"


def _release(path: Path, guard: FileLock | None) -> None:
    """Remove the guard's file and release it.

    Where an open file can be removed, this happens before the release: who has opened the file meanwhile finds that it
    has no name any more, and opens the next one (filelock checks this). Windows refuses to remove an open file.
    """
    if guard is None:
        return
    if os.name != "nt":
        path.unlink(missing_ok=True)
    guard.release()
    if os.name == "nt":
        with suppress(OSError):  # another process has it open
            path.unlink(missing_ok=True)
