"""Checkpoints to resume from: the newest whole one, and the one before it."""

import logging
from pathlib import Path
from typing import Any

from utils import distributed
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import Run
from utils.errors import UsageError

log = logging.getLogger("realnet")

LAST, PREVIOUS, NEXT = "ckpt_last.pth.tar", "ckpt_previous.pth.tar", "ckpt_next.pth.tar"


def save_resumable(folder: str | Path, content: dict[str, Any]) -> Path:
    """Make `content` the newest checkpoint of a folder; the one before it stays until the new one is whole."""
    folder = Path(folder)
    last = folder / LAST
    save_checkpoint(folder / NEXT, content)
    if last.exists():
        last.replace(folder / PREVIOUS)
    (folder / NEXT).replace(last)
    return last


def load_resumable(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint of a folder that can be read; None where there is none.

    A damaged one is named, and put aside so that it never takes the place of the good one before it.

    Raises:
        UsageError: there are some, and none can be read.
    """
    damaged = []
    for path in (Path(folder) / name for name in (LAST, PREVIOUS)):
        if not path.is_file():
            continue
        try:
            content = load_checkpoint(path)
        except UsageError as error:
            damaged.append((path, error))
            continue
        for broken, reason in damaged:
            log.warning("%s; %s is used instead", reason, path)
            broken.replace(broken.with_name(f"{broken.name}.damaged"))
        return content
    if damaged:
        raise damaged[0][1]
    return None


def resumable(folder: str | Path, run: Run, wanted: bool) -> dict[str, Any] | None:
    """What --resume goes on from, on every rank; None to start from the beginning.

    Args:
        folder: that no other run writes to (lock.exclusive); what a killed run left half-written is removed.
        wanted: whether --resume was given.
    """
    content = None
    if run.is_main:
        clear_leftovers(folder)
        content = load_resumable(folder) if wanted else None
        if wanted and content is None:
            log.info("%s: nothing to resume; starting from the beginning", folder)
    # Rank 0 puts damaged files aside before the others look.
    distributed.barrier()
    return content if run.is_main or not wanted else load_resumable(folder)


def clear_leftovers(folder: str | Path) -> None:
    """Remove what a killed run left half-written; nobody else may be writing there (see lock.exclusive)."""
    for path in Path(folder).glob(".part-*"):
        if path.is_file():
            path.unlink()
    (Path(folder) / NEXT).unlink(missing_ok=True)
