"""Bringing pictures to data/<dataset>/: a link to their folder, or copies."""

import filecmp
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from utils.checkpoint import write_atomic
from utils.errors import RunError, UsageError


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the folder `source`; a link that is there already is replaced.

    Raises:
        UsageError: a folder with something else in it is in the way, or the system has no links.
    """
    if target.resolve() == source.resolve():
        return
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise UsageError(
                f"{target} is there already and no link; use it with --root {target}, add to it with --copy, or move it"
            )
        target.rmdir()
    elif target.exists() and not target.is_symlink():
        raise UsageError(f"{target} is a file; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{target.name}-{os.getpid()}")
    try:
        part.symlink_to(source.resolve(), target_is_directory=True)
        part.replace(target)
    except (OSError, NotImplementedError) as error:
        raise RunError(f"{target}: cannot be made a link to {source} ({error}); take --copy") from None
    finally:
        part.unlink(missing_ok=True)


def copy(source: Path, target: Path, names: list[str], overwrite: bool) -> None:
    """Copy files by their names relative to `source`; what is there already and the same is left as it is.

    Raises:
        UsageError: another file of the same name is there and may not be overwritten. Nothing is copied then.
    """
    if target.is_symlink():
        target.unlink()
    if target.resolve() == source.resolve():
        return
    missing = [name for name in names if not _same(source / name, target / name)]
    different = [name for name in missing if (target / name).exists()]
    if different and not overwrite:
        raise UsageError(
            f"{target / different[0]} (and {len(different) - 1} more) differs from the file to be copied there; "
            "move it away, or pass --overwrite"
        )
    # disable=None: quiet where there is no terminal.
    for name in tqdm(missing, "copying", leave=False, disable=None):
        write_atomic(target / name, lambda part, name=name: shutil.copy2(source / name, part))


def _same(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    ours, theirs = source.stat(), target.stat()
    if ours.st_size != theirs.st_size:
        return False
    # Copies keep the time, as finely as the file system can.
    return ours.st_mtime_ns == theirs.st_mtime_ns or filecmp.cmp(source, target, shallow=False)
