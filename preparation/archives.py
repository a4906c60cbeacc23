"""Unpacking archives of pictures: nothing lands outside of the target, and nothing stays behind when it fails."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from utils.errors import RunError, UsageError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz", ".zip")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class _Member:
    """A regular file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether a file's name ends as an archive's."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the regular files of a .tar (also .gz, .bz2, .xz) or .zip into an empty folder.

    Raises:
        UsageError: the archive is unreadable, encrypted or truncated, a member would land outside of the target or is
            a link or device, or a name comes twice. Members are looked at before any is written.
        RunError: the disk has no room for them.
    """
    try:
        with _opened(archive) as members:
            _check_names(archive, members)
            _check_room(archive, members, target)
            # disable=None: quiet where there is no terminal.
            for member in tqdm(members, f"unpacking {archive.name}", leave=False, disable=None):
                path = target / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, open(path, "wb") as written:
                    shutil.copyfileobj(source, written)
    except _BROKEN as error:
        if isinstance(error, UsageError):
            raise
        # tarfile tells in many lines what each of its decoders thought of the file.
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise UsageError(f"{archive} is not a readable archive ({reason})") from None
    except RuntimeError as error:
        if isinstance(error, RunError):
            raise
        # zipfile says so of encrypted members.
        raise UsageError(f"{archive}: {error}") from None
    except OSError as error:
        raise RunError(f"{archive}: cannot be unpacked to {target} ({error.strerror or error})") from None


@contextmanager
def _opened(archive: Path) -> Iterator[list[_Member]]:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            yield [_zip_member(archive, opened, info) for info in opened.infolist() if not info.is_dir()]
    else:
        with tarfile.open(archive) as opened:
            yield [_tar_member(archive, opened, info) for info in opened if not info.isdir()]


def _zip_member(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    _check_kind(archive, info.filename, kind in (0, stat.S_IFREG))
    return _Member(info.filename.replace("\\", "/"), info.file_size, lambda: opened.open(info))


def _tar_member(archive: Path, opened: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    _check_kind(archive, info.name, info.isreg())

    def read() -> Any:
        return opened.extractfile(info)

    return _Member(info.name, info.size, read)


def _check_kind(archive: Path, name: str, regular: bool) -> None:
    if not regular:
        raise UsageError(f"{archive}: {name} is a link or a device; only plain files are unpacked")


def _check_names(archive: Path, members: list[_Member]) -> None:
    seen: set[PurePosixPath] = set()
    for member in members:
        path = PurePosixPath(member.name)
        drive = len(member.name) > 1 and member.name[1] == ":"
        if path.is_absolute() or drive or ".." in path.parts or "\0" in member.name or not path.parts:
            raise UsageError(f"{archive}: {member.name!r} would land outside of the data folder; nothing was unpacked")
        if path in seen:
            raise UsageError(f"{archive}: holds {member.name} twice; nothing was unpacked")
        seen.add(path)
    for path in seen:
        above = next((parent for parent in path.parents if parent in seen), None)
        if above is not None:
            raise UsageError(f"{archive}: {above} is a file and a folder at once; nothing was unpacked")


def _check_room(archive: Path, members: list[_Member], target: Path) -> None:
    size, free = sum(member.size for member in members), shutil.disk_usage(target).free
    if size > free:
        raise RunError(f"{archive}: unpacks to {size >> 20} MiB, and {target} has room for {free >> 20} MiB")
