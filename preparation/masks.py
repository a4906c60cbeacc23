"""Matches masks to images."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets.folders import SUFFIXES, image_stem, masks_beside
from preparation.findings import AMBIGUOUS, SURPLUS
from preparation.folders import MASK_FOLDERS, Reader, is_mask_folder
from preparation.names import read_name

# Any other name, such as x_label.png, is a mask's only if x.png lies beside it.
_SURELY_MASK = re.compile(r"[ _.-](masks?|ground_?truth|maske|掩码)$", re.IGNORECASE)


class MaskIndex:
    """Finds the mask of an image by folder and name.

    The mask of <defect>/x.jpg is <mask folder>/<defect>/x.png, x_mask.png or mask_x.png, in any image format. The mask
    folder may lack the <defect> level, name it ("crack masks") or lie inside the defect's folder, and x_mask.png may
    lie beside x.jpg.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.masks: dict[tuple[str, ...], list[Path]] = defaultdict(list)

    def add_folder(
        self, folder: Path, inside: Path | None = None, defect_folders: Iterable[Path] | None = None
    ) -> None:
        """Index a mask folder.

        Args:
            inside: the folder of a defect type in which it lies.
            defect_folders: for a folder that the user chose: those of all defect types, one of which it may name.
        """
        name = read_name(folder.name)
        # "crack masks" names a defect type; the folder of a class does not, nor does any other name that was chosen.
        named = name.mask if defect_folders is None else name.core in {read_name(f.name).core for f in defect_folders}
        first = inside.name if inside else folder.name * named
        for path in self.reader.images(folder, masks=True):
            self.masks[_key(first, *path.relative_to(folder).parts[:-1], path.stem)].append(path)

    def add_folders_in(self, folder: Path, of_defect: bool = False) -> None:
        """Index the mask folders directly in a folder.

        Args:
            of_defect: whether it is that of a defect type.
        """
        for path in filter(is_mask_folder, self.reader.subfolders(folder)):
            self.add_folder(path, folder if of_defect else None)

    def split_off(self, images: list[Path], defect_folder: Path) -> list[Path]:
        """Index the masks that lie beside their images, and return the images without them."""
        masks = masks_among(images)
        for path in masks:
            parts = path.relative_to(defect_folder).parts[:-1]
            self.masks[_key(defect_folder.name, *parts, path.stem)].append(path)
        return [path for path in images if path not in masks]

    def of(self, image: Path, defect_folder: Path) -> Path | None:
        """The mask of an image, or None; if several masks match, report them and return None."""
        parts = image.relative_to(defect_folder).parts[:-1]
        for key in dict.fromkeys((_key(defect_folder.name, *parts, image.stem), _key(*parts, image.stem))):
            masks = self.masks.get(key, [])
            if len(masks) > 1:
                names = " and ".join(self.reader.name(mask) for mask in masks)
                self.reader.report(AMBIGUOUS, image, f"{names} could be its mask; none is used")
                self.reader.told.update(masks)
                return None
            if masks:
                return masks[0]
        return None


def masks_among(images: Iterable[Path]) -> set[Path]:
    """Those of the images that are masks by their names: x_mask.png, and x_gt.png or x_label.png beside x.png."""
    images = list(images)
    return masks_beside(images) | {path for path in images if _SURELY_MASK.search(path.stem)}


def without_masks(reader: Reader, images: list[Path]) -> list[Path]:
    """Good images without the masks among them, which are reported."""
    masks = masks_among(images)
    for path in sorted(masks):
        reader.report(SURPLUS, path, "looks like the mask of a good image; it is left out")
    return [path for path in images if path not in masks]


def _key(*parts: str) -> tuple[str, ...]:
    """The words of the folders, so that "Bad - crack" fits "crack masks", and the image's name without _mask.

    Folders that say nothing, such as `images` and `masks`, are left out, and so is the image's suffix in x.jpg.png.
    """
    *folders, stem = parts
    cores = (read_name(folder).core for folder in folders if folder.lower() not in MASK_FOLDERS)
    # Composed: the Mac writes an umlaut as two characters.
    stem = unicodedata.normalize("NFC", image_stem(stem).lower())
    inner = next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), "")
    return (*filter(None, cores), stem.removesuffix(inner))
