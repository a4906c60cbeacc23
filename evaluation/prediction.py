"""The steps of a prediction, each in threads of its own: read images, score them, draw them, and write their lines."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from datasets.build import preprocessing_of
from datasets.images import count_pages, pixels_of
from evaluation.detector import NOT_FINITE, Detection, Detector, Tiles
from evaluation.inputs import Input
from evaluation.prediction_files import Pictures, Results
from utils.errors import RunError, UsageError
from utils.prefetch import PIXELS_AHEAD, groups, prefetch

PIXELS_DRAWN = 32_000_000  # of images that are drawn, or wait for it


@dataclass(frozen=True)
class ReadInput:
    """An input with its image (H,W,3) uint8, or None and the reason why it cannot be read."""

    source: Input
    image: np.ndarray | None
    problem: str = ""
    pages: int = 1


@dataclass(frozen=True)
class Scored:
    """An image with its detection, or with the reason why there is none; then its pictures, and their name."""

    read: ReadInput
    detection: Detection | None = None
    problem: str = ""
    name: str = ""
    pictures: Pictures | None = None

    @property
    def source(self) -> Input:
        return self.read.source


@dataclass(frozen=True)
class Predictor:
    """Scores images, and writes their results.

    Args:
        detector: with the thresholds of the verdicts.
        tiles: how to cut large images, or None to score whole images.
        batch: images, or tiles, in one forward pass.
        ahead: most images that are worked on before their turn; 0 where images arrive one by one, since waiting for the
            next one would delay the results of those before it.
    """

    detector: Detector
    tiles: Tiles | None
    batch: int
    ahead: int

    def run(self, inputs: Iterable[Input], results: Results) -> Generator[Scored, None, None]:
        """Each image, in order: its line is written, or it has a problem and no line."""
        images = prefetch(self._read, inputs, self.ahead, lambda source: pixels_of(source.path))
        scored = self._score(images)
        named = (item if item.problem else replace(item, name=results.name(item.source)) for item in scored)
        drawn = prefetch(
            lambda item: _draw(results, item),
            named,
            self.ahead,
            lambda item: _pixels(item.read),
            PIXELS_DRAWN,
            drain=True,
        )
        # Closed before the folder's lock is released: what threads still write is then whole, and no more is scored.
        with closing(scored), closing(drawn):
            for item in drawn:
                yield replace(item, problem=item.problem or _add(results, item))

    def _read(self, source: Input) -> ReadInput:
        try:
            image = preprocessing_of(self.detector.config.dataset).read_full(source.path)
            return ReadInput(source, image, pages=count_pages(source.path))
        except UsageError as error:
            return ReadInput(source, None, str(error))
        # Whatever one image raises must not end the run.
        except Exception as error:
            return ReadInput(source, None, f"{source.path}: {type(error).__name__}: {error}")

    def _score(self, images: Iterator[ReadInput]) -> Generator[Scored, None, None]:
        """Score images batch by batch."""
        # Tiles are batches of their own, so that one large image is held at a time.
        batches = groups(images, 1 if self.tiles else self.batch, _pixels, PIXELS_AHEAD)
        for scored in prefetch(
            self._score_batch,
            batches,
            self.detector.at_once + 1 if self.ahead else 0,
            lambda group: sum(map(_pixels, group)),
            threads=self.detector.at_once,
        ):
            yield from scored

    def _score_batch(self, group: list[ReadInput]) -> list[Scored]:
        """The results of images, in their order."""
        detections = iter(self._detect([item.image for item in group if item.image is not None]))
        scored = []
        for item in group:
            found = None if item.image is None else next(detections)
            if isinstance(found, Detection):
                scored.append(Scored(item, found) if found.finite else Scored(item, problem=NOT_FINITE))
            else:
                scored.append(Scored(item, problem=found or item.problem))
        return scored

    def _detect(self, images: list[np.ndarray]) -> list[Detection | str]:
        """The result of each image, or the reason why there is none."""
        if not images:
            return []
        try:
            return list(self.detector.detect(images, self.tiles))
        # Memory may be too small for the batch or for one image.
        except Exception as error:
            if len(images) == 1:
                return [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
        return [result for image in images for result in self._detect([image])]


def _pixels(item: ReadInput) -> int:
    return 0 if item.image is None else item.image.shape[0] * item.image.shape[1]


def _draw(results: Results, item: Scored) -> Scored:
    """Write the pictures of an image that was scored."""
    if item.problem:
        return item
    try:
        return replace(item, pictures=results.draw(item.name, item.read.image, item.detection))
    except (RunError, UsageError):
        # The folder cannot be written to, which holds for all images.
        raise
    except Exception as error:
        return replace(item, problem=f"{type(error).__name__}: {error}".splitlines()[0])


def _add(results: Results, item: Scored) -> str:
    """Write the line of an image; returns what is wrong with it, if anything."""
    try:
        results.add(item.source, item.read.image, item.detection, item.pictures)
    except (RunError, UsageError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
