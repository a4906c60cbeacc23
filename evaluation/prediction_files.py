"""The files that predict.py writes: scores, heat maps, masks, and what an interrupted run continues from."""

import csv
import io
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.detector import Detection
from evaluation.inputs import HEAT_MAPS, MASKS, SCORES, Input, ResultNames
from evaluation.thresholds import Thresholds
from utils import cli
from utils.choices import NO_PICTURES, PNG
from utils.errors import UsageError
from utils.files import remove_parts, write_atomic, write_text, write_whole
from utils.names import csv_cell
from utils.pictures import heat_overlay, write_image
from utils.precision import FP32

COLUMNS = ("file", "score", "verdict", "threshold", "anomalous_share", "width", "height", "heatmap", "mask")
TABLE = "scores.csv"
RUN = "predict.json"  # the arguments of the run, so that --continue does not mix two runs
EARLIER_RUN = {"precision": FP32}  # what runs did before they could be told to do otherwise
# File names that are not UTF-8 become \udcNN, which json.loads turns back into the same names.
ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


@dataclass(frozen=True)
class Pictures:
    """The pictures of an image, as paths below the results' folder; None for one that is not written."""

    heat_map: str | None = None
    mask: str | None = None


class Results:
    """Writes the result files; each line is flushed as soon as its image is done.

    Args:
        folder: where to write.
        thresholds: of the verdicts; scores are normalised if they have a scale.
        run: the arguments that decide what the lines say; JSON values.
        heat_maps: format of heat maps, "png", "jpg" or "none".
        masks: whether to write masks.
        overwrite: replace earlier results.
        resume: append to earlier results of the same run.

    Raises:
        UsageError: the folder holds earlier results that may not be replaced, or (resume) those of another run.
    """

    def __init__(
        self,
        folder: Path,
        thresholds: Thresholds,
        run: dict[str, Any],
        heat_maps: str = PNG,
        masks: bool = True,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder, self.thresholds, self.heat_maps, self.masks = folder, thresholds, heat_maps, masks
        image = thresholds.image
        self.threshold = None if image is None else round(thresholds.normalised(image), 6)
        self.table, self.lines = folder / TABLE, folder / SCORES
        rows = self._earlier_rows(run) if resume else []
        self.done = {row["file"] for row in rows}
        self.count = len(rows)
        self.anomalous = sum(row.get("verdict") == "anomalous" for row in rows)
        pictures = [row[name] for row in rows for name in ("heatmap", "mask") if row.get(name)]
        formats = {PNG, heat_maps} - {NO_PICTURES}
        self.names = ResultNames(sorted(formats), (os.path.splitext(name.partition("/")[2])[0] for name in pictures))
        self.mode = "a" if resume else ("w" if overwrite else "x")
        self.run, self.rows = run, rows

    def __enter__(self) -> "Results":
        self.stack = ExitStack()
        with cli.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("", HEAT_MAPS, MASKS):
                remove_parts(self.folder / name, nested=bool(name))
            if self.mode == "a":
                # A killed run may have written half a line.
                _write(self.table, _csv_text(self.rows, header=True))
                _write(self.lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
            # Unbuffered, so that a line is on the disk as soon as its image is done.
            opened = [
                self.stack.enter_context(path.open(f"{self.mode}b", buffering=0)) for path in (self.table, self.lines)
            ]
            self.csv_file, self.json_file = opened
            if self.mode != "a":
                write_whole(self.csv_file, _encoded(_csv_text([], header=True)))
        write_text(self.folder / RUN, json.dumps(self.run, indent=2) + "\n")
        return self

    def __exit__(self, *raised: object) -> None:
        self.stack.close()

    def name(self, source: Input) -> str:
        """The name of an image's pictures. It depends on the names before, so ask in the order of the images."""
        return self.names.of(source.name)

    def draw(self, name: str, image: np.ndarray, detection: Detection) -> Pictures:
        """Write the heat map over an image, and the mask of the pixels that reach the pixel threshold.

        Several threads may draw at the same time.
        """
        heat_file = mask_file = None
        if self.heat_maps != NO_PICTURES:
            thresholds, heat_file = self.thresholds, f"{HEAT_MAPS}/{name}.{self.heat_maps}"
            heat = heat_overlay(image, detection.map, thresholds.low, thresholds.high, thresholds.pixel)
            write_image(self.folder / heat_file, heat)
        if self.masks and detection.mask is not None:
            mask_file = f"{MASKS}/{name}.{PNG}"
            write_image(self.folder / mask_file, detection.mask.astype(np.uint8) * 255)
        return Pictures(heat_file, mask_file)

    def add(self, source: Input, image: np.ndarray, detection: Detection, pictures: Pictures) -> None:
        """Write the line of an image, whose detection is finite, when its pictures are written."""
        mask, anomalous = detection.mask, detection.is_anomalous
        row = {
            "file": source.name,
            "score": round(self.thresholds.normalised(detection.score), 6),
            "verdict": None if anomalous is None else ("anomalous" if anomalous else "normal"),
            "threshold": self.threshold,
            "anomalous_share": None if mask is None else round(float(mask.mean()), 6),
            "width": image.shape[1],
            "height": image.shape[0],
            "heatmap": pictures.heat_map,
            "mask": pictures.mask,
        }
        # Encoded before anything is written: no half line, and no NaN, which JSON does not know.
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with cli.writing(self.folder):
            write_whole(self.json_file, _encoded(line))
            write_whole(self.csv_file, _encoded(_csv_text([row])))
        self.count += 1
        self.anomalous += bool(anomalous)

    def _earlier_rows(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """The complete lines of an interrupted run with the same arguments."""
        if not self.lines.exists():
            return []
        lines = self.lines.read_text(**ENCODING).split("\n")
        rows = [row for row in map(_parsed, lines) if row is not None and isinstance(row.get("file"), str)]
        earlier = _parsed((self.folder / RUN).read_text(**ENCODING)) if (self.folder / RUN).is_file() else None
        if earlier is None:
            raise UsageError(f"--continue: {self.folder / RUN} does not say which run {SCORES} is of; pass --overwrite")
        earlier = EARLIER_RUN | earlier
        changed = [f"{name} {earlier.get(name)}, now {now}" for name, now in run.items() if earlier.get(name) != now]
        if changed:
            advice = "give the same options, choose another --output, or pass --overwrite"
            raise UsageError(f"--continue: {self.folder} holds results of another run ({'; '.join(changed)}); {advice}")
        return rows


def rounded(value: float | None) -> float | None:
    """A score or threshold as it is written, with 6 digits."""
    return None if value is None else round(value, 6)


def _csv_text(rows: list[dict[str, Any]], header: bool = False) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(map(_for_spreadsheets, rows))
    return table.getvalue()


def _encoded(text: str) -> bytes:
    return text.encode(ENCODING["encoding"], ENCODING["errors"])


def _for_spreadsheets(row: dict[str, Any]) -> dict[str, Any]:
    return {name: csv_cell(value) if isinstance(value, str) else value for name, value in row.items()}


def _parsed(line: str) -> dict[str, Any] | None:
    """The JSON object in a line, or None if it is not complete."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda part: part.write_text(text, newline="", **ENCODING))
