"""Matches masks to images."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from preparation.findings import AMBIGUOUS, SURPLUS
from preparation.folders import Reader

_MASK_ENDING = re.compile(r"[_-](mask|gt|ground_?truth)$", re.IGNORECASE)


class MaskIndex:
    """Finds the mask of an image by folder and name.

    The mask of <defect>/x.jpg is <mask folder>/<defect>/x.png or x_mask.png, in any image format. The mask
    folder may lack the <defect> level or lie inside the defect's folder, and x_mask.png may lie beside x.jpg.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.masks: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        self.used: set[Path] = set()

    def add_folder(self, folder: Path, defect_type: str = "") -> None:
        """Index a mask folder; `defect_type` names the defect's folder if the mask folder lies inside it."""
        for path in self.reader.images(folder):
            parts = path.relative_to(folder).parts[:-1]
            self.masks[_key(*([defect_type] if defect_type else []), *parts, path.stem)].append(path)

    def split_off(self, images: list[Path], defect_folder: Path) -> list[Path]:
        """Index the masks that lie beside their images, and return the images without them."""
        stems = {(path.parent, path.stem.lower()) for path in images}
        rest = []
        for path in images:
            base = _MASK_ENDING.sub("", path.stem)
            if base != path.stem and (path.parent, base.lower()) in stems:
                parts = path.relative_to(defect_folder).parts[:-1]
                self.masks[_key(defect_folder.name, *parts, base)].append(path)
            else:
                rest.append(path)
        return rest

    def of(self, image: Path, defect_folder: Path) -> Path | None:
        """The mask of an image, or None; if several masks match, report them and return None."""
        parts = image.relative_to(defect_folder).parts[:-1]
        for key in (_key(defect_folder.name, *parts, image.stem), _key(*parts, image.stem)):
            masks = self.masks.get(key, [])
            if len(masks) > 1:
                names = " and ".join(self.reader.name(mask) for mask in masks)
                self.reader.report(AMBIGUOUS, image, f"{names} could be its mask; none is used")
                self.used.update(masks)
                return None
            if masks:
                self.used.add(masks[0])
                return masks[0]
        return None

    def report_unused(self, but: Iterable[str] = ()) -> None:
        """Report masks that belong to no image, except those in folders named in `but`."""
        for key, masks in self.masks.items():
            if len(key) > 1 and key[0] in but:
                continue
            for mask in masks:
                if mask not in self.used:
                    self.reader.report(SURPLUS, mask, "is a mask without a defective image of that name")


def _key(*parts: str) -> tuple[str, ...]:
    *folders, stem = parts
    return (*(folder.lower() for folder in folders), _MASK_ENDING.sub("", stem).lower())
