"""Folders of pairs: what synthesize.py writes for a class, and how it goes on where it was stopped.

    <folder>/test/<type>/<number>.png, ground_truth/<type>/<number>_mask.png    pairs, masks of 0 and 255
    <folder>/train/good/, test/good/                                            good images (good_images.place_good)
    <folder>/pairs.csv                                                          a line for each pair: COLUMNS
    <folder>/pairs.json                                                         the settings that the pairs depend on
    <folder>/preview.png                                                        the first ones as a sheet
    <folder>/annotations.json, yolo/                                            with --format coco, --format yolo

MVTec-AD's layout, so that prepare_data.py reads it.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.edits import TABLE
from datasets.images import read_image, read_mask
from datasets.pair_formats import coco_annotations, yolo_lines, yolo_settings
from datasets.pairs import Pair
from utils.choices import COCO, YOLO
from utils.config import changed_settings
from utils.errors import UsageError
from utils.files import link_file, remove_parts, write_text
from utils.names import csv_cell
from utils.pictures import Row as SheetRow
from utils.pictures import contact_sheet, outline, thumbnail, write_image
from utils.row_table import Row, RowTable

COLUMNS = ("image", "mask", "good", "source", "type", "opacity", "strength", "depth", "seed", "epoch", "index")
RECORD, PREVIEW, ANNOTATIONS = "pairs.json", "preview.png", "annotations.json"
FOLDERS = ("test", "ground_truth", "train", YOLO)
DATA = f"{YOLO}/data.yaml"
YOLO_PART = 5  # every fifth good image's pairs are validated on
SHEET_PAIRS, SHEET_COLUMNS, CELL = 12, 6, 192
_OUTLINE = (255, 40, 40)


class PairFolder:
    """The folder of a class; only one run at a time may use it (lock.folder_lock).

    Args:
        path: of the folder.
        types: the anomaly types of its pairs, in the order of their category numbers.
        seed: of the draws.
    """

    def __init__(self, path: Path, types: Sequence[str], seed: int) -> None:
        self.path, self.types, self.seed = path, list(types), seed
        self.table = RowTable(path / TABLE, COLUMNS, _check, "pass --overwrite to draw all pairs again")

    def check(self, record: dict[str, Any], overwrite: bool) -> None:
        """Refuse a folder whose files are others than this run's.

        Args:
            record: what the pairs depend on; JSON values.

        Raises:
            UsageError: it holds something else than pairs, or (unless overwrite) pairs of another record.
        """
        known = self.path / RECORD
        if not known.is_file():
            others = sorted(path.name for path in self.path.glob("*") if not path.name.startswith("."))
            if others:
                advice = "which synthesize.py has not written; choose another --output"
                raise UsageError(f"{self.path}: holds {', '.join(others[:3])}, {advice}")
            return
        try:
            earlier = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if overwrite:
            return
        if not isinstance(earlier, dict):
            raise UsageError(f"{known}: is not readable; pass --overwrite to draw all pairs again")
        changes = changed_settings(earlier, json.loads(json.dumps(record)))
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            what = f"holds pairs of other settings ({'; '.join(changes[:3])}{more})"
            raise UsageError(f"{self.path}: {what}; choose another --output, or pass --overwrite to delete them")

    def begin(self, record: dict[str, Any], overwrite: bool) -> None:
        """Remove what a killed run left half-written, and (overwrite) all earlier pairs; write the record."""
        remove_parts(self.path, nested=True)
        if overwrite:
            self.table.clear()
            for name in (PREVIEW, ANNOTATIONS):
                (self.path / name).unlink(missing_ok=True)
            for name in FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.table.begin()
        write_text(self.path / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def rows(self) -> dict[int, Row]:
        """The lines of the pairs whose files are there, by number."""
        rows = {_number(row): row for row in self.table.rows()}
        return {
            number: rows[number]
            for number in sorted(rows)
            if all((self.path / rows[number][name]).is_file() for name in ("image", "mask"))
        }

    def write(self, number: int, pair: Pair) -> Row:
        """Write a pair's two files; returns its line. Threads may call it for several pairs at once."""
        image, mask = f"test/{pair.type}/{number:06d}.png", f"ground_truth/{pair.type}/{number:06d}_mask.png"
        write_image(self.path / image, pair.image)
        write_image(self.path / mask, pair.mask * np.uint8(255))
        return {
            "image": image,
            "mask": mask,
            "good": csv_cell(pair.good),
            "source": csv_cell(pair.source.as_posix()) if pair.source else "",
            "type": pair.type,
            "opacity": f"{pair.opacity:.4f}",
            "strength": "" if pair.strength is None else f"{pair.strength:.4f}",
            "depth": "" if pair.depth is None else f"{pair.depth:.4f}",
            "seed": str(self.seed),
            "epoch": str(pair.epoch),
            "index": str(pair.index),
        }

    def note(self, row: Row, rank: int) -> None:
        """Note that a pair's files are complete, so that a later run need not draw it again."""
        self.table.note(row, rank)

    def finish(self, rows: dict[int, Row]) -> None:
        """Write the table and the sheet; what was noted is in the table now."""
        write_image(self.path / PREVIEW, self._sheet(list(rows.values())[:SHEET_PAIRS]))
        self.table.write(rows.values())

    def mask(self, row: Row) -> np.ndarray:
        """The mask of a pair, (H,W) uint8 in {0, 1}."""
        return read_mask(self.path / row["mask"])

    # ---- other formats -----------------------------------------------------------------------------------------------

    def formats(self) -> set[str]:
        """The other formats in which the folder holds annotations."""
        files = {COCO: ANNOTATIONS, YOLO: DATA}
        return {form for form, name in files.items() if (self.path / name).is_file()}

    def write_coco(self, rows: dict[int, Row], masks: Iterable[np.ndarray]) -> None:
        """Write COCO's annotations.json: instances with exact run lengths; categories are the types, from 1 on."""
        images, annotations = [], []
        for (number, row), mask in zip(rows.items(), masks, strict=True):
            height, width = mask.shape
            images.append({"id": number, "file_name": row["image"], "width": width, "height": height})
            annotations += coco_annotations(mask, number, 1 + self.types.index(row["type"]), 1 + len(annotations))
        categories = [{"id": 1 + number, "name": name} for number, name in enumerate(self.types)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_text(self.path / ANNOTATIONS, json.dumps(content) + "\n")

    def write_yolo(self, rows: dict[int, Row], masks: Iterable[np.ndarray]) -> None:
        """Write yolo/: data.yaml, images/{train,val}/ (the same files by another name) and labels/{train,val}/.

        The pairs of every fifth good image are validated on, so that no good image is on both sides.
        """
        folder, splits = self.path / YOLO, set()
        for row, mask in zip(rows.values(), masks, strict=True):
            split = "val" if int(row["index"]) % YOLO_PART == YOLO_PART - 1 else "train"
            splits.add(split)
            name = f"{split}/{row['type']}_{Path(row['image']).stem}"
            image, label = folder / f"images/{name}.png", folder / f"labels/{name}.txt"
            if not image.is_file():
                link_file(self.path / row["image"], image)
            if not label.is_file():
                write_text(label, yolo_lines(mask, self.types.index(row["type"])))
        write_text(self.path / DATA, yolo_settings(self.types, "val" in splits))

    # ---- the parts ---------------------------------------------------------------------------------------------------

    def _sheet(self, rows: Sequence[Row]) -> np.ndarray:
        """Images above the same images with their masks outlined, with types and opacities."""
        images = [thumbnail(read_image(self.path / row["image"]), CELL) for row in rows]
        outlined = [image.copy() for image in images]
        for row, image in zip(rows, outlined, strict=True):
            # Outlined after shrinking, where a line of one pixel stays visible.
            outline(image, read_mask(self.path / row["mask"], image.shape[:2]) > 0, _OUTLINE)
        size = tuple(max(image.shape[axis] for image in images) for axis in (0, 1))
        lines: list[SheetRow] = []
        for start in range(0, len(rows), SHEET_COLUMNS):
            part = slice(start, start + SHEET_COLUMNS)
            captions = [f"{row['type']} {float(row['opacity']):.2f}" for row in rows[part]]
            lines.append((captions, [_cell(image, size) for image in images[part]]))
            lines.append(("", [_cell(image, size) for image in outlined[part]]))
        return contact_sheet(lines)


def _cell(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The image in the corner of a white one of size (height, width)."""
    cell = np.full((*size, 3), 255, np.uint8)
    cell[: image.shape[0], : image.shape[1]] = image
    return cell


def _number(row: Row) -> int:
    return int(Path(row["image"]).stem)


def _check(row: Row) -> None:
    """Raise an error unless there are numbers where numbers belong."""
    _number(row), float(row["opacity"]), int(row["index"])
