"""Folders of SDAS images: what sample.py has drawn of a class, and how strong each anomaly is.

<folder>/rank<r>_<i>.jpg    image i, drawn by rank r
<folder>/strengths.csv      a line for each image: COLUMNS
"""

import os
import re
from pathlib import Path

import numpy as np

from utils.files import remove_parts
from utils.pictures import write_image
from utils.row_table import Row, RowTable

TABLE, COLUMNS = "strengths.csv", ("image", "strength", "seed")
IMAGE_NAME = re.compile(r"rank\d+_(\d+)\.jpg")


class SDASFolder:
    """The folder of a class; only one run at a time may use it (lock.folder_lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = RowTable(path / TABLE, COLUMNS, _check, "delete it, and the strengths are not known")

    def indices(self) -> set[int]:
        """The indices of the images that are there."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return {int(match[1]) for name in names if (match := IMAGE_NAME.fullmatch(name))}

    def begin(self, overwrite: bool) -> None:
        """Remove what a killed run left half-written, and (overwrite) all earlier images."""
        remove_parts(self.path)
        if overwrite:
            for path in self.path.glob("rank*_*.jpg"):
                path.unlink()
            self.table.clear()
        self.table.begin()

    def write(self, index: int, image: np.ndarray, strength: float, seed: int, rank: int) -> None:
        """Write an image (H,W,3) uint8, and note its strength."""
        name = f"rank{rank}_{index}.jpg"
        # Noted first: a note without an image is left out, but an image without a note would not be drawn again.
        self.table.note({"image": name, "strength": f"{strength:.4f}", "seed": str(seed)}, rank)
        write_image(self.path / name, image)

    def finish(self) -> None:
        """Write the table of the images whose strength is known, in the order of their indices."""
        rows = self._rows()
        if rows:
            self.table.write(rows[name] for name in sorted(rows, key=lambda name: int(IMAGE_NAME.fullmatch(name)[1])))

    def strengths(self) -> dict[str, float]:
        """The strengths of the images by file name, as far as they are known.

        Raises:
            UsageError: somebody has damaged the table.
        """
        return {name: float(row["strength"]) for name, row in self._rows().items()}

    def _rows(self) -> dict[str, Row]:
        """The last row of each image that is there, by its name."""
        return {row["image"]: row for row in self.table.rows() if (self.path / row["image"]).is_file()}


def _check(row: Row) -> None:
    """Raise an error unless the row names an image of sample.py and has its strength."""
    if not IMAGE_NAME.fullmatch(row["image"]):
        raise ValueError(row["image"])
    float(row["strength"])
