"""Pairs of an image with a synthetic anomaly and its mask: training's own draws, at the input or the full size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np

from datasets.realnet import Draw, RealNetTrainSet
from datasets.sdas_folders import SDASFolder
from datasets.synthesis import Anomaly
from utils.counts import counted
from utils.errors import RunError

ATTEMPTS = 20  # on one good image, until a draw changes something
IMAGES = 10  # good images in a row that are tried
LATER = 1_000_000  # epochs between two attempts, so that they are no other pair's


@dataclass(frozen=True)
class Pair:
    """An image with an anomaly, and where it comes from.

    Args:
        image: (H,W,3) uint8 RGB.
        mask: (H,W) uint8 in {0, 1}, not empty.
        type: of the anomaly.
        good: file name of the good image, as in its list.
        opacity: of the source over the good image, in [0, 1].
        epoch, index: of the draw (RealNetTrainSet.draw).
        source: file that the anomaly was made of; None if it was made of good images.
        strength: s of the diffusion process that drew the source, as far as it is known.
        depth: the share of its timesteps that it has noised the good image to; None if it did not begin with that.
    """

    image: np.ndarray
    mask: np.ndarray
    type: str
    good: str
    opacity: float
    epoch: int
    index: int
    source: Path | None = None
    strength: float | None = None
    depth: float | None = None


class TrainingPairs:
    """Makes pair i of a class: the sample that training draws for (epoch, index) = divmod(i, number of images).

    Where that draw changes nothing (an empty mask), the same image is drawn again as in an epoch far beyond those of
    training, up to ATTEMPTS times, then the images after it.

    At full size, the good image is blended at its own size. Outside of the mask, every pixel is the image's very pixel
    (but for the augmentation of the settings: flips, turns, jitter). It differs from the input size in this:
     - sdas, dtd: the mask of the input size is enlarged, with smooth borders; the source is read and augmented at the
       full size, where it has more detail.
     - cutpaste, self, noise: the same draw is made again of the full-size images. Lengths are shares of the image, so
       place and shape agree but for rounding, and for turned parts of an image whose aspect ratio is not the input's.

    All pixels are 8 bits RGB, as they are read for training (images.read_image).

    Args:
        train_set: the good images; its types have no `normal`.
        indices: of the images of the class in the train set.
        full_size: whether to make pairs of the images' own sizes instead of the input size.
    """

    def __init__(self, train_set: RealNetTrainSet, indices: Sequence[int], full_size: bool) -> None:
        self.train_set, self.indices, self.full_size = train_set, list(indices), full_size
        self.strengths = cache(lambda folder: SDASFolder(folder).strengths())

    def __call__(self, i: int) -> Pair:
        """Make a pair; it depends on the settings, the seed and i only.

        Raises:
            RunError: nothing can be drawn on IMAGES good images.
        """
        for epoch, index in tries(i, self.indices, IMAGES, ATTEMPTS):
            pair = self._drawn(epoch, index)
            if pair is not None:
                return pair
        first = self.train_set.samples[self.indices[i % len(self.indices)]].filename
        others = counted(min(IMAGES, len(self.indices)) - 1, "image")
        raise RunError(
            f"{first}: no anomaly shows on it or the {others} after it, in {ATTEMPTS} draws each; is their "
            "foreground empty (dataset.foreground; prepare_data.py --preview shows it)?"
        )

    def _drawn(self, epoch: int, index: int) -> Pair | None:
        train_set = self.train_set
        full = self._read(index) if self.full_size else None
        drawn = train_set.draw(epoch, index, full)
        anomaly, image = drawn.anomaly, drawn.image
        if anomaly is not None and self.full_size:
            anomaly, image = self._at_full_size(drawn, anomaly), drawn.full
        if anomaly is None:
            return None
        path = anomaly.file.path if anomaly.file else None
        strength = self.strengths(path.parent).get(path.name) if anomaly.type == "sdas" else None
        good, result = train_set.samples[index].filename, blended(anomaly, image)
        return Pair(result, anomaly.mask, anomaly.type, good, anomaly.opacity, epoch, index, path, strength)

    def _at_full_size(self, drawn: Draw, anomaly: Anomaly) -> Anomaly | None:
        """The anomaly for the image at its full size; None if nothing is left of its mask."""
        size = drawn.full.shape[:2]
        if anomaly.local is None:
            mask = enlarged_mask(anomaly.mask, size)
            source = anomaly.file.read(partial(self.train_set.preprocessing.read_full, size=size))
        else:
            other = drawn.full if drawn.other is None else self._read(drawn.other, size)
            source, mask = anomaly.local.make(drawn.full, other)
            mask = mask * enlarged_mask(drawn.foreground, size)
        if not mask.any():
            return None
        source = self.train_set.synthesis.matched(source, drawn.full)
        return replace(anomaly, source=source, mask=mask)

    def _read(self, index: int, size: Sequence[int] | None = None) -> np.ndarray:
        """A good image, (H,W,3) uint8, at its own or another size."""
        return self.train_set.preprocessing.read_full(self.train_set.images.path(index), size)


def tries(i: int, indices: Sequence[int], images: int, attempts: int) -> Iterator[tuple[int, int]]:
    """The (epoch, index) to draw pair i of: first that of divmod(i, number of indices), then the same image in epochs
    that are no other pair's, then the images after it.

    Args:
        indices: of the good images of a class.
        images: good images in a row that are tried.
        attempts: on each of them.

    Example:
        >>> list(tries(7, [10, 11, 12], images=2, attempts=2))
        [(2, 11), (1000002, 11), (2000002, 12), (3000002, 12)]
    """
    epoch, start = divmod(i, len(indices))
    for number in range(min(images, len(indices)) * attempts):
        yield epoch + number * LATER, indices[(start + number // attempts) % len(indices)]


def enlarged_mask(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A mask in {0, 1} at another size (height, width), where its linear interpolation is above 0.5."""
    if mask.shape == tuple(size):
        return mask
    values = cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return (values > 0.5).astype(np.uint8)


def blended(anomaly: Anomaly, image: np.ndarray) -> np.ndarray:
    """The image with the anomaly, (H,W,3) uint8, rounded; computed in the box of the mask only."""
    x, y, width, height = cv2.boundingRect(anomaly.mask)
    box = (slice(y, y + height), slice(x, x + width))
    part = replace(anomaly, source=anomaly.source[box], mask=anomaly.mask[box])
    result = image.copy()
    result[box] = np.clip(np.round(part.blend(image[box])), 0, 255).astype(np.uint8)
    return result
