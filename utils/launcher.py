"""What torchrun, or another launcher, tells its ranks in the environment; and its end."""

import os
import socket
import sys
import threading
import time

from utils.errors import RunError, UsageError

LAUNCHER_SECONDS = 5.0
LAUNCHER_ENDED = "the launcher has ended; so does this rank"


def launched_ranks() -> tuple[int, int, int]:
    """World size, rank and local rank, as the launcher has set them in the environment.

    Raises:
        UsageError: they do not come from a launcher.
    """
    world_size = _number("WORLD_SIZE", 1)
    if world_size < 1:
        raise UsageError(f"WORLD_SIZE is 0 in the environment; {_advice('WORLD_SIZE')}")
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if world_size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {world_size} in the environment, but {', '.join(missing)} "
                f"{'are' if missing[1:] else 'is'} not set; {_advice('WORLD_SIZE')}"
            )
        port = _number("MASTER_PORT", 0)
        if not 0 < port < 65536:
            raise UsageError(f"MASTER_PORT is {port} in the environment, not a port (1 .. 65535)")
    if rank >= world_size:
        raise UsageError(f"RANK is {rank} in the environment, but WORLD_SIZE is {world_size}; {_advice('RANK')}")
    return world_size, rank, local_rank


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"{name} is {text[:40]!r} in the environment, which is not a number; {_advice(name)}")
    return int(text)


def _advice(name: str) -> str:
    return f"start with torchrun to run on several ranks, or `unset {name}` to run one process"


def as_one_process() -> None:
    """Forget the ranks of a launcher that are left in the environment, for commands that need none.

    Under torchrun, all ranks but the first end here: they would write the same files.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def end_with_launcher() -> None:
    """End this rank when its launcher is killed; otherwise it would wait for the other ranks until TIMEOUT.

    A thread does this, because Python runs no signal handlers while the main thread is blocked in a collective.

    Raises:
        RunError: the launcher ended while this rank was starting.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LAUNCHER_SECONDS)
        print(f"error: {LAUNCHER_ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # If the launcher died before getppid() was read, its store no longer answers.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not _store_answers():
        raise RunError(LAUNCHER_ENDED)


def _store_answers() -> bool:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + LAUNCHER_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=LAUNCHER_SECONDS).close()
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
