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

    Example:
        >>> normal = NormalScores.of(np.linspace(0.1, 0.2, 199), np.full((2, 4, 4), 0.1, np.float32))
        >>> 0.198 < normal.image_threshold(0.01) < 0.2, normal.lowest_rate
        (True, 0.005)
    """

    scores: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, maps: np.ndarray) -> "NormalScores":
        """Of image scores (n,) and anomaly maps (n,H,W), or maps of any sizes as one vector; n >= 1."""
        values = np.sort(np.asarray(maps, np.float32).ravel())
        below = np.clip(np.ceil((1 - SHARES) * values.size).astype(int) - 1, 0, values.size - 1)
        return cls(np.sort(np.asarray(scores, np.float64)), values[below].astype(np.float64))

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def lowest_rate(self) -> float:
        """The lowest false alarm rate that n images can promise, 1 / (n + 1)."""
        return 1 / (len(self) + 1)

    def image_threshold(self, target_fpr: float = TARGET_FPR) -> float:
        """The image threshold that a new good image reaches with at most this probability.

        From 1 / (n + 1) on, it lies above the ceil((1 - target)(n + 1))-th lowest score, which holds for any
        distribution if new images are like these ones (split conformal prediction; Vovk et al., 2005). Below, the
        log-odds of the highest quarter of the scores are continued by an exponential distribution with their mean
        excess (peaks over threshold; Pickands, 1975): an estimate, and no promise.

        Args:
            target_fpr: in (0, 1).
        """
        count = len(self)
        rank = math.ceil((1 - target_fpr) * (count + 1) - 1e-9)
        if rank <= count:
            here = self.scores[rank - 1]
            higher = self.scores[self.scores > here]
            # Halfway to the next score, so that rounding elsewhere keeps the verdicts.
            return float((here + higher[0]) / 2) if higher.size else self._beyond(here, target_fpr)
        return self._beyond(self.scores[-1], target_fpr)

    def _beyond(self, score: float, target_fpr: float) -> float:
        """The threshold for this rate on the fitted tail, a little above `score` at least."""
        odds = log_odds(self.scores)
        count = min(max(1, round(TAIL * len(odds))), len(odds) - 1)
        start = odds[len(odds) - 1 - count]
        excess = float(np.mean(odds[len(odds) - count :] - start)) if count else 0.0
        share = max(count, 1) / len(odds)
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
        return {"scores": self.scores.tolist(), "pixels": self.pixels.tolist()}

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
        return cls(np.sort(arrays["scores"]), arrays["pixels"])


def pooled(parts: Sequence[NormalScores]) -> NormalScores:
    """The scores of several classes as one; of the pixels' values, their means at equal shares."""
    scores = np.sort(np.concatenate([part.scores for part in parts]))
    return NormalScores(scores, np.mean([part.pixels for part in parts], axis=0))


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
