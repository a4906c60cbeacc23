"""Tables of metrics: for the terminal, and as CSV, JSON and Markdown files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from utils.files import write_text
from utils.names import csv_cell, markdown_cell

COLUMNS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pro": "PRO",
    "image_ap": "image AP",
    "pixel_ap": "pixel AP",
    "image_f1": "image F1",
    "pixel_f1": "pixel F1",
    "pro_005": "PRO@0.05",
    "aupimo": "AUPIMO",
    "pixel_f1_deployed": "SegF1",
    "pixel_iou_deployed": "IoU",
    "pixel_iou_max": "best IoU",
}
# Of verdict.Verdict.row: numbers of images, and ends of 95% intervals.
VERDICTS = ("good_images", "good_flagged", "defective_images", "defects_missed")
INTERVALS = ("image_auroc_low", "image_auroc_high", "pixel_auroc_low", "pixel_auroc_high")
# What fits into a line; CSV and JSON hold all columns.
SHOWN = tuple(name for name in COLUMNS if name not in ("pixel_iou_deployed", "pixel_iou_max"))
HEADINGS = [COLUMNS[name] for name in SHOWN]
KINDS = ("csv", "json", "md")  # of files
FIRST_COLUMN = {"metrics_by_defect": "defect"}  # heading of the first column, by name of the table; else "class"
MEAN, PAPER = "mean", "paper (mean)"
Row = dict[str, float | None]


def with_mean(results: dict[str, Row]) -> dict[str, Row]:
    """Add a row with the mean of each metric over the classes in which it is defined."""
    mean: Row = {}
    for metric in COLUMNS:
        values = [row[metric] for row in results.values() if row[metric] is not None]
        mean[metric] = sum(values) / len(values) if values else None
    return {**results, MEAN: mean}


def with_paper(table: dict[str, Row], paper: dict[str, float]) -> dict[str, Row]:
    """Add a row with the paper's mean figures, if there are any."""
    return {**table, PAPER: {metric: paper.get(metric) for metric in COLUMNS}} if paper else table


def cells(name: str, row: Row) -> list[str]:
    """The cells of a row below HEADINGS, in percent with two decimals; n/a if a metric is undefined."""
    return [name, *("n/a" if row[metric] is None else f"{100 * row[metric]:.2f}" for metric in SHOWN)]


def text_table(table: dict[str, Row], first: str = "class") -> str:
    """A table with aligned columns, in percent; `first` is the heading of the first column."""
    return aligned([[first, *HEADINGS], *(cells(name, row) for name, row in table.items())])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells with aligned columns: the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(rendered)


def markdown_table(table: dict[str, Row], first: str = "class") -> str:
    """A Markdown table, in percent."""
    return markdown([[first, *HEADINGS], *(cells(name, row) for name, row in table.items())])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells; the first line is the header, the first cells are names."""
    header, *rows = lines
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([markdown_cell(row[0]), *row[1:]] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(
    folder: str | Path, name: str, table: dict[str, Row], paper: dict[str, float], note: str = ""
) -> list[Path]:
    """Write <name>.csv and .json (fractions) and <name>.md (percent, with the paper's row, and a note below).

    Of an empty table, the files of an earlier one are deleted.

    Returns:
        Their paths.
    """
    folder, first = Path(folder), FIRST_COLUMN.get(name, "class")
    if not table:
        for kind in KINDS:
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = [name for name in (*COLUMNS, *VERDICTS, *INTERVALS) if any(name in row for row in table.values())]
    writer.writerow([first, *columns])
    for key, row in table.items():
        values = (row.get(name) for name in columns)
        writer.writerow([csv_cell(key), *("" if value is None else repr(value) for value in values)])
    contents = (
        buffer.getvalue(),
        json.dumps(table, indent=2, ensure_ascii=False) + "\n",
        markdown_table(with_paper(table, paper), first) + (f"\n{note}\n" if note else ""),
    )
    paths = [folder / f"{name}.{kind}" for kind in KINDS]
    for path, content in zip(paths, contents, strict=True):
        write_text(path, content)
    return paths
