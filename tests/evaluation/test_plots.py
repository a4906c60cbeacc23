"""Plots as SVG coordinates."""

import numpy as np
import pytest

from evaluation.html_report import page
from evaluation.plots import Plot, curve_plot, tick_label, x_at, y_at


def drawn(plot: Plot) -> str:
    """The plot as HTML, on a page that draws plots."""
    return page("quality.template.html", title="", note="", sections=[("", [[""]], [plot])])


def test_a_curve_of_one_point_is_a_dot():
    several, one = (np.array([0.0, 10.0]), np.array([0.5, 1.0])), (np.array([5.0]), np.array([0.25]))
    plot = curve_plot("t", {"several": several, "one": one}, "x", "y", (0, 10), (0, 1))
    assert [dot[:2] for dot in plot.dots] == [(x_at(0.5), y_at(0.25))]
    html = drawn(plot)
    assert html.count("<circle") == 1
    assert f'cx="{x_at(0.5)}" cy="{y_at(0.25)}"' in html
    assert html.count("<polyline") == 2


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((0, 1), ["0", "0.5", "1"]),
        ((0, 300), ["0", "150", "300"]),
        ((0, 2000), ["0", "1000", "2000"]),
        ((-0.00745, 118.2), ["0", "59.1", "118"]),
        ((-0.004, 0.003), ["-0.004", "-0.0005", "0.003"]),
        ((0, 67273.4), ["0", "33637", "67273"]),
        ((0, 3e7), ["0", "1.5e+07", "3e+07"]),
        ((0.5, 0.5), ["0.5", "0.5", "0.5"]),
    ],
)
def test_ticks_are_short(limits, labels):
    assert [tick_label(limits, fraction) for fraction in (0, 0.5, 1)] == labels
