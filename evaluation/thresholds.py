"""Thresholds for image scores and anomaly maps: choosing them, and the JSON file (sidecar) beside the checkpoint."""

import json
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import Ranking, flat_pixels
from evaluation.normal_scores import NormalScores, normalised, pooled, raw
from utils.config import shortened
from utils.counts import counted
from utils.errors import UsageError
from utils.files import write_text
from utils.precision import FP32, precision_in

log = logging.getLogger("realnet")

BEST_F1 = "best F1 on the evaluation set"
HELD_OUT = "held-out good images"
PIXEL_SHARE = 0.1  # of the rate of false alarms: the share of good images' pixels that may be flagged
_ORIGIN = ("fingerprint", "chosen_on", "class_name")  # of a whole model's thresholds, so not repeated in their parts


@dataclass(frozen=True)
class Thresholds:
    """A score at or above its threshold is anomalous.

    Args:
        image, pixel: thresholds for image scores and for anomaly maps; None if undefined.
        rule: how they were chosen.
        low, high: values of the first and the last colour of heat maps.
        classes: thresholds of each class, if one model serves several classes.
        fingerprint: of the model whose scores they were chosen on (trained_model.fingerprint_of).
        chosen_on: the list of the images that they were chosen on.
        class_name: of the model's class, if it serves one.
        normal: scores of held-out good images, for other false alarm rates; None if no images were held out.
        scale: deviation of these scores' log-odds, by which scores are normalised; None leaves scores as they are.
        tiled: thresholds for scoring in tiles, by "<size>/<overlap>".
        precision: of the forward passes that gave the scores (utils.precision.FORWARD_PRECISIONS).

    Example:
        >>> thresholds = Thresholds(0.5, 0.4, "by hand", classes={"bolts": Thresholds(0.6, 0.5, "by hand")})
        >>> thresholds.of_class("bolts").image
        0.6
    """

    image: float | None
    pixel: float | None
    rule: str
    low: float = 0.0
    high: float = 1.0
    classes: dict[str, "Thresholds"] = field(default_factory=dict)
    fingerprint: str = ""
    chosen_on: str = ""
    class_name: str = ""
    normal: NormalScores | None = None
    scale: float | None = None
    tiled: dict[str, "Thresholds"] = field(default_factory=dict)
    precision: str = FP32

    def measured_in(self, precision: str) -> "Thresholds":
        """The same, also of each class, as chosen on scores in a precision."""
        classes = {name: own.measured_in(precision) for name, own in self.classes.items()}
        return replace(self, precision=precision, classes=classes)

    def check_precision(self, precision: str, model: str = "the model") -> None:
        """Refuse another precision than that of the scores that the thresholds were chosen on.

        Args:
            model: its name, for the message.

        Raises:
            UsageError: it is another one.
        """
        if precision != self.precision and (self.image, self.pixel) != (None, None):
            raise UsageError(
                f"{model}: its thresholds were chosen on scores in {self.precision}, and those in {precision} differ; "
                f"evaluate again with --precision {precision}, predict with {self.precision}, or pass --threshold"
            )

    def normalised(self, score: float) -> float:
        """The score as its distance from the threshold, 0.5 at the threshold; as it is without a scale."""
        if self.image is None or self.scale is None:
            return score
        return normalised(score, self.image, self.scale)

    def raw(self, score: float) -> float:
        """The opposite of normalised()."""
        return score if self.image is None or self.scale is None else raw(score, self.image, self.scale)

    def at(self, target_fpr: float) -> "Thresholds":
        """The thresholds for another false alarm rate on good images, of all classes.

        Raises:
            UsageError: no good images were held out.
        """
        if self.normal is None:
            raise UsageError(
                "--target-fpr: this model knows no scores of held-out good images; train it with "
                "dataset.train.validation_fraction and more than one good image, or choose thresholds on a list: "
                "evaluation_realnet.py --target-fpr"
            )
        classes = {name: thresholds.at(target_fpr) for name, thresholds in self.classes.items()}
        tiled = {name: tiles.at(target_fpr) for name, tiles in self.tiled.items() if tiles.normal is not None}
        chosen = from_normal(self.normal, target_fpr, self.low, self.high)
        return replace(self, image=chosen.image, pixel=chosen.pixel, rule=chosen.rule, classes=classes, tiled=tiled)

    def knowing(self, own: "Thresholds") -> "Thresholds":
        """The same with the scores of held-out images that other thresholds of the model have, for other rates.

        Scores in another precision are left out.
        """
        if own.precision != self.precision:
            return self
        classes = {
            name: part.knowing(own.classes[name]) if name in own.classes else part
            for name, part in self.classes.items()
        }
        return replace(self, normal=self.normal or own.normal, classes=classes)

    def with_tiled(self, name: str, tiled: "Thresholds") -> "Thresholds":
        """The same with thresholds for tiles, also for each class; `name` is that of the tiles."""
        classes = {
            key: replace(own, tiled={**own.tiled, name: tiled.classes[key]}) if key in tiled.classes else own
            for key, own in self.classes.items()
        }
        return replace(self, classes=classes, tiled={**self.tiled, name: replace(tiled, classes={})})

    def keeping_tiles(self, before: "Thresholds") -> "Thresholds":
        """The same with the thresholds for tiles that earlier ones of the same model have, where it has none."""
        classes = {
            name: own.keeping_tiles(before.classes[name]) if name in before.classes else own
            for name, own in self.classes.items()
        }
        return replace(self, classes=classes, tiled={**before.tiled, **self.tiled})

    def of_class(self, name: str) -> "Thresholds":
        """The thresholds of one class.

        Raises:
            UsageError: there are no thresholds for this class.
        """
        if not self.classes:
            if name == self.class_name:
                return self
            raise UsageError(
                f"no thresholds for the class {name!r}; this model serves one class, so leave the name out"
            )
        if name not in self.classes:
            known = ", ".join(self.classes)
            raise UsageError(f"no thresholds for the class {name!r}; known are {known}")
        return self.classes[name]


def thresholds_of(
    scores: np.ndarray,
    maps: np.ndarray,
    labels: np.ndarray,
    image: Ranking,
    pixel: Ranking | None,
    target_fpr: float | None = None,
) -> Thresholds:
    """Choose thresholds on labelled images.

    Args:
        scores, labels: (N,) image scores, and whether the images are defective.
        maps: (N,H,W) anomaly maps, or (N,) maps (H,W) of any sizes.
        image, pixel: their rankings (see score.ScoredImages.rankings).
        target_fpr: share of normal images, and of their pixels, that may be flagged; None maximises F1.
    """
    low, high = heat_range(maps)
    if target_fpr is None:
        chosen = Thresholds(best_f1(image, scores), pixel.best_f1()[1] if pixel else None, BEST_F1, low, high)
        return _consistent(chosen)
    rule = f"at most {100 * target_fpr:g}% of the normal images, and of their pixels, flagged on the evaluation set"
    image_threshold = for_target_fpr(scores[~labels], target_fpr)
    pixel_threshold = for_target_fpr(flat_pixels(maps[~labels]), target_fpr)
    return _consistent(Thresholds(image_threshold, pixel_threshold, rule, low, high))


def from_normal(normal: NormalScores, target_fpr: float, low: float, high: float) -> Thresholds:
    """Thresholds that new good images reach with at most this probability, and their pixels with a tenth of it.

    A tenth, because defects cover little: with 1% of the pixels of good images flagged, most of a mask would be wrong.
    At the default of 1%, it is about what the mean and three deviations of a normal distribution give (0.13%).

    Args:
        normal: scores of good images that the model was not trained on.
        low, high: range of heat maps.
    """
    parts, lowest = normal.count, normal.lowest_rate
    rule = f"at most {100 * target_fpr:g}% of good images flagged, by {len(normal)} {HELD_OUT}"
    rule += "" if parts == len(normal) else f" of {counted(parts, 'part')}"
    if target_fpr < lowest:
        seen = counted(parts, "image" if parts == len(normal) else "part")
        rule += f" (an estimate: {seen} can promise {100 * lowest:.2g}% at best)"
    image, pixel = normal.image_threshold(target_fpr), normal.pixel_threshold(PIXEL_SHARE * target_fpr)
    return _consistent(Thresholds(image, pixel, rule, low, high, normal=normal, scale=normal.scale))


def of_normals(
    normals: dict[str, NormalScores], target_fpr: float, low: float, high: float, fingerprint: str
) -> Thresholds:
    """The thresholds of a model: for all its images and, if it serves several classes, for each class.

    Args:
        normals: by class.
    """
    of_classes = {name: from_normal(normal, target_fpr, low, high) for name, normal in normals.items()}
    if len(of_classes) == 1:
        ((name, thresholds),) = of_classes.items()
        chosen_on = f"{HELD_OUT} of train_{name}.json"
        return replace(thresholds, fingerprint=fingerprint, chosen_on=chosen_on, class_name=name)
    thresholds = from_normal(pooled(list(normals.values())), target_fpr, low, high)
    return replace(thresholds, classes=of_classes, fingerprint=fingerprint, chosen_on=HELD_OUT)


def _consistent(thresholds: Thresholds) -> Thresholds:
    """The pixel threshold at most the image threshold: a mean that reaches the latter has a pixel that does."""
    image, pixel = thresholds.image, thresholds.pixel
    return thresholds if image is None or pixel is None else replace(thresholds, pixel=min(image, pixel))


def heat_range(maps: np.ndarray) -> tuple[float, float]:
    """The colour range of heat maps: the median of all maps is blue, their maximum red."""
    values = flat_pixels(maps)
    low, high = float(np.median(values)), float(values.max())
    return low, max(high, low + 1e-6)


def midway_below(scores: np.ndarray, threshold: float | None) -> float | None:
    """The threshold moved halfway to the next lower score: same verdicts, and rounding elsewhere keeps them."""
    if threshold is None:
        return None
    lower = scores[scores < threshold]
    if lower.size:
        return (float(threshold) + float(lower.max())) / 2
    return float(threshold) - _margin(float(scores.max()) - float(threshold), float(threshold))


def _margin(spread: float, score: float) -> float:
    """A distance from a score: small compared with the spread of scores, large compared with rounding."""
    return max(1e-3 * spread, 1e-5 * abs(score), 1e-7)


def best_f1(ranking: Ranking, scores: np.ndarray) -> float | None:
    """The threshold of the best F1; None if F1 is undefined."""
    return midway_below(scores, ranking.best_f1()[1])


def for_target_fpr(normal: np.ndarray, target: float) -> float | None:
    """The lowest threshold that flags at most the share `target` of normal scores; None without normal scores.

    Args:
        normal: scores, float, any shape.
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
    # No score is above it: add a small margin, so that rounding on another device does not flag it.
    return highest_below + _margin(highest_below - float(np.median(normal)), highest_below)


def sidecar(checkpoint: str | Path) -> Path:
    """The path of the JSON file beside a checkpoint or an exported model."""
    path = Path(checkpoint)
    stem = path.name.removesuffix(".pth.tar") if path.name.endswith(".pth.tar") else path.stem
    return path.with_name(f"{stem}.thresholds.json")


def write_thresholds(checkpoint: str | Path, thresholds: Thresholds) -> Path:
    """Write the sidecar of a checkpoint."""
    path = sidecar(checkpoint)
    write_text(path, json.dumps(as_content(thresholds), indent=2, ensure_ascii=False) + "\n")
    return path


def as_content(thresholds: Thresholds) -> dict[str, Any]:
    """Thresholds as plain values for JSON; without what they have not."""
    content = {name: getattr(thresholds, name) for name in ("image", "pixel", "rule", "low", "high")}
    content |= {name: getattr(thresholds, name) for name in _ORIGIN}
    if thresholds.scale is not None:
        content["scale"] = thresholds.scale
    if thresholds.precision != FP32:
        content["precision"] = thresholds.precision
    if thresholds.normal is not None:
        content["normal"] = thresholds.normal.as_content()
    for name, parts in (("tiled", thresholds.tiled), ("classes", thresholds.classes)):
        if parts:
            content[name] = {key: _without_origin(as_content(part)) for key, part in parts.items()}
    return content


def _without_origin(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in _ORIGIN}


def thresholds_from(content: Any, where: str) -> Thresholds:
    """Thresholds from parsed JSON.

    Raises:
        UsageError: a value is missing or not a number.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: has to hold a JSON object; evaluate the model again")
    values = {}
    for name in ("image", "pixel", "low", "high", "scale"):
        value = content.get(name)
        # A threshold beyond these bounds is none; and Python cannot compare all of its numbers with infinity.
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9
        if name == "scale":
            number = number and value > 0
        if not number and not (value is None and name in ("image", "pixel", "scale")):
            raise UsageError(f"{where}: {name} is {shortened(value)}, not a number; evaluate the model again")
        values[name] = value
    if values["low"] > values["high"]:
        raise UsageError(f"{where}: low {values['low']} is above high {values['high']}; evaluate the model again")
    parts = {}
    for name, what in (("classes", "class"), ("tiled", "tiles")):
        found = content.get(name) or {}
        if not isinstance(found, dict):
            raise UsageError(f"{where}: {name} is not a JSON object; evaluate the model again")
        parts[name] = {str(key): thresholds_from(value, f"{where}, {what} {key}") for key, value in found.items()}
    # Files of earlier versions lack the class and the precision.
    texts = {name: str(content.get(name, "")) for name in ("rule", *_ORIGIN)}
    texts["precision"] = precision_in(content, where)
    normal = content.get("normal")
    scores = None if normal is None else NormalScores.from_content(normal, where)
    return Thresholds(**values, **texts, normal=scores, **parts)


def read_thresholds(checkpoint: str | Path) -> Thresholds | None:
    """The thresholds in a checkpoint's sidecar, or None if it has no sidecar.

    Raises:
        UsageError: the sidecar is not readable.
    """
    path = sidecar(checkpoint)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not readable as JSON; evaluate the model again") from None
    return thresholds_from(content, str(path))


def matching_thresholds(checkpoint: str | Path, fingerprint: str) -> Thresholds | None:
    """The thresholds beside a checkpoint, if they were chosen on scores of this very model; others are not used."""
    thresholds = read_thresholds(checkpoint)
    if thresholds is not None and thresholds.fingerprint != fingerprint:
        unknown = "does not say for which model it was written"
        reason = "was written for other weights or another preprocessing" if thresholds.fingerprint else unknown
        log.warning("%s %s and is not used; evaluate the model again", sidecar(checkpoint), reason)
        return None
    return thresholds
