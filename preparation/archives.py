"""Unpacks archives of images; writes nothing outside the target folder and refuses links and devices."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from utils.errors import RunError, UsageError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz", ".zip")
# Images hardly shrink in archives. Bitmaps may: ten times, perhaps.
MOST_TIMES, MOST_UNCHECKED = 200, 1 << 30
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, ValueError)


def is_archive(path: Path) -> bool:
    """Whether a path is a file with the suffix of an archive."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the regular files of a .tar (also .gz, .bz2, .xz) or .zip into an empty folder.

    Raises:
        UsageError: the archive is unreadable, encrypted or truncated, or claims to unpack to far too much; a member
            would land outside the target or is a link or device; or a name occurs twice. All members are checked before
            any is written.
        RunError: the disk has no room for the members or cannot be written.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, target)
        else:
            _unpack_tar(archive, target)
    except (UsageError, RunError):
        raise
    except _BROKEN as error:
        # tarfile's message has one line for each decoder tried; the first is enough.
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise UsageError(f"{archive} is not a readable archive ({reason})") from None
    except RuntimeError as error:
        # zipfile raises RuntimeError for encrypted members.
        raise UsageError(f"{archive}: {error}") from None
    except OSError as error:
        raise RunError(f"{archive}: cannot be unpacked to {target} ({error.strerror or error})") from None


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = [info for info in opened.infolist() if not info.is_dir()]
        for info in members:
            _refuse_special(archive, info.filename, stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG))
            info.filename = info.filename.replace("\\", "/")
        _check_names(archive, [info.filename for info in members])
        _check_room(archive, sum(info.file_size for info in members), target)
        for info in _progress(members, archive):
            opened.extract(info, target)


def _unpack_tar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as opened:
        members = [info for info in opened if not info.isdir()]
        for info in members:
            _refuse_special(archive, info.name, info.isreg())
        _check_names(archive, [info.name for info in members])
        _check_room(archive, sum(info.size for info in members), target)
        for info in _progress(members, archive):
            opened.extract(info, target, filter="data")


def _progress(members: list, archive: Path) -> tqdm:
    # disable=None hides the bar if there is no terminal.
    return tqdm(members, f"unpacking {archive.name}", leave=False, disable=None)


def _refuse_special(archive: Path, name: str, regular: bool) -> None:
    if not regular:
        raise UsageError(f"{archive}: {name} is a link or a device; only plain files are unpacked")


def _check_names(archive: Path, names: list[str]) -> None:
    seen: set[PurePosixPath] = set()
    for name in names:
        path = PurePosixPath(name)
        drive = len(name) > 1 and name[1] == ":"
        if path.is_absolute() or drive or ".." in path.parts or "\0" in name or not path.parts:
            raise UsageError(f"{archive}: {name!r} would land outside the data folder; nothing was unpacked")
        if path in seen:
            raise UsageError(f"{archive}: holds {name} twice; nothing was unpacked")
        seen.add(path)
    for path in seen:
        above = next((parent for parent in path.parents if parent in seen), None)
        if above is not None:
            raise UsageError(f"{archive}: {above} is both a file and a folder; nothing was unpacked")


def _check_room(archive: Path, size: int, target: Path) -> None:
    most = max(MOST_TIMES * archive.stat().st_size, MOST_UNCHECKED)
    if size > most:
        raise UsageError(
            f"{archive}: claims to unpack to {size >> 20} MiB, over {MOST_TIMES} times its size, as images never do"
        )
    free = shutil.disk_usage(target).free
    if size > free:
        raise RunError(f"{archive}: unpacks to {size >> 20} MiB, but {target} has room for {free >> 20} MiB")
