"""Where a verdict turns: thresholds of image and pixel scores, kept in a JSON file beside the checkpoint."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evaluation.metrics import Ranking
from utils.checkpoint import write_text
from utils.errors import UsageError

BEST_F1 = "best F1 on the evaluation set"


@dataclass(frozen=True)
class Thresholds:
    """A score at or above its threshold is anomalous.

    Args:
        image, pixel: of image scores and of the anomaly map; None where undefined.
        rule: how they were chosen.
        low, high: scores between which heat maps are coloured.
    """

    image: float | None
    pixel: float | None
    rule: str
    low: float = 0.0
    high: float = 1.0


def midway_below(scores: np.ndarray, threshold: float | None) -> float | None:
    """A threshold with the same verdicts, halfway to the next lower score: rounding elsewhere does not change them."""
    if threshold is None:
        return None
    lower = scores[scores < threshold]
    if lower.size:
        return (float(threshold) + float(lower.max())) / 2
    return float(threshold) - _margin(float(scores.max()) - float(threshold), float(threshold))


def _margin(spread: float, score: float) -> float:
    """A distance from a score that is small against the spread of scores, and large against rounding."""
    return max(1e-3 * spread, 1e-5 * abs(score), 1e-7)


def best_f1(ranking: Ranking, scores: np.ndarray) -> float | None:
    """The threshold of the best F1; None where it is undefined."""
    return midway_below(scores, ranking.best_f1()[1])


def for_target_fpr(normal: np.ndarray, target: float) -> float | None:
    """The lowest threshold at which at most the share `target` of normal scores is flagged; None without any.

    Args:
        normal: float, any shape.
        target: in [0, 1).
    """
    normal = normal.ravel()
    if not normal.size:
        return None
    allowed = min(math.floor(target * normal.size + 1e-9), normal.size - 1)
    k = normal.size - 1 - allowed
    highest_below = float(np.partition(normal, k)[k])
    flagged = normal[normal > highest_below]
    if flagged.size:
        return (highest_below + float(flagged.min())) / 2
    # Nothing above it: a little distance, so that rounding elsewhere does not flag it.
    return highest_below + _margin(highest_below - float(np.median(normal)), highest_below)


def sidecar(checkpoint: str | Path) -> Path:
    """The JSON file beside a checkpoint or an exported model."""
    path = Path(checkpoint)
    stem = path.name.removesuffix(".pth.tar") if path.name.endswith(".pth.tar") else path.stem
    return path.with_name(f"{stem}.thresholds.json")


def write_thresholds(checkpoint: str | Path, thresholds: Thresholds, classes: dict[str, Thresholds]) -> Path:
    """Write the sidecar: thresholds for all pictures, and for each class of a model for several."""
    content = asdict(thresholds)
    if len(classes) > 1:
        content["classes"] = {name: asdict(own) for name, own in classes.items()}
    path = sidecar(checkpoint)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def thresholds_from(content: dict, where: str) -> Thresholds:
    """Thresholds from parsed JSON.

    Raises:
        UsageError: a value is missing or no number.
    """
    values = {}
    for name in ("image", "pixel", "low", "high"):
        value = content.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not (value is None and name in ("image", "pixel")):
            raise UsageError(f"{where}: {name} is {value!r}, not a number; evaluate the model to write it anew")
        values[name] = value
    return Thresholds(**values, rule=str(content.get("rule", "")))


def read_thresholds(checkpoint: str | Path) -> Thresholds | None:
    """The sidecar's thresholds, or None where there is none.

    Raises:
        UsageError: it is no readable sidecar.
    """
    path = sidecar(checkpoint)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not readable as JSON; evaluate the model to write it anew") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: has to hold a JSON object; evaluate the model to write it anew")
    return thresholds_from(content, str(path))
