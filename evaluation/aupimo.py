"""AUPIMO: the recall of each defect at false positive rates so low that normal images stay clean.

Per-image overlap (PIMO) of Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and
Low Tolerance", arXiv 2401.01984. The thresholds come from normal images only, so a defect cannot choose its own.
"""

from collections.abc import Iterable, Sequence

import numpy as np

LOWER, UPPER = 1e-5, 1e-4  # bounds of the shared false positive rate, section 3 of the paper


def aupimo(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    labels: Iterable[bool],
    lower: float = LOWER,
    upper: float = UPPER,
) -> float | None:
    """The mean of image_aupimos over the anomalous images; arguments as there.

    Returns:
        In [0, 1]; None if there is no normal image, or no anomalous one whose mask has a pixel.

    Example:
        >>> normal, anomalous = np.linspace(0, 0.8, 64).reshape(8, 8), np.full((8, 8), 0.3)
        >>> mask = np.arange(64).reshape(8, 8) < 4
        >>> anomalous[0, :3] = 0.9
        >>> aupimo([normal, anomalous], [np.zeros((8, 8), bool), mask], [False, True])
        0.75
    """
    values = image_aupimos(maps, masks, labels, lower, upper)
    return float(values.mean()) if len(values) else None


def image_aupimos(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    labels: Iterable[bool],
    lower: float = LOWER,
    upper: float = UPPER,
) -> np.ndarray:
    """The area under the PIMO curve of each anomalous image with a mask.

    The curve of an image is the recall of its mask's pixels over the shared false positive rate: the share of pixels
    at or above a threshold, averaged over the normal images. The area is taken over the logarithm of that rate from
    `lower` to `upper`, and divided by log(upper / lower).

    It is exact, without interpolation: the recall at a rate is the highest of all thresholds that flag no more than it,
    so a pixel counts from the rate that its own score as a threshold would flag, and the area is the mean, over the
    mask's pixels, of the share of the range in which they count. Rates below one normal pixel (`lower` needs 100000 of
    them) are those of thresholds above every normal score: with fewer than 1 / `upper` normal pixels, the result is the
    recall without any false alarm on them.

    Args:
        maps: N arrays (H,W) float, which may differ in size.
        masks: N arrays (H,W) bool. Those of normal images are not read.
        labels: (N,) whether an image is anomalous.
        lower, upper: 0 < lower < upper <= 1.

    Returns:
        (A,) in [0, 1], for the anomalous images whose masks have a pixel, in their order; (0,) without normal images.

    Raises:
        ValueError: a score is NaN.
    """
    labels = list(labels)
    normal = [values.ravel() for values, anomalous in zip(maps, labels, strict=True) if not anomalous]
    chosen = zip(maps, masks, labels, strict=True)
    defects = [values[mask] for values, mask, anomalous in chosen if anomalous and mask.any()]
    if not normal or not defects:
        return np.zeros(0)
    scores, rates = _shared_rates(normal, upper)
    gain = np.log(upper / np.clip(rates, lower, upper)) / np.log(upper / lower)
    if any(np.isnan(values).any() for values in defects):
        raise ValueError("scores hold values that are not numbers")
    return np.array([gain[np.searchsorted(scores, values, side="left")].mean() for values in defects])


def _shared_rates(normal: list[np.ndarray], upper: float) -> tuple[np.ndarray, np.ndarray]:
    """The highest scores of normal images, and the shared false positive rates that they give as thresholds.

    Returns:
        scores: (K,) ascending. Lower thresholds than the first flag more than `upper`, or all scores are here.
        rates: (K+1,) for each score as a threshold, and 0 for those above all.
    """
    shares = 1 / (len(normal) * np.array([values.size for values in normal]))
    scores = np.concatenate(normal)
    # Only the tail is sorted: each pixel flagged adds at least the smallest share to the rate.
    tail = min(scores.size, int(upper / shares.min()) + 2)
    scores.partition(scores.size - tail)
    # Partitioning puts NaN last.
    if np.isnan(scores[-tail:]).any():
        raise ValueError("scores hold values that are not numbers")
    highest = [values[values >= scores[-tail]] for values in normal]
    weights, scores = np.repeat(shares, [len(values) for values in highest]), np.concatenate(highest)
    order = np.argsort(scores)
    return scores[order], np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
