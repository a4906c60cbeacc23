"""The numbers of drawn images as a table for the terminal, JSON and CSV files, and plots over the strength."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.html_report import page
from evaluation.plots import COLOURS, Plot, curve_plot
from evaluation.quality_rows import COLUMNS, REAL, Row, name_of
from evaluation.tables import aligned
from utils.files import write_text
from utils.names import csv_cell

PALE = f"{COLOURS[0]}66"  # seen on a light page and on a dark one
# What each plot shows: the numbers of drawn images, and whether those of real images are shown for comparison.
PLOTS = {
    "KID": ({"drawn": "kid"}, True),
    "Precision and recall": ({"precision": "precision", "recall": "recall"}, False),
    "Density and coverage": ({"density": "density", "coverage": "coverage"}, False),
    "Nearest training image": ({"drawn": "nearest"}, True),
    "Diversity": ({"drawn": "diversity"}, True),
}


def lines_of(rows: dict[str, Row]) -> list[list[str]]:
    """Cells with a heading, for tables."""
    body = [[name, *(_number(row[key]) for key in COLUMNS)] for name, row in rows.items()]
    return [["images", *COLUMNS.values()], *body]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def text_of(rows: dict[str, Row]) -> str:
    """A class's table for the terminal."""
    return aligned(lines_of(rows))


def write_quality(
    folder: Path, identity: dict[str, Any], classes: dict[str, dict[str, Row]], strengths: Sequence[float], note: str
) -> None:
    """Write quality.json, quality.csv and quality.html.

    Args:
        identity: what the numbers depend on.
        classes: the rows by class.
        note: a line below the page's heading.
    """
    content = {"of": identity, "classes": classes}
    write_text(folder / "quality.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class", "images", *COLUMNS])
    for name, rows in classes.items():
        writer.writerows([csv_cell(name), row_name, *map(repr, row.values())] for row_name, row in rows.items())
    write_text(folder / "quality.csv", buffer.getvalue())
    sections = [(name, lines_of(rows), plots_of(rows, strengths)) for name, rows in classes.items()]
    text = page("quality.template.html", title="Quality of drawn images", note=note, sections=sections)
    write_text(folder / "quality.html", text)


def plots_of(rows: dict[str, Row], strengths: Sequence[float]) -> list[Plot]:
    """A class's numbers over the strength; that of real images as a level line, KID between two standard errors."""
    xs, plots = np.array(strengths, float), []
    x_range = 0.0, max(float(xs.max()), 1e-6)
    for title, (keys, with_real) in PLOTS.items():
        curves = {name: _over_strength(rows, strengths, key) for name, key in keys.items()}
        if with_real:
            curves["real"] = np.full(len(xs), rows[REAL][next(iter(keys.values()))])
        band = {}
        if "kid" in keys.values():
            twice = 2 * _over_strength(rows, strengths, "kid_error")
            band = {"low": curves["drawn"] - twice, "high": curves["drawn"] + twice}
        values = np.concatenate([*curves.values(), *band.values()])
        # The plots without a line of real images are those of shares.
        y_range = min(0.0, float(values.min())), max(1e-6 if with_real else 1.0, 1.05 * float(values.max()))
        plot, pale = (
            curve_plot(title, {name: (xs, ys) for name, ys in part.items()}, "strength s", "", x_range, y_range)
            for part in (curves, band)
        )
        plot.lines = [(points, PALE) for points, _ in pale.lines] + plot.lines
        plots.append(plot)
    return plots


def _over_strength(rows: dict[str, Row], strengths: Sequence[float], key: str) -> np.ndarray:
    return np.array([rows[name_of(s)][key] for s in strengths])
