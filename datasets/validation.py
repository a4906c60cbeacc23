"""Good images that training leaves out: as they are, and with synthetic anomalies that are the same in every run."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.lists import Sample
from datasets.realnet import CachedImages
from datasets.synthesis import Synthesis

FOLDER = "synthetic"  # of the names of images with an anomaly: synthetic/<type>/<file name>
FEWEST_ANOMALIES = 24
ATTEMPTS = 20  # to draw an anomaly that lies on the foreground
STREAM = 2**31  # keeps these random numbers apart from the training's, whose second part is the epoch


class HeldOutSet(Dataset):
    """Every held-out image as it is, and at least 24 images with an anomaly, whose types take turns.

    An anomaly depends on the seed and on its place in the set only, so that validations of a run compare.

    Args:
        cached: the good images.
        synthesis: see its class.
        types: the anomaly types that take turns, also such as training does not draw.
        seed: of the random draws.
        parts: the part that an image shows, by file name, as far as it is known.

    Yields:
        image: (3,H,W) float32; mask: (H,W) uint8 in {0, 1}; index.
    """

    def __init__(
        self,
        cached: CachedImages,
        synthesis: Synthesis,
        types: Sequence[str],
        seed: int,
        parts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.parts = dict(parts)
        self.cached, self.images, self.preprocessing = cached, cached.images, cached.preprocessing
        self.synthesis, self.seed = synthesis, seed
        images = self.images
        rounds = -(-FEWEST_ANOMALIES // max(1, len(images)))
        drawn = [
            (index, types[(turn + index) % len(types)], turn) for turn in range(rounds) for index in range(len(images))
        ]
        # Whether one can be drawn depends on the image; the labels have to be known before.
        self.anomalies = [place for place in drawn if self._anomaly(*place) is not None]
        self.samples = [*images.samples, *(self._sample(*place) for place in self.anomalies)]

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int, kind: str, turn: int) -> Sample:
        source = self.images.samples[index]
        name = f"{FOLDER}/{kind}/{turn}_{source.filename.replace('/', '_')}"
        return Sample(name, 1, source.clsname, maskname=name)

    def read(self, index: int) -> np.ndarray:
        """A held-out image (H,W,3) uint8, resized."""
        return self.cached.read(index)[0]

    def _anomaly(self, index: int, kind: str, turn: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The image with an anomaly, (H,W,3) float32 in [0, 255], and its mask; None if none can be drawn on it."""
        (image, foreground), clsname = self.cached.read(index), self.images.samples[index].clsname
        others = self.images.of_class(clsname)
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, STREAM, index, turn, attempt])

            def other(rng: np.random.Generator = rng) -> np.ndarray:
                return self.read(others[int(rng.integers(len(others)))])

            drawn = self.synthesis.draw(image, foreground, clsname, other, self.preprocessing, rng, {kind: 1.0})
            if drawn is not None:
                return drawn.blend(image), drawn.mask
        return None

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        if index < len(self.images):
            image = self.read(index)
            mask = np.zeros(image.shape[:2], np.uint8)
        else:
            image, mask = self._anomaly(*self.anomalies[index - len(self.images)])
        return {"image": self.preprocessing.tensor(image), "mask": torch.from_numpy(mask), "index": index}
