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
}
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
    """The cells of a row, in percent with two decimals; n/a if a metric is undefined."""
    return [name, *("n/a" if row[metric] is None else f"{100 * row[metric]:.2f}" for metric in COLUMNS)]


def text_table(table: dict[str, Row], first: str = "class") -> str:
    """A table with aligned columns, in percent; `first` is the heading of the first column."""
    return aligned([[first, *COLUMNS.values()], *(cells(name, row) for name, row in table.items())])


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
    return markdown([[first, *COLUMNS.values()], *(cells(name, row) for name, row in table.items())])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells; the first line is the header, the first cells are names."""
    header, *rows = lines
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([markdown_cell(row[0]), *row[1:]] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(folder: str | Path, name: str, table: dict[str, Row], paper: dict[str, float]) -> list[Path]:
    """Write <name>.csv and .json (fractions) and <name>.md (percent, with the paper's row); returns their paths."""
    folder, first = Path(folder), FIRST_COLUMN.get(name, "class")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([first, *COLUMNS])
    for key, row in table.items():
        writer.writerow([csv_cell(key), *("" if row[metric] is None else repr(row[metric]) for metric in COLUMNS)])
    contents = {
        f"{name}.csv": buffer.getvalue(),
        f"{name}.json": json.dumps(table, indent=2, ensure_ascii=False) + "\n",
        f"{name}.md": markdown_table(with_paper(table, paper), first),
    }
    for file, content in contents.items():
        write_text(folder / file, content)
    return [folder / file for file in contents]
