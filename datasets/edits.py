"""Pairs of a good image with an anomaly on it, and the mask, that synthesize.py --source edit has written before."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from utils.choices import EDIT
from utils.errors import UsageError
from utils.names import csv_cell

TABLE = "pairs.csv"
COLUMNS = ("image", "mask", "good", "type")


@dataclass(frozen=True)
class StoredPairs:
    """The pairs of a class.

    Args:
        masks: the mask's path for each image's path.
        of_good: the images that were made of a good image, by its file name.
    """

    masks: dict[Path, Path]
    of_good: dict[str, list[Path]] = field(default_factory=dict)

    def made_of(self, good: str | None) -> list[Path]:
        """The images that were made of a good image; empty if there are none, or if its name is not known."""
        return self.of_good.get(csv_cell(good), []) if good is not None else []


def read_pairs(folder: str | Path) -> StoredPairs:
    """Read the table of a folder of pairs; it may hold other types, which are left out.

    Raises:
        UsageError: the table is missing, or is not one of synthesize.py's.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    pairs = StoredPairs({})
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UsageError(f"{path}: lacks the column {missing[0]}")
        try:
            for row in reader:
                if row["type"] == EDIT and row["image"] and row["mask"] and row["good"]:
                    image = path.parent / row["image"]
                    pairs.masks[image] = path.parent / row["mask"]
                    pairs.of_good.setdefault(row["good"], []).append(image)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: is not readable ({error})") from None
    return pairs
