"""Finds the images in a folder and below it, also behind links, and says what it did not take."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.counts import counted

MEGAPIXELS = 178  # default limit, about that of Pillow, against small files that unpack to gigabytes
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_FOLDERS = ("ground_truth", "groundtruth", "ground truth", "masks", "mask", "gt", "掩码")
MASK_WORDS = frozenset(
    ("mask", "masks", "gt", "groundtruth", "maske", "masken", "masque", "masques", "maschera", "maschere", "mascara",
     "mascaras")
)  # fmt: skip
_OF_MASK = "masks?|gt|ground_?truth|label|seg|segmentation|annotation|maske|掩码"
_MASK_NAME = re.compile(rf"^(?:{_OF_MASK})[ _.-](?=.)|(?<=.)[ _.-](?:{_OF_MASK})$", re.IGNORECASE)
# Copies, thumbnails of network drives, and what was deleted.
_OF_SYSTEMS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "@recycle", "$recycle.bin",
     "system volume information")
)  # fmt: skip
_YEAR, _TWO, _BETWEEN = r"(?:19|20)\d\d", r"[0-3]\d", "[-_. ]"
_DATE = re.compile(
    rf"{_YEAR}(?:{_BETWEEN}{_TWO}{_BETWEEN}{_TWO}|[01]\d{_TWO})(?!\d).*|{_TWO}{_BETWEEN}{_TWO}{_BETWEEN}(?:{_YEAR}|\d\d)"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+")
# The first bytes of image formats, as (position, bytes).
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n"), (0, b"\xff\xd8\xff"), (0, b"GIF87a"), (0, b"GIF89a"), (0, b"II*\0"), (0, b"MM\0*"),
    (0, b"II+\0"), (0, b"MM\0+"), (8, b"WEBP"), (4, b"jP  \r\n"), (0, b"\xff\x4f\xff\x51"), (0, b"8BPS"),
    (0, b"\xff\x0a"), (4, b"JXL \r\n"), (0, b"v/1\x01"), (128, b"DICM"),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis", b"crx ")


@dataclass(frozen=True)
class FoundImages:
    """What a folder holds.

    Args:
        images: images with an ending in SUFFIXES, sorted by path.
        others: files whose content is an image, but whose ending is not in SUFFIXES.
        closed: folders that cannot be opened, each with the reason.
        left_out: folders that were not entered because the caller did not want them.
    """

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    closed: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)


def find_images(folder: str | Path, leave_out: Callable[[Path], bool] = lambda path: False) -> FoundImages:
    """Find the images in a folder and below it. Each real folder is entered once, so links cannot lead in circles.

    Hidden files and folders are skipped: a killed run or the operating system left them behind.

    Args:
        leave_out: whether not to enter a folder.
    """
    found = FoundImages()
    # Links wait until the end, so that an image which can be reached twice has its real path.
    folders, links = deque([Path(folder)]), deque()
    entered = {_identity(parent) for parent in Path(folder).resolve().parents if parent.exists()}
    while folders or links:
        current = (folders or links).popleft()
        try:
            identity, names = _identity(current), sorted(os.listdir(current))
        except OSError as error:
            found.closed.append((current, error.strerror or str(error)))
            continue
        if identity in entered:
            continue
        entered.add(identity)
        for path in (current / name for name in names if is_visible(name)):
            if os.path.isdir(path):
                if leave_out(path):
                    found.left_out.append(path)
                else:
                    (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in SUFFIXES:
                # A broken link counts as an image, so that reading it says what is wrong; a pipe or a device does not.
                if os.path.isfile(path) or path.is_symlink():
                    found.images.append(path)
            elif has_image_content(path):
                found.others.append(path)
    found.images.sort()
    return found


def list_images(folder: str | Path) -> list[Path]:
    """All images in a folder and below it, sorted by path; see find_images."""
    return find_images(folder).images


def has_image_content(path: str | Path) -> bool:
    """Whether a file begins like an image, whatever its ending.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.dat").write_bytes(b"GIF89a...")
        ...     has_image_content(Path(folder) / "a.dat"), has_image_content(Path(folder) / "gone")
        (True, False)
    """
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return True
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return True
    return any(head.startswith(signature, start) for start, signature in _SIGNATURES)


def is_mask_folder(path: Path) -> bool:
    """Whether a folder holds masks, by its name."""
    return path.name.lower() in MASK_FOLDERS


def names_masks(path: Path) -> bool:
    """Whether a word in a folder's name means masks. That of a product may too, so its images have to be looked at.

    Example:
        >>> [names_masks(Path(name)) for name in ("crack masks", "CrackMasks", "Masken_2", "masked")]
        [True, True, True, False]
    """
    return any(word.lower() in MASK_WORDS for word in _WORD.findall(path.name))


def is_date(name: str) -> bool:
    """Whether a folder is called by a date, perhaps with a time, and so neither by a class nor by a kind of defect.

    Example:
        >>> [is_date(name) for name in ("2026-11-30", "20261130_0815", "30.11.2026", "01", "2026", "20261", "bolts")]
        [True, True, True, False, False, False, False]
    """
    return _DATE.fullmatch(name) is not None


def image_stem(stem: str) -> str:
    """The name of the image whose mask has this name, both without suffix; the name itself if it is not that of a mask.

    Example:
        >>> [image_stem(stem) for stem in ("x_mask", "mask_x", "x.GT", "x-label", "x", "mask")]
        ['x', 'x', 'x', 'x', 'x', 'mask']
    """
    return _MASK_NAME.sub("", stem, count=1)


def masks_beside(images: Iterable[Path]) -> set[Path]:
    """Those of the images that are the masks of others beside them, by their names: x_mask.png and x_gt.png of x.png.

    Example:
        >>> [path.name for path in masks_beside(map(Path, ("x.JPG", "X_mask.png", "y_mask.png")))]
        ['X_mask.png']
    """
    images = list(images)
    stems = {(path.parent, path.stem.lower()) for path in images}
    named = ((path, image_stem(path.stem)) for path in images)
    return {path for path, stem in named if stem != path.stem and (path.parent, stem.lower()) in stems}


def not_read(others: Iterable[Path]) -> str:
    """A sentence about images in formats that are not read; "" without any.

    Example:
        >>> not_read([Path("a.gif"), Path("b.heic"), Path("c.gif")])
        '3 files were not read: .gif, .heic'
    """
    others = list(others)
    if not others:
        return ""
    endings = ", ".join(sorted({path.suffix.lower() or path.name for path in others})[:8])
    return f"{counted(len(others), 'file was', 'files were')} not read: {endings}"


def is_visible(name: str) -> bool:
    """Whether a file or folder counts: killed runs, operating systems and network drives leave others behind."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
