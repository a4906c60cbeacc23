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
        seed: seeds the augmentation.
        cache_mb: memory for resized images, in MiB.

    Yields:
        image (3,H,W) float32 in [-1, 1]; label, the class number; index.
    """

    def __init__(
        self,
        images: ImageList,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        self.images, self.preprocessing, self.augmentation, self.seed = images, preprocessing, augmentation, seed
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.cache = SharedCache(len(images), (*preprocessing.size, 3), cache_mb)

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
            "image": self.preprocessing.tensor(image),
            "label": self.numbers[self.samples[index].clsname],
            "index": index,
        }
