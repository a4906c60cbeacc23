"""Images for RealNet: training samples with synthetic anomalies, and test images with their masks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.catalog import ForegroundRule
from datasets.foreground import apply_rule
from datasets.images import Augmentation, Preprocessing, SharedCache, read_mask, read_size, same_aspect_ratio
from datasets.lists import ImageList, Sample
from datasets.synthesis import Anomaly, GoodFile, Synthesis
from utils.errors import UsageError


class CachedImages:
    """Good images, resized, with their foregrounds; what fits is decoded once.

    Args:
        images: list of good images.
        rules: the foreground rule of each class; None if the whole image is foreground.
        preprocessing: see its class.
        cache_mb: memory for the images and their foregrounds, in MiB, which loader workers share.
    """

    def __init__(
        self,
        images: ImageList,
        rules: dict[str, ForegroundRule | None],
        preprocessing: Preprocessing,
        cache_mb: int = 0,
    ) -> None:
        self.images, self.rules, self.preprocessing = images, rules, preprocessing
        # The foreground is cached with the image, as a fourth channel.
        self.cache = SharedCache(len(images), (*preprocessing.size, 4), max(0, cache_mb))

    @property
    def megabytes(self) -> int:
        """Memory of the cache in MiB, rounded up."""
        return -(-self.cache.items.numel() >> 20)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized image (H,W,3) uint8 and its foreground (H,W) uint8 in {0, 1}."""
        cached = self.cache.get(index)
        if cached is not None:
            return cached[..., :3], cached[..., 3]
        image = self.preprocessing.read(self.images.path(index))
        foreground = apply_rule(image, self.rules[self.images.samples[index].clsname])
        if self.cache.has_room(index):
            self.cache.put(index, np.dstack([image, foreground]))
        return image, foreground


@dataclass(frozen=True)
class Draw:
    """What a training sample is made of.

    Args:
        image: (H,W,3) uint8, augmented. foreground: (H,W) uint8 in {0, 1}.
        anomaly: None if the image stays normal.
        other: index of the second image that the anomaly is made of, if there is one.
        full: the image at another size, augmented in the same way, if it was given.
    """

    image: np.ndarray
    foreground: np.ndarray
    anomaly: Anomaly | None
    other: int | None
    full: np.ndarray | None


class RealNetTrainSet(Dataset):
    """Normal images with synthetic anomalies. Keys are (epoch, index); a sample depends on (seed, epoch, index) only.

    Args:
        cached: the good images.
        synthesis, augmentation: see their classes.
        seed: seeds every random draw.

    Yields:
        image, gt_image: (3,H,W) float32, anomalous and normal; mask: (1,H,W) float32 in {0, 1};
        changed: bool, whether the two images differ.
    """

    def __init__(self, cached: CachedImages, synthesis: Synthesis, augmentation: Augmentation, seed: int) -> None:
        self.cached, self.preprocessing = cached, cached.preprocessing
        self.synthesis, self.augmentation, self.seed = synthesis, augmentation, seed
        self.types: dict[str, float] | None = None  # in place of those of the synthesis
        self._of_class = {name: cached.images.of_class(name) for name in cached.rules}
        synthesis.open(list(cached.rules), tell=True)

    @property
    def images(self) -> ImageList:
        return self.cached.images

    @property
    def rules(self) -> dict[str, ForegroundRule | None]:
        """The foreground rule of each class."""
        return self.cached.rules

    @property
    def samples(self) -> list[Sample]:
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def anomalous_only(self) -> "RealNetTrainSet":
        """For AFS: the same images without the type normal, the other types equally likely. Shares the cache."""
        types = [name for name, share in self.synthesis.anomaly_types.items() if name != "normal" and share > 0]
        return self.of_types({name: 1 / len(types) for name in types})

    def of_types(self, types: dict[str, float]) -> "RealNetTrainSet":
        """The same images with these probabilities of the anomaly types. Shares the cache."""
        other = copy.copy(self)
        other.types = types
        return other

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized image (H,W,3) uint8 and its foreground (H,W) uint8 in {0, 1}."""
        return self.cached.read(index)

    def draw(self, epoch: int, index: int, full: np.ndarray | None = None) -> Draw:
        """Draw what a sample is made of.

        Args:
            full: the same image at another size.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        image, foreground = self.read(index)
        state = rng.bit_generator.state
        images = [image] if full is None else [image, full]
        *images, foreground = self.augmentation([*images, foreground], rng, images=len(images))
        others: list[int] = []

        def other() -> np.ndarray:
            others.append(self._other(index, rng))
            return self.read(others[-1])[0]

        def augmented(pair: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
            again = np.random.default_rng()
            again.bit_generator.state = state
            return self.augmentation([image, pair, mask], again, images=2)[1:]

        sample = self.samples[index]
        good = GoodFile(sample.filename, augmented)
        anomaly = self.synthesis.draw(
            images[0], foreground, sample.clsname, other, self.preprocessing, rng, self.types, good
        )
        return Draw(images[0], foreground, anomaly, others[0] if others else None, images[1] if images[1:] else None)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | bool]:
        drawn = self.draw(*key)
        gt, changed = self.preprocessing.tensor(drawn.image), drawn.anomaly is not None
        mask = drawn.anomaly.mask if changed else np.zeros(drawn.image.shape[:2], np.uint8)
        return {
            "image": self.preprocessing.tensor(drawn.anomaly.blend(drawn.image)) if changed else gt,
            "gt_image": gt,
            "mask": torch.from_numpy(mask[None].astype(np.float32)),
            "changed": changed,
        }

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """Another image of the same class; the same image if the class has no other."""
        *rest, last = self._of_class[self.samples[index].clsname]
        drawn = rest[int(rng.integers(len(rest)))] if rest else last
        return last if drawn == index else drawn


class GoodImages(Dataset):
    """Some images of a training set as they are.

    Args:
        indices: in the training set.

    Yields:
        (3,H,W) float32.
    """

    def __init__(self, train_set: RealNetTrainSet, indices: Sequence[int]) -> None:
        self.train_set, self.indices = train_set, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.train_set.preprocessing.tensor(self.train_set.read(self.indices[index])[0])


class RealNetTestSet(Dataset):
    """Test images with ground truth.

    Args:
        images: the image list.
        preprocessing: see Preprocessing.

    Yields:
        image: (3,H,W) float32; mask: (H,W) uint8 in {0, 1} (all zeros if unknown); index.
    """

    def __init__(self, images: ImageList, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    @property
    def samples(self) -> list[Sample]:
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """The resized image (H,W,3) uint8."""
        return self.preprocessing.read(self.images.path(index))

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """The mask (H,W) uint8 in {0, 1}, resized to `size` or to the input size; all zeros if it is unknown.

        Raises:
            UsageError: the mask is unreadable, or its aspect ratio differs from the image's.
        """
        size, maskname = size or self.preprocessing.size, self.samples[index].maskname
        if maskname is None:
            return np.zeros(size, np.uint8)
        path, image_path = self.images.image_dir / maskname, self.images.path(index)
        mask_size, image_size = read_size(path), read_size(image_path)
        if not same_aspect_ratio(mask_size, image_size):
            (h, w), (height, width) = mask_size, image_size
            raise UsageError(f"{path}: mask is {w}x{h} pixels, but {image_path} is {width}x{height}")
        return read_mask(path, size).copy()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return {
            "image": self.preprocessing.tensor(self.read(index)),
            "mask": torch.from_numpy(self.mask(index)),
            "index": index,
        }
