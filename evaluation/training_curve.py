"""The validations of a training, from the JSON lines of its log."""

import json
import math
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]


def read_validations(path: str | Path) -> dict[str, Curve]:
    """(step, value) of each metric of the validations, in the order of the steps; nothing if there is no log.

    A run that was resumed has written some steps twice, of which the later ones count. Lines that a crash has cut are
    left out.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        step, metrics = _validation_in(line)
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(str(name), {})[step] = float(value)
    return {name: sorted(values.items()) for name, values in curves.items()}


def _validation_in(line: str) -> tuple[int, dict[str, Any]]:
    """The step and the metrics in a line, which may have none."""
    try:
        content = json.loads(line)
        return int(content["step"]), dict(content["validation"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, {}
