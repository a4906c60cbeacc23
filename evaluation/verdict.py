"""What a class's verdicts are worth: counts, intervals, and plain words where a detector is hardly better than none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.normal_scores import log_odds
from utils.counts import counted

RESAMPLES = 1000
CONFIDENCE = 0.95
BINS = 1024  # that pixels' log-odds are counted in, for the interval of pixel AUROC

Interval = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """The verdicts of one class on a labelled list.

    Args:
        good, flagged: number of good images, and of those called anomalous.
        defective, missed: number of defective images, and of those called normal.
        image_auroc, pixel_auroc: 95% intervals (see bootstrap below); None if undefined.
        doubts: what makes the figures doubtful, each after "<class> is"; empty if nothing does.
        unmasked: number of defective images whose mask is not known.

    flagged and missed are None without a threshold.
    """

    good: int
    flagged: int | None
    defective: int
    missed: int | None
    image_auroc: Interval | None
    pixel_auroc: Interval | None
    doubts: list[str]
    unmasked: int = 0

    def left_out(self) -> str:
        """Which images the pixel metrics leave out, as words; empty if they leave out none, or are undefined."""
        if not 0 < self.unmasked < self.defective:
            return ""
        of = f"of {self.defective} defective images, which"
        return f"pixel metrics leave out {counted(self.unmasked, f'{of} has no mask', f'{of} have no mask')}"

    def counts(self) -> str:
        """The counts as a sentence."""
        if self.flagged is None or self.missed is None:
            defective = counted(self.defective, "defective image")
            return f"{self.good} good and {defective}; no threshold, so no verdicts"
        parts = []
        if self.good:
            share = 100 * self.flagged / self.good
            parts.append(f"{self.flagged} of {counted(self.good, 'good image')} called anomalous ({share:.1f}%)")
        if self.defective:
            share = 100 * self.missed / self.defective
            parts.append(f"{self.missed} of {counted(self.defective, 'defective image')} missed ({share:.1f}%)")
        return ", ".join(parts)

    def intervals(self) -> str:
        """The intervals in percent, as words; empty if there are none."""
        named = (("image AUROC", self.image_auroc), ("pixel AUROC", self.pixel_auroc))
        texts = [f"{name} {100 * low:.1f} .. {100 * high:.1f}" for name, (low, high) in _defined(named)]
        return f"95% intervals: {', '.join(texts)}" if texts else ""

    def row(self) -> dict[str, float | None]:
        """The columns that metrics.csv gets for it."""
        image, pixel = self.image_auroc or (None, None), self.pixel_auroc or (None, None)
        return {
            "good_images": self.good,
            "good_flagged": self.flagged,
            "defective_images": self.defective,
            "defects_missed": self.missed,
            "image_auroc_low": image[0],
            "image_auroc_high": image[1],
            "pixel_auroc_low": pixel[0],
            "pixel_auroc_high": pixel[1],
        }


def _defined(named: Sequence[tuple[str, Interval | None]]) -> Iterator[tuple[str, Interval]]:
    return ((name, interval) for name, interval in named if interval is not None)


def verdict_of(
    scores: np.ndarray,
    labels: np.ndarray,
    threshold: float | None,
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    mask_known: np.ndarray,
) -> Verdict:
    """Judge the verdicts on labelled images.

    Args:
        scores, labels, mask_known: (N,) image scores, whether images are defective, whether their masks are known.
        threshold: of the image scores, or None.
        maps, masks: N anomaly maps (H,W) in [0, 1] and masks (H,W) bool.
    """
    flagged = None if threshold is None else scores >= threshold
    image = image_auroc_interval(scores, labels)
    known = np.flatnonzero(mask_known)
    pixel = pixel_auroc_interval([maps[i] for i in known], [masks[i] for i in known])
    doubts = []
    if image is not None and image[0] <= 0.5:
        low, high = (100 * end for end in image)
        doubts.append(
            f"hardly better than chance: the 95% interval of image AUROC, {low:.1f} .. {high:.1f}, reaches 50"
        )
    if flagged is not None and image and not beats_flagging_all(flagged, labels):
        doubts.append(
            f"hardly better than calling every image anomalous: F1 {100 * f1_of(flagged, labels):.1f}, against "
            f"{100 * f1_of(np.ones_like(labels), labels):.1f}"
        )
    return Verdict(
        int(np.sum(~labels)),
        None if flagged is None else int(np.sum(flagged & ~labels)),
        int(np.sum(labels)),
        None if flagged is None else int(np.sum(~flagged & labels)),
        image,
        pixel,
        doubts,
        int(np.sum(~mask_known)),
    )


def f1_of(flagged: np.ndarray, labels: np.ndarray) -> float:
    """F1 of verdicts (N,) bool against labels (N,) bool."""
    hits = np.sum(flagged & labels)
    return float(2 * hits / max(1, flagged.sum() + labels.sum()))


# ---- bootstrap over images (Efron, 1979): good and defective ones are drawn apart, so that both occur ----------------


def image_auroc_interval(scores: np.ndarray, labels: np.ndarray) -> Interval | None:
    """The 95% percentile interval of image AUROC; None unless both labels occur."""
    good, bad = scores[~labels], scores[labels]
    if not (len(good) and len(bad)):
        return None
    wins = (bad[:, None] > good[None]) + 0.5 * (bad[:, None] == good[None])
    rng = np.random.default_rng(0)
    values = ((_weights(len(bad), rng) @ wins) * _weights(len(good), rng)).sum(axis=1)
    return _interval(values)


def pixel_auroc_interval(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Interval | None:
    """The 95% percentile interval of pixel AUROC, from images drawn anew; None unless both kinds of pixels occur.

    The pixels' log-odds are counted in 1024 bins, which moves an AUROC by less than 0.001 as a rule.
    """
    defective = np.array([mask.any() for mask in masks], bool)
    if not defective.any() or all(mask.all() for mask in masks):
        return None
    inside, outside = _histograms(maps, masks)
    rng = np.random.default_rng(0)
    weights = np.zeros((RESAMPLES, len(masks)))
    for group in (defective, ~defective):
        if group.any():
            weights[:, group] = _weights(int(group.sum()), rng) * group.sum()
    positive, negative = weights @ inside, weights @ outside
    lower = np.cumsum(negative, axis=1) - negative / 2
    totals = positive.sum(axis=1) * negative.sum(axis=1)
    return _interval((positive * lower).sum(axis=1)[totals > 0] / totals[totals > 0])


def _histograms(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Counts (N,BINS) of the pixels in masks, and of the others."""
    low, high = (float(log_odds(np.float64(end))) for end in (min(m.min() for m in maps), max(m.max() for m in maps)))
    factor = (BINS - 1) / max(high - low, 1e-9)
    inside, outside = np.zeros((len(maps), BINS)), np.zeros((len(maps), BINS))
    for index, (values, mask) in enumerate(zip(maps, masks, strict=True)):
        bins = np.clip((log_odds(values) - low) * factor, 0, BINS - 1).astype(np.int32)
        inside[index] = np.bincount(bins[mask], minlength=BINS)
        outside[index] = np.bincount(bins.ravel(), minlength=BINS) - inside[index]
    return inside, outside


def beats_flagging_all(flagged: np.ndarray, labels: np.ndarray) -> bool:
    """Whether F1 is above that of calling every image anomalous, and the verdicts are better than by lot.

    The latter: of the defective images a larger share is flagged than of the good ones, in 97.5% of the images drawn
    anew. F1 does not serve for that: where most test images are defective, flagging all has a high one, and a few
    missed ones made a good detector look useless.
    """
    rng = np.random.default_rng(0)
    hits = _weights(int(labels.sum()), rng) @ flagged[labels]
    alarms = _weights(int((~labels).sum()), rng) @ flagged[~labels]
    above = f1_of(flagged, labels) > f1_of(np.ones_like(labels), labels) + 1e-9
    return bool(above and np.quantile(hits - alarms, (1 - CONFIDENCE) / 2) > 0)


def _weights(count: int, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, count) shares of images that are drawn with replacement, as often as there are images."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), min(float(high), 1.0)  # 1 up to rounding
