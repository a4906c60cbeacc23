"""The evaluation as one self-contained HTML file: tables, curves, histograms, and a gallery with filters."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import jinja2
import numpy as np

from evaluation.results import ClassResult
from evaluation.tables import COLUMNS, MEAN, PAPER, Row, cells
from utils.files import write_text

TEMPLATE = Path(__file__).with_name("html_report.template.html")
GOOD, DEFECTIVE = "#2563eb", "#dc2626"
COLOURS = ("#2563eb", "#d97706", "#059669")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 230, 42, 34, 26, 12
BINS = 30


def write_report(
    path: str | Path, title: str, notes: Sequence[str], table: dict[str, Row], results: Sequence[ClassResult]
) -> None:
    """Write the report.

    Args:
        title: heading.
        notes: lines below the heading.
        table: rows of the summary.
        results: results of each class.
    """
    cards = [(result.name, item) for result in results for item in result.gallery]
    cards.sort(key=lambda card: -card[1].error)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["jpeg"] = _jpeg
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        title=title,
        notes=notes,
        columns=list(COLUMNS.values()),
        summary=[(cells(name, row), name in (MEAN, PAPER)) for name, row in table.items()],
        sections=[_section(result) for result in results],
        cards=cards,
        defect_types=sorted({item.defect_type for _, item in cards}),
        width=WIDTH,
        height=HEIGHT,
    )
    write_text(path, text)


def _jpeg(image: np.ndarray) -> str:
    """An image as a data: URL."""
    stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def _section(result: ClassResult) -> dict:
    """The template's variables for one class."""
    thresholds = result.thresholds
    values = (("image", thresholds.image), ("pixel", thresholds.pixel))
    texts = [f"{name} threshold {value:.4g}" for name, value in values if value is not None]
    curves = result.curves
    rates = ("false positive rate", "true positive rate")
    plots = [
        _plot("Images: ROC", {"ROC": curves.get("roc")}, *rates),
        _plot(
            "Pixels: ROC and PRO",
            {"ROC": curves.get("pixel_roc"), "PRO": curves.get("pro")},
            rates[0],
            f"{rates[1]}, overlap",
        ),
        _plot(
            "Precision and recall",
            {"images": curves.get("pr"), "pixels": curves.get("pixel_pr")},
            "recall",
            "precision",
        ),
        _histogram(result),
    ]
    return {
        "name": result.name,
        "thresholds": f"{', '.join(texts)} ({thresholds.rule})"
        if texts
        else "no thresholds: good and defective images are needed",
        "plots": plots,
        "rows": [
            (cells(f"{defect_type} ({result.counts[defect_type]})", row), False)
            for defect_type, row in result.by_defect_type.items()
        ],
    }


# ---- plots -----------------------------------------------------------------------------------------------------------


@dataclass
class Plot:
    """A drawing in SVG coordinates.

    Args:
        legend: (name, colour), right of the title.
        x_ticks: (x, anchor, label), below the plot.
        y_ticks: (y, label), on the left, each with a grid line.
        lines: (points, colour).
        bars: (x, y, width, height, colour).
        marker: x of a dashed vertical line.
    """

    title: str
    x_label: str
    y_label: str
    legend: list[tuple[str, str]]
    x_ticks: list[tuple[float, str, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]] = field(default_factory=list)
    bars: list[tuple[float, float, str, str, str]] = field(default_factory=list)
    marker: float | None = None

    # Edges and middle of the axes.
    left, right, middle = LEFT, WIDTH - RIGHT, (LEFT + WIDTH - RIGHT) / 2
    top, bottom, centre = TOP, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2


def _x(fraction: float) -> float:
    return round(LEFT + fraction * (WIDTH - LEFT - RIGHT), 1)


def _y(fraction: float) -> float:
    return round(HEIGHT - BOTTOM - fraction * (HEIGHT - BOTTOM - TOP), 1)


def _ticks(low: float, high: float, top: float) -> tuple[list[tuple[float, str, str]], list[tuple[float, str]]]:
    """Ticks at both ends and in the middle of each axis."""
    anchors = ((0, "start"), (0.5, "middle"), (1, "end"))
    x_ticks = [(_x(f), anchor, f"{low + f * (high - low):.3g}") for f, anchor in anchors]
    return x_ticks, [(_y(f), f"{f * top:.3g}") for f, _ in anchors]


def _plot(title: str, curves: dict[str, tuple[np.ndarray, np.ndarray] | None], x_label: str, y_label: str) -> Plot:
    """A plot of curves in the unit square; undefined curves (None) are left out."""
    defined = {name: points for name, points in curves.items() if points is not None}
    lines = []
    for (x, y), colour in zip(defined.values(), COLOURS, strict=False):
        lines.append((" ".join(f"{_x(a)},{_y(b)}" for a, b in zip(x, y, strict=True)), colour))
    return Plot(title, x_label, y_label, list(zip(defined, COLOURS, strict=False)), *_ticks(0, 1, 1), lines)


def _histogram(result: ClassResult) -> Plot:
    """A histogram of the scores of good and defective images, with the threshold."""
    low, high = float(result.scores.min()), float(result.scores.max())
    high = max(high, low + 1e-6)
    groups = (("good", result.scores[~result.labels], GOOD), ("defective", result.scores[result.labels], DEFECTIVE))
    counts = [np.histogram(scores, BINS, (low, high))[0] for _, scores, _ in groups]
    top = max(1, *(int(count.max()) for count in counts))
    bars, bar_width = [], f"{_x(1 / BINS) - _x(0):.1f}"
    for (_, _, colour), count in zip(groups, counts, strict=True):
        for k, n in enumerate(count):
            if n:
                y = _y(n / top)
                bars.append((_x(k / BINS), y, bar_width, f"{_y(0) - y:.1f}", colour))
    threshold = result.thresholds.image
    marker = None if threshold is None else _x(min(max((threshold - low) / (high - low), 0), 1))
    legend = [(name, colour) for name, _, colour in groups]
    return Plot("Image scores", "image score", "images", legend, *_ticks(low, high, top), bars=bars, marker=marker)
