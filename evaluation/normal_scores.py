"""What a detector gives on good images that it was not trained on, and the thresholds that follow from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.config import shortened
from utils.errors import UsageError

TARGET_FPR = 0.01
SHARES = np.logspace(-6, 0, 61)  # shares of the pixels, at which the map values that they exceed are kept
TAIL = 0.25  # share of the scores that the tail is fitted to
MOST_SCORES = 1_000_000


@dataclass(frozen=True)
class NormalScores:
    """Image scores and anomaly maps of held-out good images.

    Args:
        scores: (n,) float64 image scores in [0, 1], ascending.
        pixels: (61,) float64: the map value that the share SHARES[k] of all pixels exceeds.
        parts: (n,) int64, 0 .. k - 1: which of the k parts each image shows. Images of one part resemble each other, so
            only the parts are as new images of new parts.

    Example:
        >>> normal = NormalScores.of(np.linspace(0.1, 0.2, 199), np.full((2, 4, 4), 0.1, np.float32))
        >>> 0.198 < normal.image_threshold(0.01) < 0.2, normal.lowest_rate
        (True, 0.005)
    """

    scores: np.ndarray
    pixels: np.ndarray
    parts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, maps: np.ndarray, parts: Sequence[str] | None = None) -> "NormalScores":
        """Of image scores (n,) and anomaly maps (n,H,W), or maps of any sizes as one vector; n >= 1.

        Args:
            parts: names of the parts that the images show; None if each shows its own.
        """
        numbers = np.arange(len(scores)) if parts is None else np.unique(parts, return_inverse=True)[1]
        order = np.argsort(scores, kind="stable")
        values = np.sort(np.asarray(maps, np.float32).ravel())
        below = np.clip(np.ceil((1 - SHARES) * values.size).astype(int) - 1, 0, values.size - 1)
        return cls(np.asarray(scores, np.float64)[order], values[below].astype(np.float64), numbers[order])

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def count(self) -> int:
        """The number k of parts."""
        return int(self.parts.max()) + 1

    @property
    def weights(self) -> np.ndarray:
        """(n,) what each image counts: the parts count alike, and so do the images of a part. The sum is 1."""
        return 1 / (self.count * np.bincount(self.parts)[self.parts])

    @property
    def lowest_rate(self) -> float:
        """The lowest false alarm rate that k parts can promise, 1 / (k + 1)."""
        return 1 / (self.count + 1)

    def image_threshold(self, target_fpr: float = TARGET_FPR) -> float:
        """The image threshold that a new good image reaches with at most this probability.

        From 1 / (k + 1) on, it lies above the lowest score up to which the weights, times k / (k + 1), add up to
        1 - target. That holds for any distribution if new parts are like these ones (hierarchical conformal prediction;
        Lee, Barber & Willett, 2023, arXiv 2306.06342). If each image shows its own part, it is the
        ceil((1 - target)(n + 1))-th lowest score (split conformal prediction; Vovk et al., 2005). Below, the log-odds
        of the highest quarter of the scores are continued by an exponential distribution with their mean excess (peaks
        over threshold; Pickands, 1975): an estimate, and no promise.

        Args:
            target_fpr: in (0, 1).
        """
        reached = np.cumsum(self.weights) * self.count / (self.count + 1) >= 1 - target_fpr - 1e-9
        if reached.any():
            here = self.scores[int(np.argmax(reached))]
            higher = self.scores[self.scores > here]
            # Halfway to the next score, so that rounding elsewhere keeps the verdicts.
            return float((here + higher[0]) / 2) if higher.size else self._beyond(here, target_fpr)
        return self._beyond(self.scores[-1], target_fpr)

    def _beyond(self, score: float, target_fpr: float) -> float:
        """The threshold for this rate on the fitted tail, a little above `score` at least."""
        odds, weights = log_odds(self.scores), self.weights
        shares = np.cumsum(weights[::-1])  # of the highest 1, 2, ... scores
        count = min(1 + int(np.argmin(np.abs(shares - TAIL))), len(odds) - 1)
        start, share = odds[len(odds) - 1 - count], float(shares[max(count, 1) - 1])
        highest = slice(len(odds) - count, None)
        excess = float(np.average(odds[highest] - start, weights=weights[highest])) if count else 0.0
        tail = start + excess * max(0.0, math.log(share / target_fpr))
        margin = max(0.01 * self.scale, 1e-4)
        return float(_from_log_odds(max(tail, log_odds(np.float64(score)) + margin)))

    def pixel_threshold(self, target_fpr: float = TARGET_FPR) -> float:
        """The map value that this share of the pixels of good images exceeds; interpolated, log-linear in the share."""
        return float(np.interp(math.log(target_fpr), np.log(SHARES), self.pixels))

    @property
    def scale(self) -> float:
        """Standard deviation of the scores' log-odds, by which scores of several detectors compare."""
        return max(float(np.std(log_odds(self.scores))), 0.05)

    def as_content(self) -> dict[str, list[float]]:
        """Plain values for JSON and checkpoints."""
        content = {"scores": self.scores.tolist(), "pixels": self.pixels.tolist()}
        return content if self.count == len(self) else {**content, "parts": self.parts.tolist()}

    @classmethod
    def from_content(cls, content: Any, where: str) -> "NormalScores":
        """The opposite of as_content.

        Raises:
            UsageError: a value is missing, or is not a number in [0, 1].
        """
        if not isinstance(content, dict):
            raise UsageError(f"{where}: the good images' scores are {shortened(content)}, not a mapping; train again")
        arrays = {}
        for name, most in (("scores", MOST_SCORES), ("pixels", len(SHARES))):
            values = content.get(name)
            fits = isinstance(values, Sequence) and 1 <= len(values) <= most and all(map(_is_share, values))
            if not fits or (name == "pixels" and len(values) != most):
                raise UsageError(f"{where}: {name} of the good images are {shortened(values)}; train or evaluate again")
            arrays[name] = np.array(values, np.float64)
        scores, parts = arrays["scores"], content.get("parts", list(range(len(arrays["scores"]))))
        if not isinstance(parts, Sequence) or len(parts) != len(scores) or not all(type(k) is int for k in parts):
            raise UsageError(f"{where}: parts of the good images are {shortened(parts)}; train or evaluate again")
        order, numbers = np.argsort(scores, kind="stable"), np.unique(parts, return_inverse=True)[1]
        return cls(scores[order], arrays["pixels"], numbers[order])


def pooled(classes: Sequence[NormalScores]) -> NormalScores:
    """The scores of several classes as one; of the pixels' values, their means at equal shares."""
    scores = np.concatenate([normal.scores for normal in classes])
    before = np.cumsum([0, *(normal.count for normal in classes)])
    parts = np.concatenate([normal.parts + first for normal, first in zip(classes, before[:-1], strict=True)])
    order = np.argsort(scores, kind="stable")
    return NormalScores(scores[order], np.mean([normal.pixels for normal in classes], axis=0), parts[order])


def normalised(score: float, threshold: float, scale: float) -> float:
    """A score as its distance from the threshold, in [0, 1]: 0.5 at the threshold, and monotone.

    The log-odds less those of the threshold, in deviations of good images' log-odds (NormalScores.scale).

    Example:
        >>> normalised(0.2, 0.2, 1.0), normalised(0.3, 0.2, 1.0) > 0.6
        (0.5, True)
    """
    distance = (log_odds(np.float64(score)) - log_odds(np.float64(threshold))) / scale
    return float(_from_log_odds(distance))


def raw(score: float, threshold: float, scale: float) -> float:
    """The score that `normalised` turns into this one."""
    return float(_from_log_odds(log_odds(np.float64(score)) * scale + log_odds(np.float64(threshold))))


def log_odds(scores: np.ndarray) -> np.ndarray:
    """log(s / (1 - s)), finite also at 0 and 1."""
    inside = np.clip(np.asarray(scores, np.float64), 1e-12, 1 - 1e-12)
    return np.log(inside) - np.log1p(-inside)


def _from_log_odds(odds: float) -> float:
    return 1 / (1 + np.exp(-np.clip(odds, -700, 700)))


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
