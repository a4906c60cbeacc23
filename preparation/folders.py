"""Looking into folders of pictures: what is a picture, what is a mask, and what is in the way."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets.images import SUFFIXES

MASK_FOLDERS = ("ground_truth", "groundtruth", "ground truth", "masks", "mask", "gt", "掩码")
_MASK_ENDING = re.compile(r"[_-](mask|gt|ground_?truth)$", re.IGNORECASE)

# Kinds of findings, in the order in which they are listed.
MISSING, SURPLUS, UNREADABLE, NO_MASK, AMBIGUOUS, LEAK = (
    "missing",
    "surplus",
    "unreadable",
    "without a mask",
    "ambiguous",
    "on both sides of the split",
)
KINDS = (MISSING, SURPLUS, UNREADABLE, NO_MASK, AMBIGUOUS, LEAK)


@dataclass(frozen=True)
class Finding:
    """Something about the pictures that their owner should know.

    Args:
        kind: one of KINDS.
        where: file, folder or class.
        text: what is the matter.
    """

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass
class Reader:
    """Walks the folders under a root and collects findings on the way."""

    root: Path
    findings: list[Finding] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The path relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def report(self, kind: str, path: Path | str, text: str) -> None:
        where = self.name(path) if isinstance(path, Path) else path
        # A name that is no UTF-8 cannot be printed as it is.
        self.findings.append(Finding(kind, where.encode("utf-8", "backslashreplace").decode(), text))

    def subfolders(self, folder: Path) -> list[Path]:
        """Visible folders in a folder, sorted."""
        return sorted(path for path in _entries(folder, self) if path.is_dir() and visible(path))

    def pictures(self, folder: Path, nested: bool = True) -> list[Path]:
        """Pictures in a folder (and those below it, but for mask folders), sorted; other files are reported."""
        found = []
        for path in sorted(_entries(folder, self)):
            if not visible(path):
                continue
            if path.is_dir():
                if path.suffix.lower() in SUFFIXES:
                    self.report(UNREADABLE, path, "is a folder, not a picture")
                elif path.is_symlink() and path.resolve() in (folder.resolve(), *folder.resolve().parents):
                    self.report(SURPLUS, path, "is a link to a folder above it")
                elif nested and not is_mask_folder(path):
                    found += self.pictures(path)
            elif path.suffix.lower() not in SUFFIXES:
                self.report(SURPLUS, path, f"is no picture that is read here ({' '.join(SUFFIXES)})")
            elif not path.is_file():
                self.report(UNREADABLE, path, "is a link to nothing, or no file")
            elif not _printable(path):
                self.report(UNREADABLE, path, "its name is not UTF-8; rename it")
            else:
                found.append(path)
        return found


def visible(path: Path) -> bool:
    """Whether a file or folder is meant for people: not hidden, and not what archivers of macOS leave."""
    return not path.name.startswith(".") and path.name not in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_mask_folder(path: Path) -> bool:
    return path.name.lower() in MASK_FOLDERS


def has_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder itself."""
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


class MaskIndex:
    """Finds the mask of a picture by folder and name.

    The mask of <kind>/x.jpg is <mask folder>/<kind>/x.png or x_mask.png, in any picture format; the folder of the kind
    may be left out, a mask folder may lie inside that of the kind, and x_mask.png may lie beside x.jpg.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.found: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        self.used: set[Path] = set()

    def add_folder(self, folder: Path, kind: str = "") -> None:
        """Take in a mask folder; `kind` is the folder of the kind that it lies in."""
        for path in self.reader.pictures(folder):
            parts = path.relative_to(folder).parts[:-1]
            self.found[_key(*([kind] if kind else []), *parts, path.stem)].append(path)

    def split_off(self, pictures: list[Path], kind_folder: Path) -> list[Path]:
        """Take masks that lie beside their pictures out of a list of pictures."""
        stems = {(path.parent, path.stem.lower()) for path in pictures}
        rest = []
        for path in pictures:
            base = _MASK_ENDING.sub("", path.stem)
            if base != path.stem and (path.parent, base.lower()) in stems:
                parts = path.relative_to(kind_folder).parts[:-1]
                self.found[_key(kind_folder.name, *parts, base)].append(path)
            else:
                rest.append(path)
        return rest

    def of(self, picture: Path, kind_folder: Path) -> Path | None:
        """The mask of a picture, or None; two that could be meant are reported."""
        parts = picture.relative_to(kind_folder).parts[:-1]
        for key in (_key(kind_folder.name, *parts, picture.stem), _key(*parts, picture.stem)):
            masks = self.found.get(key, [])
            if len(masks) > 1:
                names = " and ".join(self.reader.name(mask) for mask in masks)
                self.reader.report(AMBIGUOUS, picture, f"{names} could be its mask; none is taken")
                self.used.update(masks)
                return None
            if masks:
                self.used.add(masks[0])
                return masks[0]
        return None

    def report_unused(self, but: Iterable[str] = ()) -> None:
        """Report masks that no picture has asked for, but those of the kinds named."""
        for key, masks in self.found.items():
            if len(key) > 1 and key[0] in but:
                continue
            for mask in masks:
                if mask not in self.used:
                    self.reader.report(SURPLUS, mask, "is a mask without a defective picture of that name")


def _key(*parts: str) -> tuple[str, ...]:
    *folders, stem = parts
    return (*(folder.lower() for folder in folders), _MASK_ENDING.sub("", stem).lower())
