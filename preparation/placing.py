"""Bringing images to data/<dataset>/: a link to their folder, or copies."""

import filecmp
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from utils.errors import RunError, UsageError
from utils.files import PART, write_atomic


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the folder `source`, in place of a link that may be there already.

    Raises:
        UsageError: `target` is a file, or a folder that is not empty.
        RunError: the link cannot be made; not every system has links.
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
    part = target.with_name(f"{PART}{target.name}-{os.getpid()}")
    try:
        part.symlink_to(source.resolve(), target_is_directory=True)
        part.replace(target)
    except (OSError, NotImplementedError) as error:
        raise RunError(f"{target}: cannot be made a link to {source} ({error}); use --copy") from None
    finally:
        part.unlink(missing_ok=True)


def copy(source: Path, target: Path, names: list[str], overwrite: bool) -> None:
    """Copy files by their names relative to `source`; files that are there already, with the same content, are kept.

    Raises:
        UsageError: a different file of the same name is there and may not be overwritten. Nothing is copied then.
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
    original, copied = source.stat(), target.stat()
    if original.st_size != copied.st_size:
        return False
    # Copies keep the modification time, as precisely as the file system allows.
    return original.st_mtime_ns == copied.st_mtime_ns or filecmp.cmp(source, target, shallow=False)
