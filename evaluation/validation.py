"""The validations of a training: figures of the test list, and of held-out good images with synthetic anomalies.

In float32 whatever the training's precision is, as evaluation and prediction score by default: figures and thresholds
are those of the detector as it is used.
"""

from collections.abc import Iterable

import numpy as np

from datasets.realnet import RealNetTestSet
from datasets.validation import HeldOutSet
from evaluation.metrics import Ranking
from evaluation.normal_scores import NormalScores
from evaluation.score import ScoredImages, pooling_window, predict_maps
from evaluation.thresholds import heat_range
from evaluation.trained_model import HeldOut
from utils.log import Board, log
from utils.pictures import contact_sheet, heat_overlay, spread
from utils.signals import StopRequest
from utils.training import Training
from utils.training_log import log_json

SHEET_IMAGES = 8
DIVERGED = float("-inf")  # the metric of a network whose anomaly maps are not finite


def validate_test(
    training: Training, test_set: RealNetTestSet, loader: Iterable[dict], board: Board, stop: StopRequest
) -> float | None:
    """The metric of the test list, evaluator.key_metric, on rank 0, of a list that gives metrics; None on others."""
    shown = spread([sample.defect_type for sample in test_set.samples], SHEET_IMAGES)
    window = pooling_window(training.config.evaluator)
    scored = predict_maps(training.deployed, test_set, loader, training.run, window, show=shown, stop=stop)
    if scored is None:
        return None
    if not scored.finite:
        return _diverged(training, "the test list")
    metrics = validation_metrics(scored)
    _report(training, metrics, "", board)
    board.add_image("validation/heat_maps", heat_map_sheet(scored, shown), training.progress.epoch)
    return key_metric(metrics, training.config.evaluator.key_metric)


def validate_held_out(
    training: Training, held_out: HeldOutSet, loader: Iterable[dict], board: Board, stop: StopRequest
) -> tuple[float, HeldOut | None] | None:
    """The metric of held-out images with synthetic anomalies, and the scores of the good ones, on rank 0."""
    window = pooling_window(training.config.evaluator)
    scored = predict_maps(training.deployed, held_out, loader, training.run, window, stop=stop)
    if scored is None:
        return None
    if not scored.finite:
        return _diverged(training, "the held-out images"), None
    metrics = validation_metrics(scored)
    metrics["pixel_ap"] = scored.rankings()[1].average_precision() if scored.labels.any() else 0.0
    _report(training, metrics, "synthetic_", board)
    return key_metric(metrics, training.config.evaluator.key_metric), normal_part(scored, held_out.parts)


def normal_part(scored: ScoredImages, parts: dict[str, str]) -> HeldOut:
    """What the detector gives on the good ones of these images, by class.

    Args:
        parts: the part that an image shows, by file name, as far as it is known.
    """
    files, normal = {}, {}
    for name in sorted(set(scored.classes.tolist())):
        good = scored.subset(~scored.labels & (scored.classes == name))
        files[name] = [sample.filename for sample in good.samples]
        normal[name] = NormalScores.of(good.scores, good.maps, [parts.get(file, file) for file in files[name]])
    named = {file: parts[file] for names in files.values() for file in names if file in parts}
    return HeldOut(files, normal, *heat_range(scored.maps), parts=named)


def _diverged(training: Training, where: str) -> float:
    log.warning("epoch %d  the anomaly maps of %s hold values that are not finite", training.progress.epoch, where)
    return DIVERGED


def _report(training: Training, metrics: dict[str, float], prefix: str, board: Board) -> None:
    """Log the metrics of a validation: as text, to tensorboard, and as a line of JSON."""
    epoch, metrics = training.progress.epoch, {f"{prefix}{name}": value for name, value in metrics.items()}
    text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    log.info("epoch %d  %s", epoch, text or "validation: the test list lacks good or defective images")
    for name, value in metrics.items():
        board.add_scalar(f"validation/{name}", value, epoch)
    log_json(training, {"epoch": epoch, "step": training.progress.step, "validation": metrics})


def heat_map_sheet(scored: ScoredImages, shown: list[int]) -> np.ndarray:
    """Some test images with masks and heat maps, coloured from the median to the maximum of all maps."""
    low, high = heat_range(scored.maps)
    images = [scored.images[i] for i in shown]
    heat = [heat_overlay(scored.images[i], scored.maps[i], low, high) for i in shown]
    masks = [mask.astype(np.uint8) * 255 for mask in scored.masks[shown]]
    return contact_sheet([("test image", images), ("ground truth", masks), ("anomaly map", heat)])


def validation_metrics(scored: ScoredImages) -> dict[str, float]:
    """Image and pixel AUROC, without undefined ones."""
    known = scored.mask_known
    image = Ranking.of(scored.scores, scored.labels)
    pixel = Ranking.of(scored.maps[known].ravel(), scored.masks[known].ravel())
    metrics = {"image_auroc": image.auroc(), "pixel_auroc": pixel.auroc()}
    return {name: value for name, value in metrics.items() if value is not None}


def key_metric(metrics: dict[str, float], key: str) -> float:
    """The AUROC that evaluator.key_metric names (mean, image, pixel); if undefined, the mean of the defined ones."""
    if f"{key}_auroc" in metrics:
        return metrics[f"{key}_auroc"]
    # None is, if all masks are empty at the input size; 0 makes the newest checkpoint the best.
    defined = [metrics[name] for name in ("image_auroc", "pixel_auroc") if name in metrics]
    return float(np.mean(defined)) if defined else 0.0
