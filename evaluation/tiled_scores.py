"""Score as predict.py does: a test set in tiles, for figures, and held-out good images, for thresholds.

The thresholds then hold for the tiles, and for the precision.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from datasets.images import Preprocessing
from datasets.realnet import RealNetTestSet
from evaluation.detector import Detector, Tiles
from evaluation.normal_scores import NormalScores
from evaluation.score import ScoredImages
from utils import distributed
from utils.distributed import Run
from utils.errors import RunError
from utils.log import progress_bar
from utils.signals import StopRequest

MOST_PIXELS = 1_000_000  # of a map, of which a regular share is kept for the pixel threshold


def score_in_tiles(
    detector: Detector, test_set: RealNetTestSet, tiles: Tiles, run: Run, show: Collection[int], stop: StopRequest
) -> ScoredImages | None:
    """Score every image in tiles at its own size: the result on rank 0, None on other ranks.

    Args:
        show: indices of the images to keep for pictures, at the model's input size.

    Returns:
        Maps and masks at the images' own sizes; 16 bytes per pixel of the set are held.

    Raises:
        RunError: a map is not finite.
    """
    preprocessing, mine = test_set.preprocessing, range(run.rank, len(test_set), run.world_size)
    found: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}
    shown: dict[int, np.ndarray] = {}
    for index in progress_bar(mine, run, "test images in tiles", stop=stop):
        score, values = _scored(detector, preprocessing, test_set.images.path(index), tiles)
        found[index] = (score, values, test_set.mask(index, values.shape).astype(bool))
        if index in show:
            shown[index] = test_set.read(index)
    parts = distributed.gather((found, shown))
    if parts is None:
        return None
    every = {index: value for part, _ in parts for index, value in part.items()}
    pictures = {index: image for _, part in parts for index, image in part.items()}
    maps, masks = np.empty(len(test_set), object), np.empty(len(test_set), object)
    for index, (_, values, mask) in every.items():
        maps[index], masks[index] = values, mask
    scores = np.array([every[index][0] for index in range(len(test_set))])
    return ScoredImages(test_set.samples, maps, scores, masks, pictures)


def score_normals(
    detector: Detector,
    preprocessing: Preprocessing,
    files: Sequence[Path],
    names: Sequence[str],
    tiles: Tiles | None,
    run: Run,
    stop: StopRequest,
) -> NormalScores | None:
    """What good images give, whole or in tiles, on rank 0; None on other ranks.

    Args:
        names: the part that each image shows.

    Raises:
        UsageError: an image is not there any more, or cannot be read.
        RunError: a map is not finite.
    """
    mine, scores, pixels = slice(run.rank, None, run.world_size), [], []
    for file in progress_bar(files[mine], run, "held-out images", stop=stop):
        score, values = _scored(detector, preprocessing, file, tiles)
        scores.append(score)
        pixels.append(values.ravel()[:: -(-values.size // MOST_PIXELS)])
    ranks = distributed.gather((scores, pixels, names[mine]))
    if ranks is None:
        return None
    scores, pixels, shown = ([value for values in column for value in values] for column in zip(*ranks, strict=True))
    return NormalScores.of(np.array(scores), np.concatenate(pixels), shown)


def _scored(
    detector: Detector, preprocessing: Preprocessing, file: Path, tiles: Tiles | None
) -> tuple[float, np.ndarray]:
    """The image score, and the map at the image's own size."""
    detection = next(detector.detect([preprocessing.read_full(file)], tiles))
    if not detection.finite:
        raise RunError(f"{file}: its anomaly map is not finite; train the model again with a lower lr")
    return detection.score, detection.map
