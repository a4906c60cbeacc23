"""Tables of metrics: on the terminal, as CSV, JSON and Markdown.

python -m utils.report experiments/demo/realnet_results brick grass    joins the tables of single classes
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import cli
from utils.checkpoint import write_text
from utils.errors import UsageError

COLUMNS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pro": "PRO",
    "image_ap": "image AP",
    "pixel_ap": "pixel AP",
    "image_f1": "image F1",
    "pixel_f1": "pixel F1",
}
MEAN = "mean"
Row = dict[str, float | None]


def with_mean(results: dict[str, Row]) -> dict[str, Row]:
    """The classes' metrics and their mean; a metric that a class lacks is left out of its mean."""
    mean: Row = {}
    for metric in COLUMNS:
        values = [row[metric] for row in results.values() if row[metric] is not None]
        mean[metric] = sum(values) / len(values) if values else None
    return {**results, MEAN: mean}


def _cells(name: str, row: Row) -> list[str]:
    return [name, *("n/a" if row[metric] is None else f"{100 * row[metric]:.2f}" for metric in COLUMNS)]


def text_table(table: dict[str, Row]) -> str:
    """Aligned columns, in percent."""
    lines = [["class", *COLUMNS.values()], *(_cells(name, row) for name, row in table.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(rendered)


def markdown_table(table: dict[str, Row]) -> str:
    """A Markdown table, in percent."""
    header = ["class", *COLUMNS.values()]
    lines: list[Sequence[str]] = [header, ["---", *["---:"] * len(COLUMNS)]]
    lines += [_cells(name, row) for name, row in table.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(folder: str | Path, table: dict[str, Row]) -> list[Path]:
    """Write metrics.csv and metrics.json (fractions) and metrics.md (percent); returns their paths."""
    folder = Path(folder)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class", *COLUMNS])
    for name, row in table.items():
        writer.writerow([name, *("" if row[metric] is None else repr(row[metric]) for metric in COLUMNS)])
    contents = {
        "metrics.csv": buffer.getvalue(),
        "metrics.json": json.dumps(table, indent=2, ensure_ascii=False) + "\n",
        "metrics.md": markdown_table(table),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def main() -> None:
    """Join <folder>/<class>/metrics.json of the classes named into one table; classes without one are left out."""
    if len(sys.argv) < 3:
        raise UsageError("usage: python -m utils.report FOLDER CLASS...")
    folder, results = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        path = folder / name / "metrics.json"
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
            results |= {key: row for key, row in table.items() if key != MEAN}
    if not results:
        raise UsageError(f"{folder}: none of {', '.join(sys.argv[2:])} has been evaluated")
    table = with_mean(results)
    print(text_table(table))
    write_tables(folder, table)


if __name__ == "__main__":
    cli.run(main)
