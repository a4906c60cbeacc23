"""Looks into folders: which files are images, which folders hold masks, and which files are neither."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from datasets.images import SUFFIXES
from preparation.findings import SURPLUS, UNREADABLE, Finding

MASK_FOLDERS = ("ground_truth", "groundtruth", "ground truth", "masks", "mask", "gt", "掩码")


@dataclass
class Reader:
    """Walks the folders under a root and collects findings along the way."""

    root: Path
    findings: list[Finding] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The path relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def report(self, kind: str, path: Path | str, text: str) -> None:
        where = self.name(path) if isinstance(path, Path) else path
        # A name that is not UTF-8 cannot be printed without escaping.
        self.findings.append(Finding(kind, where.encode("utf-8", "backslashreplace").decode(), text))

    def subfolders(self, folder: Path) -> list[Path]:
        """Visible folders in a folder, sorted."""
        return sorted(path for path in _entries(folder, self) if path.is_dir() and visible(path))

    def images(self, folder: Path, nested: bool = True) -> list[Path]:
        """Images in a folder and, if `nested`, below it (except in mask folders), sorted; other files are reported."""
        images = []
        for path in sorted(_entries(folder, self)):
            if not visible(path):
                continue
            if path.is_dir():
                if path.suffix.lower() in SUFFIXES:
                    self.report(UNREADABLE, path, "is a folder, not an image")
                elif path.is_symlink() and path.resolve() in (folder.resolve(), *folder.resolve().parents):
                    self.report(SURPLUS, path, "is a link to a folder above it")
                elif nested and not is_mask_folder(path):
                    images += self.images(path)
            elif path.suffix.lower() not in SUFFIXES:
                self.report(SURPLUS, path, f"is not an image in a supported format ({' '.join(SUFFIXES)})")
            elif not path.is_file():
                self.report(UNREADABLE, path, "is a broken link, or not a file")
            elif not _printable(path):
                self.report(UNREADABLE, path, "its name is not UTF-8; rename it")
            else:
                images.append(path)
        return images


def visible(path: Path) -> bool:
    """Whether a file or folder is neither hidden nor left behind by an operating system."""
    return not path.name.startswith(".") and path.name not in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_mask_folder(path: Path) -> bool:
    return path.name.lower() in MASK_FOLDERS


def has_images(folder: Path) -> bool:
    """Whether a folder directly contains images."""
    return any(path.suffix.lower() in SUFFIXES and visible(path) and path.is_file() for path in _entries(folder))


def _entries(folder: Path, reader: Reader | None = None) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        if reader is not None:
            reader.report(UNREADABLE, folder, f"cannot be opened ({error.strerror})")
        return []


def _printable(path: Path) -> bool:
    try:
        os.fsencode(path.name).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
