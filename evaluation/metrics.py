"""Detection and localisation metrics. They are exact: every distinct score is a threshold.

AUROC and average precision follow scikit-learn's definitions, PRO follows MVTec-AD's own evaluation
(Bergmann et al., IJCV 2021). F1 of pixels at the threshold that predict.py uses is MVTec AD 2's SegF1 (Heckler-Kram et
al., 2025): pixels of all images together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from evaluation.aupimo import aupimo

PRO_LIMIT = 0.3
STRICT_PRO_LIMIT = 0.05  # PRO_LIMIT lets almost a third of the good pixels be flagged


@dataclass(frozen=True)
class Ranking:
    """Counts at every distinct score of a positive, in descending order. All metrics follow from them.

    Other thresholds are not needed: between the scores of two positives, only the false positives change. The
    negatives, which are nearly all pixels, are sorted once.

    Example:
        >>> ranking = Ranking.of(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
        >>> ranking.auroc()
        0.75

    Args:
        thresholds: (K,) the distinct scores.
        true_positives: (K,) number of positives with score >= threshold.
        false_positives, above: (K,) number of negatives with score >= threshold, and with score > threshold.
        positives, negatives: total numbers.
        weights: (K,) sum of the weights of the positives with score >= threshold.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    above: np.ndarray
    positives: int
    negatives: int
    weights: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> "Ranking":
        """Rank scores.

        Args:
            scores: float, any shape.
            labels: bool, same shape.
            weights: (P,) weights of the positives, in the order of scores[labels]; None weighs them equally.

        Raises:
            ValueError: a score is NaN.
        """
        labels = np.asarray(labels, dtype=bool)
        positive, negative = scores[labels], scores[~labels]
        negative.sort()
        values, inverse, counts = np.unique(positive, return_inverse=True, return_counts=True)
        # Sorting puts NaN last.
        if any(len(ordered) and np.isnan(ordered[-1]) for ordered in (values, negative)):
            raise ValueError("scores hold values that are not numbers")
        weighted = counts if weights is None else np.bincount(inverse.ravel(), weights, minlength=len(values))
        descending = values[::-1]
        return cls(
            descending,
            np.cumsum(counts[::-1]),
            len(negative) - np.searchsorted(negative, descending, side="left"),
            len(negative) - np.searchsorted(negative, descending, side="right"),
            len(positive),
            len(negative),
            np.cumsum(weighted[::-1]),
        )

    @property
    def defined(self) -> bool:
        """Whether both labels occur."""
        return self.positives > 0 and self.negatives > 0

    def auroc(self) -> float | None:
        """The probability that a positive scores higher than a negative; equal scores count one half."""
        if not self.defined:
            return None
        lower = self.negatives - (self.false_positives + self.above) / 2
        return float(np.diff(self.true_positives, prepend=0) @ lower / (self.positives * self.negatives))

    def average_precision(self) -> float | None:
        """The mean over the positives of the precision at each one's score, in [0, 1]; without interpolation."""
        if not self.defined:
            return None
        precision = self.true_positives / (self.true_positives + self.false_positives)
        return float(np.diff(self.true_positives, prepend=0) @ precision / self.positives)

    def best_f1(self) -> tuple[float | None, float | None]:
        """The best F1 and its threshold (score >= threshold is positive); the highest of equally good thresholds."""
        if not self.defined:
            return None, None
        f1 = 2 * self.true_positives / (self.true_positives + self.false_positives + self.positives)
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.thresholds[best])

    def best_iou(self) -> float | None:
        """The best intersection over union; of the same threshold as the best F1, because IoU = F1 / (2 - F1)."""
        if not self.defined:
            return None
        return float(np.max(self.true_positives / (self.positives + self.false_positives)))

    def curve(self, heights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The corners of the ROC curve: false positive rate and true positive rate, from (0, 0) to (1, 1).

        Args:
            heights: (K,) values to plot over the false positive rate instead of the true positive rate.
        """
        heights = self.true_positives / self.positives if heights is None else heights
        # Two corners per threshold: first only the negatives above it are added, then its positives and tied negatives.
        x = np.stack([self.above, self.false_positives], axis=1).ravel() / self.negatives
        y = np.stack([np.append(0.0, heights[:-1]), heights], axis=1).ravel()
        return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision at each threshold."""
        return self.true_positives / self.positives, self.true_positives / (self.true_positives + self.false_positives)

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The corners of the PRO curve; the weights must add up to 1 in each region."""
        return self.curve(self.weights / self.weights[-1])

    def pro(self, limit: float = PRO_LIMIT) -> float | None:
        """Area under the PRO curve up to a false positive rate, divided by that rate."""
        return _area_up_to(*self.pro_curve(), limit) / limit if self.defined else None


def image_scores(maps: np.ndarray, avgpool_size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Image scores (N,): the maximum of each map (N,H,W) after average pooling with stride 1.

    A window larger than the map shrinks to it.

    Example:
        >>> image_scores(np.eye(4, dtype=np.float32)[None], avgpool_size=(2, 2))
        array([0.5])
    """
    height, width = maps.shape[1:]
    k_y, k_x = min(avgpool_size[0], height), min(avgpool_size[1], width)
    scores = np.empty(len(maps))
    for i, values in enumerate(maps):
        # Running sums, in double precision: their cost does not grow with the window, which tiles make large.
        means = cv2.boxFilter(np.ascontiguousarray(values, np.float32), cv2.CV_32F, (k_x, k_y), anchor=(0, 0))
        scores[i] = means[: height - k_y + 1, : width - k_x + 1].max()
    return scores


def flat_pixels(images: np.ndarray) -> np.ndarray:
    """The pixels of images (N,H,W), or of (N,) arrays (H,W) of any sizes, image after image; a copy only of the latter.

    Example:
        >>> images = np.empty(2, object)
        >>> images[0], images[1] = np.zeros((2, 3)), np.ones((1, 2))
        >>> flat_pixels(images)
        array([0., 0., 0., 0., 0., 0., 1., 1.])
    """
    if images.dtype != object:
        return images.ravel()
    return np.concatenate([image.ravel() for image in images]) if len(images) else np.zeros(0)


def pixel_ranking(scores: np.ndarray, masks: np.ndarray) -> Ranking:
    """Rank the pixels of maps, with weights that add up to 1 in each 8-connected region of the masks.

    Args:
        scores, masks: float and bool, (N,H,W), or (N,) arrays (H,W) of any sizes.
    """
    weights = [np.zeros(0)]
    for mask in masks:
        if mask.any():
            _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            inside = labels[mask]
            weights.append(1.0 / np.bincount(inside)[inside])
    return Ranking.of(flat_pixels(scores), flat_pixels(masks), np.concatenate(weights))


def pro(scores: np.ndarray, masks: np.ndarray, limit: float = PRO_LIMIT) -> float | None:
    """Per-region overlap, integrated over the false positive rate up to `limit` and divided by `limit`.

    Regions are 8-connected, and their holes are not filled. The false positive rate counts all pixels outside regions.

    Args:
        scores: (N,H,W) float.
        masks: (N,H,W) bool.

    Returns:
        The PRO score in [0, 1]; None if there is no region, or no pixel outside of one.
    """
    return pixel_ranking(scores, masks).pro(limit)


def _area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Trapezoidal area under y(x), x ascending from 0, up to x = limit, with the last point interpolated."""
    inside = x <= limit
    xs, ys = x[inside], y[inside]
    if len(xs) < len(x) and xs[-1] < limit:
        k = len(xs)
        slope = (y[k] - ys[-1]) / (x[k] - xs[-1])
        xs, ys = np.append(xs, limit), np.append(ys, ys[-1] + slope * (limit - xs[-1]))
    return float(np.trapezoid(ys, xs))


def overlap_at(
    scores: Sequence[np.ndarray], masks: Sequence[np.ndarray], threshold: float | None
) -> tuple[float | None, float | None]:
    """F1 and intersection over union of the pixels that reach a threshold, pixels of all images together.

    Args:
        scores: N arrays (H,W) float, which may differ in size.
        masks: N arrays (H,W) bool.
        threshold: None gives None.

    Returns:
        Both in [0, 1]; None if all pixels are anomalous, or none.
    """
    if threshold is None:
        return None, None
    pixels = positives = flagged = hits = 0
    for values, mask in zip(scores, masks, strict=True):
        reached = values >= threshold
        pixels, positives = pixels + mask.size, positives + np.count_nonzero(mask)
        flagged, hits = flagged + np.count_nonzero(reached), hits + np.count_nonzero(reached & mask)
    if positives in (0, pixels):
        return None, None
    return float(2 * hits / (flagged + positives)), float(hits / (flagged + positives - hits))


def summarize(image: Ranking, pixel: Ranking | None, pro_limit: float = PRO_LIMIT) -> dict[str, float | None]:
    """The metrics of a ranking of images and a ranking of pixels (see pixel_ranking; None if no mask is known).

    Returns:
        image_auroc, pixel_auroc, pro, image_ap, pixel_ap, image_f1, pixel_f1, the thresholds of the two F1s,
        image_threshold and pixel_threshold, pro_005 (up to a false positive rate of 0.05), and pixel_iou_max. A metric
        is None if one of the labels does not occur.
    """
    image_f1, image_threshold = image.best_f1()
    pixel_f1, pixel_threshold = pixel.best_f1() if pixel else (None, None)
    return {
        "image_auroc": image.auroc(),
        "pixel_auroc": pixel.auroc() if pixel else None,
        "pro": pixel.pro(pro_limit) if pixel else None,
        "image_ap": image.average_precision(),
        "pixel_ap": pixel.average_precision() if pixel else None,
        "image_f1": image_f1,
        "pixel_f1": pixel_f1,
        "image_threshold": image_threshold,
        "pixel_threshold": pixel_threshold,
        "pro_005": pixel.pro(STRICT_PRO_LIMIT) if pixel else None,
        "pixel_iou_max": pixel.best_iou() if pixel else None,
    }


def summarize_maps(
    scores: Sequence[np.ndarray], masks: Sequence[np.ndarray], labels: Iterable[bool], threshold: float | None
) -> dict[str, float | None]:
    """The metrics that a ranking of all pixels does not give.

    Args:
        scores: N arrays (H,W) float, which may differ in size.
        masks: N arrays (H,W) bool, of images whose ground truth is known.
        labels: (N,) whether an image is anomalous.
        threshold: the pixel threshold for new images, or None.

    Returns:
        aupimo, pixel_f1_deployed, pixel_iou_deployed (see aupimo and overlap_at).
    """
    f1, iou = overlap_at(scores, masks, threshold)
    return {"aupimo": aupimo(scores, masks, labels), "pixel_f1_deployed": f1, "pixel_iou_deployed": iou}


def anomaly_metrics(
    scores: np.ndarray,
    masks: np.ndarray | None,
    avgpool_size: tuple[int, int] = (16, 16),
    labels: np.ndarray | None = None,
    pro_limit: float = PRO_LIMIT,
    pixel_threshold: float | None = None,
) -> dict[str, float | None]:
    """All metrics of a set of anomaly maps.

    Args:
        scores: (N,H,W) float anomaly maps.
        masks: (N,H,W) bool ground truth, or None if unknown; pixel metrics are then None.
        avgpool_size: window of the image score.
        labels: (N,) bool image labels; None takes them from the masks.
        pro_limit: false positive rate up to which PRO is integrated.
        pixel_threshold: of pixel_f1_deployed and pixel_iou_deployed, which are undefined without it.

    Returns:
        See summarize and summarize_maps.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> masks = np.zeros((4, 32, 32), bool)
        >>> masks[2:, 8:16, 8:16] = True
        >>> metrics = anomaly_metrics(rng.random((4, 32, 32)) + masks, masks)
        >>> metrics["image_auroc"], metrics["pixel_auroc"]
        (1.0, 1.0)
    """
    if labels is None:
        if masks is None:
            raise ValueError("labels are needed if there are no masks")
        labels = masks.any(axis=(1, 2))
    image = Ranking.of(image_scores(scores, avgpool_size), labels)
    if masks is None:
        return summarize(image, None, pro_limit) | summarize_maps([], [], [], None)
    by_map = summarize_maps(scores, masks, labels, pixel_threshold)
    return summarize(image, pixel_ranking(scores, masks), pro_limit) | by_map
