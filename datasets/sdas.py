"""Pictures for the diffusion model and the classifier: images in [-1, 1] with their class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import SharedCache, flip_and_rotate, normalize, read_picture
from datasets.lists import Sample


class SDASDataset(Dataset):
    """Keys are (epoch, index); a sample depends on (seed, epoch, index) only.

    Args:
        samples: the image list.
        image_dir: what its names are relative to.
        classes: class names in the order of their numbers.
        size: (height, width).
        seed: of the augmentations.
        hflip, vflip, rotate: see images.flip_and_rotate.
        cache_mb: memory for resized pictures.

    Yields:
        image (3,H,W) float32 in [-1, 1]; label, the class number; index.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_dir: str | Path,
        classes: Sequence[str],
        size: Sequence[int],
        seed: int,
        hflip: bool = False,
        vflip: bool = False,
        rotate: bool = False,
        cache_mb: int = 0,
        color_mode: str = "RGB",
    ) -> None:
        self.samples = list(samples)
        self.root = Path(image_dir)
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.size = tuple(size)
        self.seed = seed
        self.augmentations = {"hflip": hflip, "vflip": vflip, "rotate": rotate}
        self.color_mode = color_mode
        self.cache = SharedCache(len(self.samples), (*self.size, 3), cache_mb)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        epoch, index = key
        image = self.cache.get(index)
        if image is None:
            image = read_picture(self.root / self.samples[index].filename, self.size, self.color_mode)
            self.cache.put(index, image)
        rng = np.random.default_rng([self.seed, epoch, index])
        (image,) = flip_and_rotate([image], rng, **self.augmentations)
        return {
            "image": normalize(image, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            "label": self.numbers[self.samples[index].clsname],
            "index": index,
        }
