"""The table of a benchmark: mean and standard deviation over seeds, for two ways to choose the checkpoint."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.html_report import page
from evaluation.plots import Plot, curve_plot
from evaluation.tables import COLUMNS, MEAN, PAPER, aligned, markdown
from utils.files import write_text
from utils.names import csv_cell

# How a checkpoint was chosen, and the difference; "test" and "no_test" are the keys of a result's metrics.
CHOICES = {"test": "on test", "no_test": "without test", "gap": "gap"}
MAIN = ("image_auroc", "pixel_auroc", "pro")  # metrics of the table in the terminal
# Heading, factor and decimals of what is measured beside the metrics.
COSTS = {
    "training_seconds": ("training, s", 1, 1),
    "ms_per_image_1": ("ms/image, batch 1", 1, 2),
    "ms_per_image_16": ("ms/image, batch 16", 1, 2),
    "parameters": ("parameters, M", 1e-6, 2),
    "peak_memory_GiB": ("peak memory, GiB", 1, 2),
}
FACTS = {
    "backbone": "backbone",
    "weights_sha256": "weights (SHA-256)",
    "input_size": "input size",
    "device": "device",
    "commit": "commit",
}
HASH_DIGITS = 12
Cell = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation of a figure over `count` seeds; no deviation with one seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, factor: float = 1, decimals: int = 2, sign: str = "") -> str:
        """E.g. "98.92 ± 0.31"."""
        mean = f"{factor * self.mean:{sign}.{decimals}f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        variant: name of the variant.
        name: of the class, or MEAN for the mean over classes.
        seeds: that the line is made of.
        figures: by "<metric>_<choice>" (fractions) or name of a cost; None if undefined.
        facts: of FACTS, in words.
    """

    variant: str
    name: str
    seeds: tuple[int, ...]
    figures: dict[str, Figure | None]
    facts: dict[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's cells and what is to be said about them.

    Args:
        title: heading.
        cells: results of the finished cells, as benchmark.py writes them into result.json.
        missing: (variant, class, seed, reason) of the others.
        paper: the paper's means, by metric.
    """

    title: str
    cells: list[Cell]
    missing: list[tuple[str, str, int, str]]
    paper: dict[str, float]

    @property
    def metrics(self) -> list[str]:
        """All metrics of the cells, in the order of the evaluation's tables."""
        rows = [row for cell in self.cells for rows in cell["metrics"].values() for row in rows.values()]
        return [metric for metric in COLUMNS if any(metric in row for row in rows)]

    def lines(self) -> list[Line]:
        """A line per variant and class, and after those of a variant their mean."""
        lines = []
        for variant in dict.fromkeys(cell["variant"] for cell in self.cells):
            lines += self._lines_of(variant, [cell for cell in self.cells if cell["variant"] == variant])
        return lines

    def _lines_of(self, variant: str, cells: list[Cell]) -> list[Line]:
        # A cell of one model for all classes has a row for each of them.
        values: dict[str, dict[int, dict[str, float | None]]] = {}
        for cell in cells:
            for name in cell["metrics"]["test"]:
                values.setdefault(name, {})[cell["seed"]] = _values(cell, name)
        lines = [
            _line(variant, name, by_seed, [cell for cell in cells if name in cell["metrics"]["test"]])
            for name, by_seed in values.items()
        ]
        # The mean of a seed that lacks a class would be one of other classes.
        lacking = {seed for other, _, seed, _ in self.missing if other == variant}
        seeds = [seed for seed in dict.fromkeys(cell["seed"] for cell in cells) if seed not in lacking]
        means = {seed: _mean([by_seed[seed] for by_seed in values.values()]) for seed in seeds}
        return [*lines, _line(variant, MEAN, means, cells)]

    def notes(self) -> list[str]:
        """What the figures are, one sentence or two per line."""
        seeds = sorted({cell["seed"] for cell in self.cells})
        notes = [
            f"Metrics in percent: mean ± standard deviation (n - 1) over the seeds {', '.join(map(str, seeds))}. The "
            "line mean is that of each seed's mean over the classes.",
        ]
        for choice, words in (("test", "On test (the paper's protocol)"), ("no_test", "Without test")):
            files = sorted({cell["checkpoints"][choice] for cell in self.cells})
            notes.append(f"{words}: {', '.join(f'{file} ({CHECKPOINTS.get(file, file)})' for file in files)}.")
        notes += [
            "Gap: on test - without test, per seed; what choosing on the test images makes the figures look better.",
            "Training: seconds of train_realnet.py with its validations. ms/image: median of warm forward passes in "
            f"float32 on the device ({_distinct(_device(cell) for cell in self.cells)}). Peak memory: of tensors on a "
            "GPU, of the process on a CPU.",
        ]
        if len({cell["commit"] for cell in self.cells}) > 1:
            notes.append("The cells are of several commits: their figures may differ for that reason.")
        return notes + [f"missing: {cell_name(v, c)}, seed {seed}: {reason}" for v, c, seed, reason in self.missing]


CHECKPOINTS = {
    "ckpt_best.pth.tar": "the best validation on the test list",
    "ckpt_best_test.pth.tar": "the best validation on the test list",
    "ckpt_best_synthetic.pth.tar": "the best validation on held-out good images with synthetic anomalies",
    "ckpt_last.pth.tar": "the last of the training",
}


def cell_name(variant: str, class_name: str) -> str:
    """What a variant's class is called in tables."""
    return f"{variant}/{class_name}"


def _device(cell: Cell) -> str:
    cost = cell["cost"]
    return f"{cost['device']}, threads: {cost['threads']}" if cost["device"] == "cpu" else cost["device"]


def _distinct(texts: Any) -> str:
    return ", ".join(dict.fromkeys(texts))


def _values(cell: Cell, class_name: str) -> dict[str, float | None]:
    """One cell's figures for one class."""
    values: dict[str, float | None] = {}
    test, other = (cell["metrics"][choice][class_name] for choice in ("test", "no_test"))
    for metric in COLUMNS:
        pair = test.get(metric), other.get(metric)
        values[f"{metric}_test"], values[f"{metric}_no_test"] = pair
        values[f"{metric}_gap"] = None if None in pair else pair[0] - pair[1]
    return {**values, **{key: cell["cost"].get(key) for key in COSTS}}


def _mean(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over the classes in which it is defined."""
    keys = dict.fromkeys(key for row in rows for key in row)
    defined = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: statistics.fmean(values) if values else None for key, values in defined.items()}


def _line(variant: str, name: str, by_seed: dict[int, dict[str, float | None]], cells: list[Cell]) -> Line:
    keys = dict.fromkeys(key for row in by_seed.values() for key in row)
    figures = {key: Figure.of([row[key] for row in by_seed.values() if row.get(key) is not None]) for key in keys}
    facts = {fact: _distinct(_fact(cell, fact) for cell in cells) for fact in FACTS}
    return Line(variant, name, tuple(by_seed), figures, facts)


def _fact(cell: Cell, fact: str) -> str:
    value = cell["commit"] if fact == "commit" else cell["cost"][fact]
    if fact == "weights_sha256":
        return value[:HASH_DIGITS] if value else "random"
    return "x".join(map(str, value)) if fact == "input_size" else str(value or "unknown")


# ---- as text ---------------------------------------------------------------------------------------------------------


def metric_cells(benchmark: Benchmark, metrics: Sequence[str]) -> list[list[str]]:
    """Lines of cells for some metrics: names, and three columns per metric; the first one is the header."""
    columns = [(metric, choice) for metric in metrics for choice in CHOICES]
    labels = [
        words if choice == "gap" else f"{COLUMNS.get(m, m)} {words}"
        for m, choice in columns
        for words in [CHOICES[choice]]
    ]
    rows = [["class", "seeds", *labels]]
    for line in benchmark.lines():
        rows.append(
            [_called(benchmark, line), str(len(line.seeds)), *(_metric_text(line, *column) for column in columns)]
        )
    if benchmark.paper:
        figures = {metric: f"{100 * value:.2f}" for metric, value in benchmark.paper.items()}
        rows.append([PAPER, "", *(figures.get(m, "") if choice == "test" else "" for m, choice in columns)])
    return rows


def _called(benchmark: Benchmark, line: Line) -> str:
    several = len({cell["variant"] for cell in benchmark.cells}) > 1
    return cell_name(line.variant, line.name) if several else line.name


def _metric_text(line: Line, metric: str, choice: str) -> str:
    figure = line.figures.get(f"{metric}_{choice}")
    return "n/a" if figure is None else figure.text(100, 2, "+" if choice == "gap" else "")


def cost_cells(benchmark: Benchmark) -> list[list[str]]:
    """Lines of cells for what a detector costs and what it is made of; the first one is the header."""
    rows = [["class", *(label for label, _, _ in COSTS.values()), *FACTS.values()]]
    for line in benchmark.lines():
        figures = {key: line.figures.get(key) for key in COSTS}
        costs = ["n/a" if figure is None else figure.text(*COSTS[key][1:]) for key, figure in figures.items()]
        rows.append([_called(benchmark, line), *costs, *line.facts.values()])
    return rows


def text_tables(benchmark: Benchmark) -> str:
    """The main metrics and the costs, for the terminal."""
    main = [metric for metric in benchmark.metrics if metric in MAIN]
    costs = [row[: 1 + len(COSTS)] for row in cost_cells(benchmark)]
    return f"{aligned(metric_cells(benchmark, main))}\n\n{aligned(costs)}"


def _markdown(benchmark: Benchmark) -> str:
    main = [metric for metric in benchmark.metrics if metric in MAIN]
    tables = [metric_cells(benchmark, main), cost_cells(benchmark)]
    if len(main) < len(benchmark.metrics):
        tables.insert(1, metric_cells(benchmark, [metric for metric in benchmark.metrics if metric not in MAIN]))
    notes = "".join(f" - {note}\n" for note in benchmark.notes())
    return "\n".join([f"# {benchmark.title}\n", notes, *map(markdown, tables)])


def _csv(benchmark: Benchmark) -> str:
    """Fractions, seconds, milliseconds, numbers and GiB: a column for the mean and one for the deviation of each."""
    keys = [*(f"{metric}_{choice}" for metric in benchmark.metrics for choice in CHOICES), *COSTS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = [f"{key}_{what}" for key in keys for what in ("mean", "sd")]
    writer.writerow(["variant", "class", "seeds", *header, *FACTS])
    for line in benchmark.lines():
        row = []
        for key in keys:
            figure = line.figures.get(key)
            row += (
                ["", ""]
                if figure is None
                else [repr(figure.mean), "" if figure.deviation is None else repr(figure.deviation)]
            )
        names = [csv_cell(line.variant), csv_cell(line.name), " ".join(map(str, line.seeds))]
        writer.writerow([*names, *row, *map(csv_cell, line.facts.values())])
    return buffer.getvalue()


def _json(benchmark: Benchmark) -> str:
    lines = [
        {**vars(line), "figures": {key: figure and vars(figure) for key, figure in line.figures.items()}}
        for line in benchmark.lines()
    ]
    missing = [dict(zip(("variant", "class", "seed", "reason"), entry, strict=True)) for entry in benchmark.missing]
    content = {"title": benchmark.title, "notes": benchmark.notes(), "lines": lines, "missing": missing}
    content |= {"paper": benchmark.paper, "cells": benchmark.cells}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# ---- files -----------------------------------------------------------------------------------------------------------


def validation_plots(benchmark: Benchmark) -> list[Plot]:
    """For each variant and class, and each metric of the validations, a curve per seed over the training steps."""
    plots = []
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in benchmark.cells:
        groups.setdefault((cell["variant"], cell["class"]), []).append(cell)
    several = len({variant for variant, _ in groups}) > 1
    for (variant, class_name), cells in groups.items():
        title = cell_name(variant, class_name) if several else class_name
        for metric in dict.fromkeys(metric for cell in cells for metric in cell["validation"]):
            points = {str(cell["seed"]): cell["validation"].get(metric) for cell in cells}
            curves = {seed: tuple(np.array(pairs, float).T) for seed, pairs in points.items() if pairs}
            last = max(xs[-1] for xs, _ in curves.values())
            # Down to the next tenth below the lowest value.
            low = max(0.0, math.ceil(10 * min(ys.min() for _, ys in curves.values())) / 10 - 0.1)
            shown = metric.removeprefix("synthetic_")
            heading = f"{title}: {'' if shown == metric else 'synthetic '}{COLUMNS.get(shown, shown)}"
            plots.append(curve_plot(heading, curves, "training step", "validation", (0, last), (low, 1)))
    return plots


def write_benchmark(folder: Path, benchmark: Benchmark) -> list[Path]:
    """Write benchmark.csv, .json, .md and .html; returns their paths."""
    metrics = benchmark.metrics
    html = page(
        "benchmark.template.html",
        title=benchmark.title,
        notes=benchmark.notes(),
        metrics=[COLUMNS.get(metric, metric) for metric in metrics],
        choices=list(CHOICES.values()),
        rows=metric_cells(benchmark, metrics)[1:],
        costs=cost_cells(benchmark),
        means=[line.name == MEAN for line in benchmark.lines()],
        plots=validation_plots(benchmark),
    )
    contents = {"csv": _csv(benchmark), "json": _json(benchmark), "md": _markdown(benchmark), "html": html}
    for ending, content in contents.items():
        write_text(folder / f"benchmark.{ending}", content)
    return [folder / f"benchmark.{ending}" for ending in contents]
