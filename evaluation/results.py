"""What an evaluation finds out about one class: metrics, curves, thresholds, and the images worth looking at."""

from dataclasses import dataclass, field

import numpy as np

from evaluation.metrics import PRO_LIMIT, Ranking, summarize
from evaluation.score import ScoredImages
from evaluation.tables import Row
from evaluation.thresholds import Thresholds, thresholds_of
from utils.pictures import thumbnail

CURVE_POINTS = 300
THUMBNAIL = 200  # pixels, longer side, in the report's gallery


@dataclass(frozen=True)
class GalleryItem:
    """A test image in the report's gallery.

    Args:
        name: file name.
        defect_type: of the defect, or "good".
        label: 0 good, 1 defective.
        score: image score.
        error: how far the score lies on the wrong side of the threshold, negative on the right side, as a share of
            the range of the class's scores.
        image, heat: (H,W,3) uint8 thumbnails. truth: (H,W) uint8, or None where it is not known.
    """

    name: str
    defect_type: str
    label: int
    score: float
    error: float
    image: np.ndarray
    heat: np.ndarray
    truth: np.ndarray | None


@dataclass
class ClassResult:
    """The evaluation of one class, without its maps.

    Args:
        name: of the class.
        metrics: of all its images.
        by_defect_type: metrics of each type of defect against the good images.
        counts: images of each type of defect.
        thresholds: for verdicts.
        scores, labels: (N,) image scores and labels.
        curves: points (x, y) of the curves that are defined: roc and pr of images, pixel_roc, pixel_pr and pro.
        gallery: images to show.
    """

    name: str
    metrics: Row
    by_defect_type: dict[str, Row]
    counts: dict[str, int]
    thresholds: Thresholds
    scores: np.ndarray
    labels: np.ndarray
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    gallery: list[GalleryItem] = field(default_factory=list)

    def errors(self) -> np.ndarray:
        """(N,) how far each image score lies on the wrong side of the threshold, as a share of the range of scores.

        Without a threshold, normal images with high scores come first.
        """
        scale = max(float(np.ptp(self.scores)), 1e-12)
        if self.thresholds.image is None:
            return (self.scores - self.scores.max()) / scale
        distance = self.thresholds.image - self.scores
        return np.where(self.labels, distance, -distance) / scale


def evaluate_class(
    name: str, scored: ScoredImages, target_fpr: float | None = None, pro_limit: float = PRO_LIMIT
) -> ClassResult:
    """Metrics, overall and per type of defect, curves, and thresholds.

    Args:
        target_fpr: see thresholds_of.
        pro_limit: false positive rate up to which PRO is integrated.
    """
    image, pixel = scored.rankings()
    labels, types = scored.labels, scored.defect_types
    defects = sorted(set(types[labels]))
    return ClassResult(
        name,
        summarize(image, pixel, pro_limit),
        {one: summarize(*scored.subset(~labels | (types == one)).rankings(), pro_limit) for one in defects},
        {one: int(np.sum(types == one)) for one in defects},
        thresholds_of(scored.scores, scored.maps, labels, image, pixel, target_fpr),
        scored.scores,
        labels,
        _curves(image, pixel),
    )


def gallery_item(result: ClassResult, scored: ScoredImages, index: int, heat: np.ndarray) -> GalleryItem:
    """The gallery's thumbnails of a class's image, whose heat map is drawn already."""
    sample = scored.samples[index]
    truth = thumbnail(scored.masks[index].astype(np.uint8) * 255, THUMBNAIL) if sample.mask_known else None
    return GalleryItem(
        sample.filename,
        sample.defect_type,
        sample.label,
        float(result.scores[index]),
        float(result.errors()[index]),
        thumbnail(scored.images[index], THUMBNAIL),
        thumbnail(heat, THUMBNAIL),
        truth,
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
