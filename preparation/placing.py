"""Opens the folder or archive of the images, and places them under data/<dataset>/ as a link or as copies."""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from preparation.archives import SUFFIXES, is_archive, unpack
from utils.errors import RunError, UsageError
from utils.files import PART, umask, write_atomic
from utils.log import log


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


@contextmanager
def opened(root: Path, target: Path) -> Iterator[Path]:
    """The folder of the images. An archive is unpacked beside `target`; unless moved there, its files are deleted."""
    if not root.exists():
        raise UsageError(f"--root {root} does not exist")
    if root.is_dir():
        yield root
        return
    if not is_archive(root):
        raise UsageError(f"--root {root} is neither a folder nor an archive ({' '.join(SUFFIXES)})")
    if target.exists():
        raise UsageError(f"{target} already exists; use it with --root {target}, or move it away")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PART, dir=target.parent) as folder:
            unpack(root, Path(folder))
            yield Path(folder)
    except OSError as error:
        raise RunError(f"{target.parent}: cannot be written ({error.strerror or error})") from None


def place(given: Path, root: Path, target: Path, names: list[str], as_copies: bool, overwrite: bool) -> None:
    """Move (from an unpacked archive), copy or link the images to data/<dataset>/.

    Args:
        given: the folder or archive that the user passed.
        root: the folder of the images, in it or unpacked from it.
        names: the files to copy, relative to `root`.
    """
    if given.is_file():
        shutil.move(root, target)
        # mkdtemp makes private folders.
        target.chmod(0o777 & ~umask())
    elif as_copies:
        copy(root, target, names, overwrite)
    else:
        link(root, target)
    how = "link to " + str(target.resolve()) if target.is_symlink() else "images"
    log.info("%s: %s", target, how)
