"""The evaluation of one class: metrics, curves, thresholds, and images for the report's gallery."""

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.lists import Sample
from evaluation.inputs import ResultNames
from evaluation.metrics import PRO_LIMIT, Ranking, summarize, summarize_maps
from evaluation.score import ScoredImages
from evaluation.tables import Row
from evaluation.thresholds import Thresholds, heat_range, thresholds_of
from evaluation.training_curve import Curve
from evaluation.verdict import Verdict, verdict_of
from utils.distributed import Run
from utils.errors import RunError
from utils.files import remove_parts
from utils.log import log, progress_bar
from utils.pictures import heat_overlay, result_picture, thumbnail, write_image
from utils.signals import StopRequest

CURVE_POINTS = 300
THUMBNAIL = 200  # longer side of the gallery's images, in pixels


@dataclass(frozen=True)
class GalleryItem:
    """A test image in the report's gallery.

    Args:
        name: file name.
        defect_type: its defect type, or "good".
        label: 0 good, 1 defective.
        score: image score.
        error: distance of the score from the threshold, as a share of the range of the class's scores; positive if
            the verdict is wrong, else negative.
        image, heat: (H,W,3) uint8 thumbnails.
        truth: (H,W) uint8 thumbnail of the mask, or None if unknown.
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
        name: name of the class.
        metrics: metrics of all its images.
        by_defect_type: metrics of each defect type against the good images.
        counts: number of images of each defect type.
        thresholds: for verdicts.
        scores, labels: (N,) image scores and labels.
        curves: points (x, y) of the defined curves, by name: roc and pr of images, pixel_roc, pixel_pr and pro.
        verdict: counts, intervals and doubts.
        selection: how the evaluated checkpoint was selected, a value of evaluator.select.
        others: metrics of checkpoints that were selected otherwise, by selection.
        training: the curves of the training's validations, by metric.
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
    verdict: Verdict
    selection: str = "test"
    others: dict[str, Row] = field(default_factory=dict)
    training: dict[str, Curve] = field(default_factory=dict)
    gallery: list[GalleryItem] = field(default_factory=list)

    def errors(self) -> np.ndarray:
        """(N,) distance of each image score from the threshold, positive if the verdict is wrong (see GalleryItem).

        Without a threshold, higher scores are larger errors, none of them positive.
        """
        scale = max(float(np.ptp(self.scores)), 1e-12)
        if self.thresholds.image is None:
            return (self.scores - self.scores.max()) / scale
        distance = np.abs(self.scores - self.thresholds.image) / scale
        wrong = (self.scores >= self.thresholds.image) != self.labels
        # A good image at the very threshold is called anomalous.
        return np.where(wrong, np.maximum(distance, 1e-12), -distance)


def evaluate_class(
    name: str,
    scored: ScoredImages,
    target_fpr: float | None = None,
    pro_limit: float = PRO_LIMIT,
    thresholds: Thresholds | None = None,
) -> ClassResult:
    """Compute the metrics of a class, overall and per defect type, its curves, its thresholds and its verdicts.

    Args:
        target_fpr: see thresholds_of.
        thresholds: those of held-out good images; None chooses them on these images.
        pro_limit: false positive rate up to which PRO is integrated.

    Raises:
        RunError: a score or a map is not finite.
    """
    for sample, score, values in zip(scored.samples, scored.scores, scored.maps, strict=True):
        if not (np.isfinite(score) and np.isfinite(values).all()):
            raise RunError(f"{sample.filename}: its anomaly map is not finite; train {name} again with a lower lr")
    image, pixel = scored.rankings()
    labels, defect_types = scored.labels, scored.defect_types
    if thresholds is None:
        thresholds = thresholds_of(scored.scores, scored.maps, labels, image, pixel, target_fpr)
    else:
        low, high = heat_range(scored.maps)
        thresholds = replace(thresholds, low=low, high=high)
    verdict = verdict_of(
        scored.scores, labels, thresholds.image, list(scored.maps), list(scored.masks), scored.mask_known
    )
    by_defect_type = {}
    for defect in sorted(set(defect_types[labels])):
        chosen = scored.subset(~labels | (defect_types == defect))
        by_defect_type[defect] = _metrics(chosen, *chosen.rankings(), thresholds.pixel, pro_limit)
    return ClassResult(
        name,
        _metrics(scored, image, pixel, thresholds.pixel, pro_limit) | verdict.row(),
        by_defect_type,
        {defect: int(np.sum(defect_types == defect)) for defect in by_defect_type},
        thresholds,
        scored.scores,
        labels,
        _curves(image, pixel),
        verdict,
    )


def _metrics(
    scored: ScoredImages, image: Ranking, pixel: Ranking | None, pixel_threshold: float | None, pro_limit: float
) -> Row:
    """All metrics of images with their rankings, and with the class's threshold for pixels."""
    known = np.flatnonzero(scored.mask_known)
    maps, masks = [scored.maps[i] for i in known], [scored.masks[i] for i in known]
    return summarize(image, pixel, pro_limit) | summarize_maps(maps, masks, scored.labels[known], pixel_threshold)


def draw_images(
    result: ClassResult,
    scored: ScoredImages,
    gallery: int,
    folder: Path | None,
    run: Run,
    stop: StopRequest,
    suffix: str = "png",
) -> None:
    """Put the images with the worst errors into the gallery, and write a result picture of every image.

    Args:
        scored: the images of the class, kept for pictures (see score.predict_maps).
        gallery: number of images in the gallery.
        folder: where to write <defect type>/<name>.<suffix>, or None to write none. Subfolders of the defect type are
            kept.
        stop: ends the drawing between two images when a signal has arrived.
        suffix: "png" or "jpg".
    """
    thresholds, errors, names = result.thresholds, result.errors(), ResultNames((suffix,))
    if folder is not None:
        remove_parts(folder, nested=True)
    worst = set(np.argsort(-errors, kind="stable")[:gallery].tolist())
    for index in progress_bar(range(len(scored)), run, f"{result.name} pictures", stop=stop):
        if folder is None and index not in worst:
            continue
        sample, image = scored.samples[index], scored.images[index]
        mask = scored.masks[index] if sample.mask_known else None
        heat = heat_overlay(image, scored.maps[index], thresholds.low, thresholds.high, thresholds.pixel)
        if folder is not None:
            write_image(folder / f"{names.of(_name_in_class(sample))}.{suffix}", result_picture(image, mask, heat))
        if index in worst:
            score, error = float(result.scores[index]), float(errors[index])
            result.gallery.append(_gallery_item(sample, score, error, image, heat, mask))
    if folder is not None:
        log.info("%s: pictures in %s", result.name, folder)


def _name_in_class(sample: Sample) -> str:
    """The image's path below its class: the defect type, its subfolders, and the file name."""
    *folders, name = PurePosixPath(sample.filename).parts
    kind = sample.defect_type
    inner = folders[folders.index(kind) + 1 :] if kind in folders else []
    return "/".join([kind, *inner, name])


def _gallery_item(
    sample: Sample, score: float, error: float, image: np.ndarray, heat: np.ndarray, mask: np.ndarray | None
) -> GalleryItem:
    truth = None if mask is None else thumbnail(mask.astype(np.uint8) * 255, THUMBNAIL)
    small = (thumbnail(image, THUMBNAIL), thumbnail(heat, THUMBNAIL), truth)
    return GalleryItem(sample.filename, sample.defect_type, sample.label, score, error, *small)


def _curves(image: Ranking, pixel: Ranking | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    curves = {}
    if image.defined:
        curves |= {"roc": image.curve(), "pr": image.precision_recall()}
    if pixel is not None and pixel.defined:
        curves |= {"pixel_roc": pixel.curve(), "pixel_pr": pixel.precision_recall(), "pro": pixel.pro_curve()}
    return {name: _thinned(*points) for name, points in curves.items()}


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About CURVE_POINTS points of a curve, spaced evenly along its length."""
    if len(x) <= CURVE_POINTS:
        return x, y
    length = np.cumsum(np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0])))
    chosen = np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)).clip(0, len(x) - 1))
    chosen = np.union1d(chosen, [0, len(x) - 1])
    return x[chosen], y[chosen]
