"""Looks into folders: which files are images, which folders hold masks or a class, and which files are neither."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from datasets.folders import SUFFIXES, is_visible
from preparation.findings import SURPLUS, UNREADABLE, Finding
from preparation.names import GOOD, Name, read_name

# Beside "mask" in a name; these alone could also be the name of a product.
MASK_FOLDERS = ("labels", "annotation", "annotations", "segmentation", "segmentations")

NOT_UTF8 = "its name is not UTF-8; rename it"


@dataclass
class Reader:
    """Walks the folders under a root and collects findings along the way.

    Args:
        root: the folder that names are relative to.
        findings: what it found.
        told: files that are left out of the lists for a reason that a finding tells.
    """

    root: Path
    findings: list[Finding] = field(default_factory=list)
    told: set[Path] = field(default_factory=set)

    def name(self, path: Path) -> str:
        """The path relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def report(self, kind: str, path: Path | str, text: str) -> None:
        where = self.name(path) if isinstance(path, Path) else path
        if isinstance(path, Path):
            self.told.add(path)
        # A name that is not UTF-8 cannot be printed without escaping.
        finding = Finding(kind, where.encode("utf-8", "backslashreplace").decode(), text)
        if finding not in self.findings:
            self.findings.append(finding)

    def subfolders(self, folder: Path) -> list[Path]:
        """Visible folders in a folder, sorted."""
        folders = sorted(path for path in _entries(folder, self) if path.is_dir() and is_visible(path.name))
        for path in folders:
            if not _printable(path):
                self.report(UNREADABLE, path, NOT_UTF8)
        return [path for path in folders if _printable(path)]

    def images(self, folder: Path, nested: bool = True, masks: bool = False) -> list[Path]:
        """Images in a folder, sorted; other files are reported.

        Args:
            nested: whether to look into its subfolders.
            masks: whether to look into mask folders, too.
        """
        images = []
        for path in sorted(_entries(folder, self)):
            if not is_visible(path.name):
                continue
            if path.is_dir():
                if not _printable(path):
                    self.report(UNREADABLE, path, NOT_UTF8)
                elif path.suffix.lower() in SUFFIXES:
                    self.report(UNREADABLE, path, "is a folder, not an image")
                elif path.is_symlink() and path.resolve() in (folder.resolve(), *folder.resolve().parents):
                    self.report(SURPLUS, path, "is a link to a folder above it")
                elif nested and (masks or not is_mask_folder(path)):
                    images += self.images(path, masks=masks)
            elif path.suffix.lower() not in SUFFIXES:
                self.report(SURPLUS, path, f"is not an image in a supported format ({' '.join(SUFFIXES)})")
            elif not path.is_file():
                self.report(UNREADABLE, path, "is a broken link, or not a file")
            elif not _printable(path):
                self.report(UNREADABLE, path, NOT_UTF8)
            else:
                images.append(path)
        return images


def has_images(folder: Path) -> bool:
    """Whether a folder directly contains images."""
    return any(
        path.suffix.lower() in SUFFIXES and is_visible(path.name) and path.is_file() for path in _entries(folder)
    )


# ---- what a folder is by its name and by the names in it -------------------------------------------------------------


def is_mask_folder(path: Path) -> bool:
    """Whether a folder's name says that it holds masks; a class "face mask" with a folder `good` does not."""
    name = read_name(path.name)
    if path.name.lower() in MASK_FOLDERS or (name.mask and not name.rest):
        return True
    return name.mask and not is_class(path)


def is_good_folder(path: Path) -> bool:
    """Whether a folder's name says that it holds good images. A class "normal bolts" with a folder `ok` does not."""
    name = read_name(path.name)
    return name.kind == GOOD and not name.mask and not _holds_good(path)


def is_class(folder: Path) -> bool:
    """Whether a folder holds training, test or good images in a subfolder."""
    return any(read_name(path.name).is_split or is_good_folder(path) for path in Reader(folder).subfolders(folder))


def _holds_good(folder: Path) -> bool:
    subfolders = Reader(folder).subfolders(folder)
    below = [path for path in subfolders if read_name(path.name).is_split]
    inside = [sub for path in below for sub in Reader(path).subfolders(path)]
    return any(_says_good(read_name(path.name)) for path in (*subfolders, *inside))


def _says_good(name: Name) -> bool:
    return name.kind == GOOD and not name.mask


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
