"""The evaluation as one HTML file that needs nothing else: tables, curves, histograms, and a gallery with filters."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import cv2
import numpy as np

from evaluation.results import ClassResult, Shown
from evaluation.tables import COLUMNS, MEAN, PAPER, Row, cells
from utils.checkpoint import write_text

TEMPLATE = Path(__file__).with_name("html_report.template.html")
COLOURS = ("#2563eb", "#d97706", "#059669")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 230, 42, 34, 26, 12
BINS = 30


def write_report(
    path: str | Path, title: str, notes: Sequence[str], table: dict[str, Row], results: Sequence[ClassResult]
) -> None:
    """Write the report.

    Args:
        title: heading.
        notes: lines under it.
        table: rows of the summary.
        results: of each class.
    """
    cards = [(result.name, shown) for result in results for shown in result.gallery]
    cards.sort(key=lambda card: -card[1].error)
    kinds = sorted({shown.kind for _, shown in cards})
    filled = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        summary=_table(table, "class"),
        class_options=_options(result.name for result in results),
        kind_options=_options(kinds),
        sections="\n".join(_section(result) for result in results),
        gallery="\n".join(_card(name, shown) for name, shown in cards),
    )
    write_text(path, filled)


def _options(names: Iterable[str]) -> str:
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)


def _table(table: dict[str, Row], first: str) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in (first, *COLUMNS.values()))
    rows = []
    for name, row in table.items():
        style = ' class="mean"' if name in (MEAN, PAPER) else ""
        values = cells(name, row)
        rows.append(f"<tr{style}>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _section(result: ClassResult) -> str:
    thresholds = result.thresholds
    told = [
        f"{what} threshold {value:.4g}"
        for what, value in (("image", thresholds.image), ("pixel", thresholds.pixel))
        if value is not None
    ]
    text = f"{', '.join(told)} ({thresholds.rule})" if told else "no thresholds: good and defective pictures are needed"
    images = {label: result.curves[key] for label, key in (("ROC", "roc"),) if key in result.curves}
    pixels = {
        label: result.curves[key] for label, key in (("ROC", "pixel_roc"), ("PRO", "pro")) if key in result.curves
    }
    precision = {
        label: result.curves[key] for label, key in (("images", "pr"), ("pixels", "pixel_pr")) if key in result.curves
    }
    plots = [
        _plot("Images: ROC", images, "false positive rate", "true positive rate"),
        _plot("Pixels: ROC and PRO", pixels, "false positive rate", "true positive rate, overlap"),
        _plot("Precision and recall", precision, "recall", "precision"),
        _histogram(result),
    ]
    kinds = {f"{kind} ({result.counts[kind]})": row for kind, row in result.kinds.items()}
    name = html.escape(result.name)
    return (
        f'<section data-class="{name}"><h2>{name}</h2><p>{html.escape(text)}</p>'
        f'<div class="plots">{"".join(plots)}</div>{_table(kinds, "defect (pictures)") if kinds else ""}</section>'
    )


# ---- plots -----------------------------------------------------------------------------------------------------------


def _x(value: float) -> float:
    return round(LEFT + value * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float) -> float:
    return round(HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - TOP), 1)


def _frame(title: str, x_label: str, y_label: str, x_range: tuple[float, float], y_top: float, content: str) -> str:
    """Axes around a drawing whose coordinates are fractions of the axes."""
    low, high = x_range
    ticks = "".join(
        f'<text x="{_x(f)}" y="{HEIGHT - BOTTOM + 13}" text-anchor="{anchor}">{low + f * (high - low):.3g}</text>'
        f'<text x="{LEFT - 5}" y="{_y(f) + 3}" text-anchor="end">{f * y_top:.3g}</text>'
        f'<line x1="{_x(0)}" x2="{_x(1)}" y1="{_y(f)}" y2="{_y(f)}" class="grid"/>'
        for f, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{html.escape(title)}</title>'
        f'<text x="{LEFT}" y="15" class="head">{html.escape(title)}</text>{ticks}{content}'
        f'<text x="{_x(0.5)}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="translate(11 {_y(0.5)}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
        "</svg>"
    )


def _plot(title: str, curves: dict[str, tuple[np.ndarray, np.ndarray]], x_label: str, y_label: str) -> str:
    if not curves:
        message = f'<text x="{_x(0.5)}" y="{_y(0.5)}" text-anchor="middle">not defined</text>'
        return _frame(title, x_label, y_label, (0, 1), 1, message)
    lines = []
    for (x, y), colour in zip(curves.values(), COLOURS, strict=False):
        points = " ".join(f"{_x(a)},{_y(b)}" for a, b in zip(x, y, strict=True))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    legend = _legend(zip(curves, COLOURS, strict=False))
    return _frame(title, x_label, y_label, (0, 1), 1, "".join(lines) + legend)


def _legend(names: Iterable[tuple[str, str]]) -> str:
    """Names in their colours, right of the heading."""
    spans = "".join(f'<tspan dx="6" style="fill:{colour}">{html.escape(name)}</tspan>' for name, colour in names)
    return f'<text x="{_x(1)}" y="15" text-anchor="end">{spans}</text>'


def _histogram(result: ClassResult) -> str:
    """Image scores of good and defective pictures, with the threshold."""
    low, high = float(result.scores.min()), float(result.scores.max())
    high = max(high, low + 1e-6)
    groups = (
        ("good", result.scores[~result.labels], "#2563eb"),
        ("defective", result.scores[result.labels], "#dc2626"),
    )
    counts = [np.histogram(scores, BINS, (low, high))[0] for _, scores, _ in groups]
    top = max(1, *(int(count.max()) for count in counts))
    parts = []
    for (_, _, colour), count in zip(groups, counts, strict=True):
        for k, n in enumerate(count):
            if n:
                x, y = _x(k / BINS), _y(n / top)
                size = f'width="{_x(1 / BINS) - _x(0):.1f}" height="{_y(0) - y:.1f}"'
                parts.append(f'<rect x="{x}" y="{y}" {size} fill="{colour}" fill-opacity="0.55"/>')
    parts.append(_legend((name, colour) for name, _, colour in groups))
    threshold = result.thresholds.image
    if threshold is not None:
        x = _x(min(max((threshold - low) / (high - low), 0), 1))
        parts.append(f'<line x1="{x}" x2="{x}" y1="{_y(0)}" y2="{_y(1)}" stroke="#111" stroke-dasharray="4 3"/>')
    return _frame("Image scores", "image score", "pictures", (low, high), top, "".join(parts))


# ---- gallery ---------------------------------------------------------------------------------------------------------


def _card(class_name: str, shown: Shown) -> str:
    wrong = shown.error > 0
    verdict = ("missed" if shown.label else "false alarm") if wrong else "right"
    truth = '<div class="none">no mask</div>' if shown.truth is None else _picture(shown.truth, "ground truth")
    pictures = _picture(shown.image, "image") + truth + _picture(shown.heat, "heat map")
    name, kind = html.escape(class_name), html.escape(shown.kind)
    return (
        f'<figure data-class="{name}" data-kind="{kind}" data-wrong="{int(wrong)}"><div class="three">{pictures}</div>'
        f'<figcaption><b>{shown.score:.4f}</b> <span class="{"wrong" if wrong else "fine"}">{verdict}</span> '
        f"{name} / {kind}<br>{html.escape(shown.name)}</figcaption></figure>"
    )


def _picture(picture: np.ndarray, what: str) -> str:
    stored = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return f'<img alt="{what}" src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}">'
