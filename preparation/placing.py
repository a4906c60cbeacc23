"""Places images under data/<dataset>/, as a link to their folder or as copies."""

import filecmp
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from utils.errors import RunError, UsageError
from utils.files import PART, write_atomic


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the folder `source`, replacing an existing link.

    Raises:
        UsageError: `target` is a file, or a folder that is not empty.
        RunError: the link cannot be made, for instance because the file system has none.
    """
    if target.resolve() == source.resolve():
        return
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise UsageError(
                f"{target} exists and is not a link; use it with --root {target}, add to it with --copy, or move it"
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
        raise RunError(f"{target}: cannot be linked to {source} ({error}); use --copy") from None
    finally:
        part.unlink(missing_ok=True)


def copy(source: Path, target: Path, names: list[str], overwrite: bool) -> None:
    """Copy files, named relative to `source`; keep those that `target` already holds with the same content.

    Raises:
        UsageError: `target` holds a different file of that name, and `overwrite` is False. Nothing is copied.
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
    # disable=None hides the bar if there is no terminal.
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
