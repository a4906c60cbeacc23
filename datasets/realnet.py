"""Images for RealNet: training samples with synthetic anomalies, and test images with their masks."""

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.anomaly import augment_texture, blend
from datasets.catalog import ForegroundRule
from datasets.folders import FoundImages, find_images, not_read
from datasets.foreground import apply_rule
from datasets.images import (
    Augmentation,
    Preprocessing,
    SharedCache,
    header_problem,
    read_mask,
    read_size,
    resize,
    same_aspect_ratio,
)
from datasets.lists import ImageList, Sample
from datasets.perlin import perlin_mask
from utils.errors import UsageError

log = logging.getLogger("realnet")

THREADS = 16  # that open source images: most of the time is spent waiting for the disk
ATTEMPTS = 20  # source images in a row that may turn out to be broken while they are decoded


@dataclass(frozen=True)
class Synthesis:
    """How training anomalies are made.

    Args:
        anomaly_types: probability of each of normal, sdas, dtd.
        sdas_dir: folder of SDAS images; {} stands for the class.
        dtd_dir: folder of textures.
        sdas_transparency_range, dtd_transparency_range: (low, high) of the opacity delta.
        min_perlin_scale, perlin_scale: see perlin.perlin_mask.
    """

    anomaly_types: dict[str, float]
    sdas_dir: str | None = None
    dtd_dir: str | None = None
    sdas_transparency_range: Sequence[float] = (0.5, 1.0)
    dtd_transparency_range: Sequence[float] = (0.2, 1.0)
    min_perlin_scale: int = 0
    perlin_scale: int = 6
    sources: dict[str, list[Path]] = field(default_factory=dict, init=False, compare=False)

    def open(self, classes: Sequence[str], tell: bool = False) -> None:
        """Find the source images for these classes; those that cannot be read are left out.

        Args:
            tell: whether to log what is left out.

        Raises:
            UsageError: a folder that an anomaly type needs is missing, empty, or holds broken images only.
        """
        if self.anomaly_types.get("dtd"):
            hint = "put the DTD textures there (data/README.md) or set dataset.train.anomaly_types without dtd"
            self.sources["dtd"] = _source_images(self.dtd_dir, "dtd_dir", hint, tell)
        if self.anomaly_types.get("sdas"):
            hint = "run sample.py first, or set dataset.train.anomaly_types: {normal: 0.5, dtd: 0.5}"
            for name in classes:
                folder = self.sdas_dir.replace("{}", name) if self.sdas_dir else None
                self.sources[f"sdas/{name}"] = _source_images(folder, "sdas_dir", hint, tell)

    def draw(
        self, types: dict[str, float], clsname: str, preprocessing: Preprocessing, rng: np.random.Generator
    ) -> tuple[np.ndarray, float] | None:
        """Draw (source image (H,W,3) uint8, opacity), or None for a normal sample."""
        names = list(types)
        # numpy wants a sum of 1 to 1.5e-8; settings may be rounded to 1e-6.
        probabilities = np.array(list(types.values())) / sum(types.values())
        chosen = names[int(rng.choice(len(names), p=probabilities))]
        if chosen == "normal":
            return None
        paths = self.sources["dtd" if chosen == "dtd" else f"sdas/{clsname}"]
        index = int(rng.integers(len(paths)))
        if chosen == "sdas":
            source = _first_readable(paths, index, preprocessing.read)
            return source, float(rng.uniform(*self.sdas_transparency_range))
        texture = augment_texture(_first_readable(paths, index, preprocessing.read_full), rng)
        return resize(texture, preprocessing.size), float(rng.uniform(*self.dtd_transparency_range))


def _source_images(folder: str | None, setting: str, hint: str, tell: bool) -> list[Path]:
    """The images in a folder whose headers can be read."""
    found = find_images(folder) if folder else None
    if found is None or not found.images:
        missing = "holds no image" if folder and Path(folder).is_dir() else "does not exist"
        problem = f"{folder} {missing}" if folder else "not set"
        others = not_read(found.others) if found else ""
        raise UsageError(f"dataset.train.{setting}: {problem}{f' ({others})' if others else ''}; {hint}")
    problems = _header_problems(tuple(found.images))
    readable = [path for path, problem in zip(found.images, problems, strict=True) if problem is None]
    broken = [problem for problem in problems if problem is not None]
    if not readable:
        raise UsageError(f"dataset.train.{setting}: no image in {folder} can be read ({broken[0]}); {hint}")
    if tell:
        _tell_left_out(f"dataset.train.{setting}", len(problems), broken, found)
    return readable


def _tell_left_out(setting: str, count: int, broken: list[str], found: FoundImages) -> None:
    if broken:
        more = f"\n  and {len(broken) - 3} more" if len(broken) > 3 else ""
        lines = "".join(f"\n  {problem}" for problem in broken[:3])
        text = "%s: %d of %d images cannot be read and are left out:%s%s"
        log.warning(text, setting, len(broken), count, lines, more)
    if found.others:
        log.warning("%s: %s", setting, not_read(found.others))
    for path, reason in found.closed:
        log.warning("%s: %s cannot be opened (%s)", setting, path, reason)


@cache
def _header_problems(paths: tuple[Path, ...]) -> list[str | None]:
    """The header_problem of each image. Kept, because settings are checked before the data set is built."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(header_problem, paths, chunksize=64))


def _first_readable(paths: Sequence[Path], index: int, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The image at `index`, or the next one that can be decoded, so that a broken one does not end the training.

    Raises:
        UsageError: the next ATTEMPTS images are all broken.
    """
    for step in range(ATTEMPTS):
        path = paths[(index + step) % len(paths)]
        try:
            return read(path)
        except UsageError as error:
            _warn_once(str(error))
    raise UsageError(f"{paths[index]} and the {ATTEMPTS - 1} images after it cannot be read; are they still there?")


@cache
def _warn_once(text: str) -> None:
    log.warning("%s; the next image is used instead", text)


class RealNetTrainSet(Dataset):
    """Normal images with synthetic anomalies. Keys are (epoch, index); a sample depends on (seed, epoch, index) only.

    Args:
        images: list of good images.
        rules: the foreground rule of each class; None if the whole image is foreground.
        preprocessing, synthesis, augmentation: see their classes.
        seed: seeds every random draw.
        cache_mb: memory for resized images and their foregrounds, in MiB.

    Yields:
        image, gt_image: (3,H,W) float32, anomalous and normal; mask: (1,H,W) float32 in {0, 1};
        changed: bool, whether the two images differ.
    """

    def __init__(
        self,
        images: ImageList,
        rules: dict[str, ForegroundRule | None],
        preprocessing: Preprocessing,
        synthesis: Synthesis,
        augmentation: Augmentation,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        self.images, self.rules, self.preprocessing = images, rules, preprocessing
        self.synthesis, self.augmentation, self.seed = synthesis, augmentation, seed
        self.always_anomalous = False
        # The foreground mask is cached with the image, as a fourth channel.
        self.cache = SharedCache(len(images), (*preprocessing.size, 4), cache_mb)
        synthesis.open(list(rules), tell=True)

    @property
    def samples(self) -> list[Sample]:
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def anomalous_only(self) -> "RealNetTrainSet":
        """For AFS: the same images without the type normal, the other types equally likely. Shares the cache."""
        other = copy.copy(self)
        other.always_anomalous = True
        return other

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized image (H,W,3) uint8 and its foreground (H,W) uint8 in {0, 1}."""
        cached = self.cache.get(index)
        if cached is not None:
            return cached[..., :3], cached[..., 3]
        image = self.preprocessing.read(self.images.path(index))
        foreground = apply_rule(image, self.rules[self.samples[index].clsname])
        if self.cache.has_room(index):
            self.cache.put(index, np.dstack([image, foreground]))
        return image, foreground

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | bool]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        image, foreground = self.augmentation(self.read(index), rng)
        anomalous, mask = self._synthesize(image, foreground, self.samples[index].clsname, rng)
        gt = self.preprocessing.tensor(image)
        changed = anomalous is not None
        return {
            "image": self.preprocessing.tensor(anomalous) if changed else gt,
            "gt_image": gt,
            "mask": torch.from_numpy(mask[None].astype(np.float32)),
            "changed": changed,
        }

    def _synthesize(
        self, image: np.ndarray, foreground: np.ndarray, clsname: str, rng: np.random.Generator
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """The anomalous image (None if it stays normal) and its mask."""
        types = self.synthesis.anomaly_types
        if self.always_anomalous:
            others = [name for name, probability in types.items() if name != "normal" and probability > 0]
            types = {name: 1 / len(others) for name in others}
        source_and_opacity = self.synthesis.draw(types, clsname, self.preprocessing, rng)
        if source_and_opacity is None:
            return None, np.zeros(image.shape[:2], np.uint8)
        mask = foreground * perlin_mask(
            *image.shape[:2], rng, self.synthesis.min_perlin_scale, self.synthesis.perlin_scale
        )
        source, delta = source_and_opacity
        return (blend(image, source, mask, delta) if mask.any() else None), mask


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

    def mask(self, index: int) -> np.ndarray:
        """The resized mask (H,W) uint8 in {0, 1}, all zeros if it is unknown.

        Raises:
            UsageError: the mask is unreadable, or its aspect ratio differs from the image's.
        """
        size, maskname = self.preprocessing.size, self.samples[index].maskname
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
