"""The evaluation as one self-contained HTML file: tables, curves, histograms, and a gallery with filters."""

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import jinja2
import numpy as np

from evaluation.plots import Plot, curve_plot, ticks, x_at, y_at
from evaluation.results import ClassResult
from evaluation.tables import HEADINGS, MEAN, PAPER, Row, cells
from evaluation.training_curve import Curve
from utils.files import write_text

TEMPLATES, TEMPLATE = Path(__file__).parent, "html_report.template.html"
GOOD, DEFECTIVE = "#2563eb", "#dc2626"
BINS = 30


def write_report(
    path: str | Path,
    title: str,
    notes: Sequence[str],
    table: dict[str, Row],
    results: Sequence[ClassResult],
    by_selection: dict[str, Row] | None = None,
) -> None:
    """Write the report.

    Args:
        title: heading.
        notes: lines below the heading.
        table: rows of the summary.
        results: results of each class.
        by_selection: rows that compare how checkpoints were chosen.
    """
    cards = [(result.name, item) for result in results for item in result.gallery]
    cards.sort(key=lambda card: -card[1].error)
    text = page(
        TEMPLATE,
        title=title,
        notes=notes,
        columns=HEADINGS,
        summary=[(cells(name, row), name in (MEAN, PAPER)) for name, row in table.items()],
        selections=[(cells(name, row), name.endswith(": gap")) for name, row in (by_selection or {}).items()],
        sections=[_section(result) for result in results],
        cards=cards,
        defect_types=sorted({item.defect_type for _, item in cards}),
    )
    write_text(path, text)


def page(template: str, **values: object) -> str:
    """An HTML page from a template of this folder; the names in it cannot become markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["jpeg"] = _jpeg
    return environment.get_template(template).render(**values)


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
        curve_plot("Images: ROC", {"ROC": curves.get("roc")}, *rates),
        curve_plot(
            "Pixels: ROC and PRO",
            {"ROC": curves.get("pixel_roc"), "PRO": curves.get("pro")},
            rates[0],
            f"{rates[1]}, overlap",
        ),
        curve_plot(
            "Precision and recall",
            {"images": curves.get("pr"), "pixels": curves.get("pixel_pr")},
            "recall",
            "precision",
        ),
        _histogram(result),
    ]
    plots += _training_plots(result.training)
    return {
        "name": result.name,
        "verdict": [
            text for text in (result.verdict.counts(), result.verdict.intervals(), result.verdict.left_out()) if text
        ],
        "doubts": [f"{result.name} is {doubt}" for doubt in result.verdict.doubts],
        "thresholds": f"{', '.join(texts)} ({thresholds.rule})"
        if texts
        else "no thresholds: good and defective images are needed",
        "plots": plots,
        "rows": [
            (cells(f"{defect_type} ({result.counts[defect_type]})", row), False)
            for defect_type, row in result.by_defect_type.items()
        ],
    }


def _training_plots(training: dict[str, Curve]) -> list[Plot]:
    """The validations' metrics over the training steps: of the test list, and of held-out images."""
    plots = []
    for title, prefix in (("Training: test list", ""), ("Training: synthetic", "synthetic_")):
        named = {name: f"{prefix}{metric}" for name, metric in (("image", "image_auroc"), ("pixel", "pixel_auroc"))}
        curves = {name: np.array(training[key], float).T for name, key in named.items() if key in training}
        if curves:
            last, low = (max(x[-1] for x, _ in curves.values()), min(y.min() for _, y in curves.values()))
            points = {name: (x, y) for name, (x, y) in curves.items()}
            ranges = (0, max(1, last)), (min(0.5, low), 1)
            plots.append(curve_plot(title, points, "training step", "AUROC", *ranges))
    return plots


def _histogram(result: ClassResult) -> Plot:
    """A histogram of the scores of good and defective images, with the threshold."""
    threshold = result.thresholds.image
    # The threshold too: at the edge of the scores' range, it would seem to be the highest of them.
    shown = [*result.scores.tolist(), *([] if threshold is None else [threshold])]
    low, high = min(shown), max(shown)
    high = max(high, low + 1e-6)
    groups = (("good", result.scores[~result.labels], GOOD), ("defective", result.scores[result.labels], DEFECTIVE))
    counts = [np.histogram(scores, BINS, (low, high))[0] for _, scores, _ in groups]
    top = max(1, *(int(count.max()) for count in counts))
    bars, bar_width = [], f"{x_at(1 / BINS) - x_at(0):.1f}"
    for (_, _, colour), count in zip(groups, counts, strict=True):
        for k, n in enumerate(count):
            if n:
                y = y_at(n / top)
                bars.append((x_at(k / BINS), y, bar_width, f"{y_at(0) - y:.1f}", colour))
    marker = None if threshold is None else x_at((threshold - low) / (high - low))
    legend = [(name, colour) for name, _, colour in groups]
    axes = ticks((low, high), (0, top))
    return Plot("Image scores", "image score", "images", legend, *axes, bars=bars, marker=marker)
