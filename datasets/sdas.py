"""Images for the diffusion model and the classifier: scaled to [-1, 1], with their class."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import Augmentation, Preprocessing, SharedCache
from datasets.lists import ImageList, Sample


class SDASDataset(Dataset):
    """Images with their class. Keys are (epoch, index); a sample depends on (seed, epoch, index) only.

    Args:
        images: the image list.
        classes: class names in the order of the class numbers.
        preprocessing: scales images to [-1, 1].
        augmentation: random flips and turns.
        seed: seeds the augmentation, and the places of the crops.
        cache_mb: memory for resized images, in MiB.
        crop: (height, width) of the part of the resized image that is used; None for all of it.
        centred: take the centre instead of a random place.

    Yields:
        image (3,H,W) float32 in [-1, 1], of `size`; label, the class number; index.
    """

    def __init__(
        self,
        images: ImageList,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        cache_mb: int = 0,
        crop: Sequence[int] | None = None,
        centred: bool = False,
    ) -> None:
        self.images, self.preprocessing, self.augmentation, self.seed = images, preprocessing, augmentation, seed
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.cache = SharedCache(len(images), (*preprocessing.size, 3), cache_mb)
        self.size = tuple(crop or preprocessing.size)
        self.centred = centred

    @property
    def samples(self) -> list[Sample]:
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        epoch, index = key
        image = self.cache.get(index)
        if image is None:
            image = self.preprocessing.read(self.images.path(index))
            self.cache.put(index, image)
        rng = np.random.default_rng([self.seed, epoch, index])
        (image,) = self.augmentation([image], rng)
        return {
            "image": self.preprocessing.tensor(self._part(image, rng)),
            "label": self.numbers[self.samples[index].clsname],
            "index": index,
        }

    def _part(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The part (H,W,3) of an image that has `size`."""
        spare = [side - wanted for side, wanted in zip(image.shape, self.size, strict=False)]
        if not any(spare):
            return image  # without a draw, as that would change the random numbers of runs without crops
        top, left = (side // 2 if self.centred else int(rng.integers(side + 1)) for side in spare)
        return image[top : top + self.size[0], left : left + self.size[1]]
