"""Plots as SVG coordinates, which the macro in plot.template.html draws."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 230, 42, 34, 26, 12
Points = tuple[np.ndarray, np.ndarray]


@dataclass
class Plot:
    """A drawing in SVG coordinates.

    Args:
        legend: (name, colour), right of the title.
        x_ticks: (x, anchor, label), below the plot.
        y_ticks: (y, label), on the left, each with a grid line.
        lines: (points, colour).
        dots: (x, y, colour), of lines with one point, which would not show.
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
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    bars: list[tuple[float, float, str, str, str]] = field(default_factory=list)
    marker: float | None = None

    # Size, and edges and middle of the axes.
    width, height = WIDTH, HEIGHT
    left, right, middle = LEFT, WIDTH - RIGHT, (LEFT + WIDTH - RIGHT) / 2
    top, bottom, centre = TOP, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2


def x_at(fraction: float) -> float:
    """The coordinate of a fraction 0 .. 1 of the horizontal axis."""
    return round(LEFT + fraction * (WIDTH - LEFT - RIGHT), 1)


def y_at(fraction: float) -> float:
    """The coordinate of a fraction 0 .. 1 of the vertical axis, which grows upwards."""
    return round(HEIGHT - BOTTOM - fraction * (HEIGHT - BOTTOM - TOP), 1)


def ticks(
    x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[list[tuple[float, str, str]], list[tuple[float, str]]]:
    """Ticks at both ends and in the middle of each axis."""
    anchors = ((0, "start"), (0.5, "middle"), (1, "end"))
    x_ticks = [(x_at(f), anchor, tick_label(x_range, f)) for f, anchor in anchors]
    return x_ticks, [(y_at(f), tick_label(y_range, f)) for f, _ in anchors]


def tick_label(limits: tuple[float, float], fraction: float) -> str:
    """The value at a fraction of an axis, to three digits, and to no more than the axis shows.

    Example:
        >>> tick_label((-0.00745, 118), 0), tick_label((0.0418, 0.402), 0), tick_label((0, 2000), 1)
        ('0', '0.0418', '2000')
    """
    low, high = limits
    decimals = max(0, 3 - math.floor(math.log10(high - low))) if high > low else 9
    # + 0: not -0.
    value = round(low + fraction * (high - low), decimals) + 0
    # Not 2e+03 steps.
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def curve_plot(
    title: str,
    curves: Mapping[str, Points | None],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] = (0, 1),
    y_range: tuple[float, float] = (0, 1),
) -> Plot:
    """A plot of curves by name, each an array of x and one of y inside the ranges; undefined ones (None) are left out.

    Colours repeat after len(COLOURS) curves.
    """
    defined = {name: points for name, points in curves.items() if points is not None}
    legend = [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(defined)]
    lines, dots = [], []
    for (xs, ys), (_, colour) in zip(defined.values(), legend, strict=True):
        across, up = _fractions(xs, x_range), _fractions(ys, y_range)
        points = [(x_at(a), y_at(b)) for a, b in zip(across, up, strict=True)]
        lines.append((" ".join(f"{x},{y}" for x, y in points), colour))
        if len(points) == 1:
            dots.append((*points[0], colour))
    return Plot(title, x_label, y_label, legend, *ticks(x_range, y_range), lines, dots)


def _fractions(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (np.asarray(values) - limits[0]) / (limits[1] - limits[0])
