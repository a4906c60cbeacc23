"""Let only one run write to a folder: a lock file names its process."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed
from utils.distributed import Run
from utils.errors import RunError, UsageError

NAME = ".lock"


@contextmanager
def folder_lock(folder: str | Path, run: Run) -> Iterator[None]:
    """Keep other runs out of a folder; rank 0 holds the lock for all ranks.

    Raises:
        UsageError: another run holds the lock and may still be alive.
    """
    path = Path(folder) / NAME
    if run.is_main:
        _acquire(path)
    # No rank starts before rank 0 holds the lock. If rank 0 is refused, it ends and the launcher ends the others.
    distributed.barrier()
    try:
        yield
    finally:
        if run.is_main:
            path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    for _ in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _remove_if_dead(path)
            continue
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from error
        with os.fdopen(handle, "w") as file:
            json.dump(owner, file)
        return
    raise UsageError(f"{path}: other runs keep locking this folder; delete this file if there are none")


def _remove_if_dead(path: Path) -> None:
    """Remove a lock whose process has ended.

    Raises:
        UsageError: the process is alive, or was started on another host, where this cannot be checked.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    try:
        holder = json.loads(text)
        pid, host, since = int(holder["pid"]), str(holder["host"]), float(holder["since"])
    except (ValueError, KeyError, TypeError):
        # Incomplete: a run may be writing it right now, so only an incomplete lock older than 5 s counts as dead.
        if time.time() - path.stat().st_mtime > 5:
            path.unlink(missing_ok=True)
        else:
            time.sleep(0.5)
        return
    if host == socket.gethostname() and not _alive(pid, since):
        path.unlink(missing_ok=True)
        return
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    raise UsageError(
        f"{path.parent}: process {pid} on {host} writes here (since {started}); wait for it, or choose other saver "
        f"folders (delete {path} only if that process has ended)"
    )


def _alive(pid: int, since: float) -> bool:
    """Whether the process that took a lock on this host is alive; a later process with the same number is not it."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:
        # Fields after the process name: the 1st is the state, the 20th the start in clock ticks since boot (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = float(Path("/proc/stat").read_text().partition("btime ")[2].split()[0])
        started = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return True
    return fields[0] != "Z" and started <= since + 2
