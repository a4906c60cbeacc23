"""What an evaluation finds out about one class: metrics, curves, thresholds, and pictures to show."""

from dataclasses import dataclass, field, fields

import numpy as np

from evaluation.metrics import PRO_LIMIT, Ranking, pixel_ranking, summarize
from evaluation.tables import Row
from evaluation.thresholds import BEST_F1, Thresholds, best_f1, for_target_fpr

CURVE_POINTS = 300


@dataclass(frozen=True)
class Shown:
    """A test picture in the report's gallery.

    Args:
        name: file name. kind: of the defect, or of the good ones. label: 0 good, 1 defective. score: image score.
        error: how far the score lies on the wrong side of the threshold, negative on the right side, as a share of
            the range of the class's scores.
        image, heat: (H,W,3) uint8; truth: (H,W) uint8, or None where it is not known.
    """

    name: str
    kind: str
    label: int
    score: float
    error: float
    image: np.ndarray
    heat: np.ndarray
    truth: np.ndarray | None


@dataclass
class ClassResult:
    """The evaluation of one class.

    Args:
        name: of the class.
        metrics: of all its pictures. kinds: of each kind of defect against the good pictures.
        thresholds: for verdicts.
        scores, labels: (N,) image scores and labels.
        curves: points (x, y) of the curves that are defined: roc and pr of images, pixel_roc, pixel_pr and pro.
        counts: good and defective pictures of each kind of defect.
        gallery: pictures to show, worst errors first.
    """

    name: str
    metrics: Row
    kinds: dict[str, Row]
    thresholds: Thresholds
    scores: np.ndarray
    labels: np.ndarray
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    counts: dict[str, int]
    gallery: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class ScoredPictures:
    """Anomaly maps with what is known of their pictures.

    Args:
        maps: (N,H,W) float32. scores: (N,) image scores.
        masks: (N,H,W) bool. known: (N,) bool, whether the mask is known.
        labels: (N,) bool. kinds: (N,) names.
    """

    maps: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    known: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray

    def subset(self, chosen: np.ndarray) -> "ScoredPictures":
        return ScoredPictures(*(getattr(self, part.name)[chosen] for part in fields(self)))

    def rankings(self) -> tuple[Ranking, Ranking | None]:
        """Of images; and of the pixels of pictures with a known mask, None where no defect has one."""
        image = Ranking.of(self.scores, self.labels)
        if not (self.masks.any(axis=(1, 2)) & self.known).any():
            return image, None
        return image, pixel_ranking(self.maps[self.known], self.masks[self.known])


def evaluate_class(
    name: str, pictures: ScoredPictures, target_fpr: float | None = None, pro_limit: float = PRO_LIMIT
) -> ClassResult:
    """Metrics, overall and per kind of defect, curves, and thresholds.

    Args:
        target_fpr: share of normal images (and of normal images' pixels) that may be flagged; None takes the best F1.
        pro_limit: false positive rate up to which PRO is integrated.
    """
    image, pixel = pictures.rankings()
    metrics = summarize(image, pixel, pro_limit)
    defects = sorted(set(pictures.kinds[pictures.labels]))
    kinds = {}
    for kind in defects:
        rankings = pictures.subset(~pictures.labels | (pictures.kinds == kind)).rankings()
        kinds[kind] = summarize(*rankings, pro_limit)
    return ClassResult(
        name,
        metrics,
        kinds,
        thresholds_of(pictures, image, pixel, target_fpr),
        pictures.scores,
        pictures.labels,
        _curves(image, pixel),
        {kind: int(np.sum(pictures.kinds == kind)) for kind in defects},
    )


def thresholds_of(
    pictures: ScoredPictures, image: Ranking, pixel: Ranking | None, target_fpr: float | None = None
) -> Thresholds:
    """Where the verdicts on pictures turn.

    Args:
        image, pixel: their rankings.
        target_fpr: see evaluate_class.
    """
    low, high = float(np.median(pictures.maps)), float(pictures.maps.max())
    high = max(high, low + 1e-6)
    if target_fpr is None:
        return Thresholds(best_f1(image, pictures.scores), pixel.best_f1()[1] if pixel else None, BEST_F1, low, high)
    normal = ~pictures.labels
    rule = f"at most {100 * target_fpr:g}% of the normal images (of their pixels) flagged on the evaluation set"
    return Thresholds(
        for_target_fpr(pictures.scores[normal], target_fpr),
        for_target_fpr(pictures.maps[normal], target_fpr),
        rule,
        low,
        high,
    )


def _curves(image: Ranking, pixel: Ranking | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    curves = {}
    if image.defined:
        curves |= {"roc": image.curve(), "pr": image.precision_recall()}
    if pixel is not None and pixel.defined:
        curves |= {"pixel_roc": pixel.curve(), "pixel_pr": pixel.precision_recall(), "pro": pixel.pro_curve()}
    return {name: _thinned(*points) for name, points in curves.items()}


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most some hundred points, evenly along x and y together."""
    if len(x) <= CURVE_POINTS:
        return x, y
    length = np.cumsum(np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0])))
    chosen = np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)).clip(0, len(x) - 1))
    chosen = np.union1d(chosen, [0, len(x) - 1])
    return x[chosen], y[chosen]
