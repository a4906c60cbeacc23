"""Detection and localisation metrics, exact: every distinct score is a threshold.

AUROC and average precision follow scikit-learn's definitions, PRO that of MVTec-AD's own evaluation
(Bergmann et al., IJCV 2021).
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

PRO_LIMIT = 0.3


@dataclass(frozen=True)
class Ranking:
    """Labels ranked by descending score; one point per distinct score.

    Args:
        true_positives, false_positives: counts at score >= threshold, (K,) float64.
        thresholds: (K,) descending.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> "Ranking":
        """Args: scores (N,) float; labels (N,) bool."""
        order = np.argsort(-scores, kind="stable")
        scores, labels = scores[order], labels[order].astype(bool)
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
        true_positives = np.cumsum(labels, dtype=np.int64)[last].astype(np.float64)
        return cls(true_positives, last + 1 - true_positives, scores[last])

    @property
    def defined(self) -> bool:
        """Whether both labels occur."""
        return self.true_positives[-1] > 0 and self.false_positives[-1] > 0

    def auroc(self) -> float | None:
        if not self.defined:
            return None
        tpr = np.append(0.0, self.true_positives / self.true_positives[-1])
        fpr = np.append(0.0, self.false_positives / self.false_positives[-1])
        return float(np.trapezoid(tpr, fpr))

    def average_precision(self) -> float | None:
        if not self.defined:
            return None
        precision = self.true_positives / (self.true_positives + self.false_positives)
        recall = self.true_positives / self.true_positives[-1]
        return float(np.sum(np.diff(recall, prepend=0.0) * precision))

    def best_f1(self) -> tuple[float | None, float | None]:
        """The best F1 and its threshold (score >= threshold is positive)."""
        if not self.defined:
            return None, None
        f1 = 2 * self.true_positives / (self.true_positives + self.false_positives + self.true_positives[-1])
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.thresholds[best])


def image_scores(maps: np.ndarray, avgpool_size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Image scores (N,): the maximum of each map (N,H,W) after average pooling with stride 1.

    A window larger than the map shrinks to it.
    """
    window = tuple(min(k, side) for k, side in zip(avgpool_size, maps.shape[1:], strict=True))
    # Chunks: pooling 1000s of maps at once would double the memory.
    chunks = [
        F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(chunk))[:, None].float(), window, stride=1).amax(
            dim=(1, 2, 3)
        )
        for chunk in np.array_split(maps, max(1, len(maps) // 64))
    ]
    return torch.cat(chunks).numpy().astype(np.float64)


def pro(scores: np.ndarray, masks: np.ndarray, limit: float = PRO_LIMIT) -> float | None:
    """Per-region overlap, integrated over the false positive rate up to `limit` and divided by it.

    Regions are 8-connected; the false positive rate is over all pixels outside regions.

    Args:
        scores: (N,H,W) float.
        masks: (N,H,W) bool.

    Returns:
        The PRO score in [0, 1]; None where there is no region or nothing outside.
    """
    weights = np.zeros(masks.shape, dtype=np.float64)
    regions = 0
    for mask, weight in zip(masks, weights, strict=True):
        if not mask.any():
            continue
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(labels.ravel(), minlength=count)
        weight[mask] = 1.0 / sizes[labels[mask]]
        regions += count - 1
    normal = int(masks.size - np.count_nonzero(masks))
    if regions == 0 or normal == 0:
        return None
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")
    ranked = flat[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    overlap = np.append(0.0, np.cumsum(weights.ravel()[order])[last] / regions)
    fpr = np.append(0.0, np.cumsum(~masks.ravel()[order], dtype=np.int64)[last] / normal)
    return _area_up_to(fpr, overlap, limit) / limit


def _area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Trapezoidal area under y(x), x ascending from 0, up to x = limit, with the last point interpolated."""
    inside = x <= limit
    xs, ys = x[inside], y[inside]
    if len(xs) < len(x) and xs[-1] < limit:
        k = len(xs)
        slope = (y[k] - ys[-1]) / (x[k] - xs[-1])
        xs, ys = np.append(xs, limit), np.append(ys, ys[-1] + slope * (limit - xs[-1]))
    return float(np.trapezoid(ys, xs))


def anomaly_metrics(
    scores: np.ndarray,
    masks: np.ndarray | None,
    avgpool_size: tuple[int, int] = (16, 16),
    labels: np.ndarray | None = None,
) -> dict[str, float | None]:
    """All metrics of a set of anomaly maps.

    Args:
        scores: (N,H,W) float anomaly maps.
        masks: (N,H,W) bool ground truth, or None where it is not known: pixel metrics are then None.
        avgpool_size: window of the image score.
        labels: (N,) bool image labels; from the masks where absent.

    Returns:
        image_auroc, pixel_auroc, pro, image_ap, pixel_ap, image_f1, pixel_f1, and the thresholds of the two F1s,
        image_threshold and pixel_threshold. None where a metric is undefined (one of the labels does not occur).
    """
    if labels is None:
        if masks is None:
            raise ValueError("labels are needed where there are no masks")
        labels = masks.any(axis=(1, 2))
    image = Ranking.of(image_scores(scores, avgpool_size), np.asarray(labels, dtype=bool))
    image_f1, image_threshold = image.best_f1()
    pixel = Ranking.of(scores.ravel(), masks.ravel()) if masks is not None else None
    pixel_f1, pixel_threshold = pixel.best_f1() if pixel else (None, None)
    return {
        "image_auroc": image.auroc(),
        "pixel_auroc": pixel.auroc() if pixel else None,
        "pro": pro(scores, masks) if masks is not None else None,
        "image_ap": image.average_precision(),
        "pixel_ap": pixel.average_precision() if pixel else None,
        "image_f1": image_f1,
        "pixel_f1": pixel_f1,
        "image_threshold": image_threshold,
        "pixel_threshold": pixel_threshold,
    }
