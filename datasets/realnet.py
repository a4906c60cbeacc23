"""Pictures for RealNet: training samples with synthetic anomalies, and test pictures with their masks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.anomaly import augment_texture, blend
from datasets.catalog import ForegroundRule
from datasets.foreground import apply_rule, foreground_of
from datasets.images import (
    SharedCache,
    flip_and_rotate,
    list_pictures,
    normalize,
    picture_size,
    read_mask,
    read_picture,
    resize,
    same_proportions,
)
from datasets.lists import Sample, class_names
from datasets.perlin import perlin_mask
from utils.errors import UsageError

ANOMALY_TYPES = ("normal", "sdas", "dtd")


@dataclass(frozen=True)
class Appearance:
    """How pictures become tensors.

    Args:
        size: (height, width).
        mean, std: per channel, of RGB in [0, 1].
        color_mode: see images.read_picture.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color_mode: str = "RGB"

    def tensor(self, image: np.ndarray) -> torch.Tensor:
        return normalize(image, self.mean, self.std)


@dataclass(frozen=True)
class Synthesis:
    """How training anomalies are made.

    Args:
        anomaly_types: probability of each of normal, sdas, dtd.
        sdas_dir: folder of SDAS pictures; {} stands for the class.
        dtd_dir: folder of textures.
        sdas_transparency_range, dtd_transparency_range: of the opacity delta.
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

    def __post_init__(self) -> None:
        for name, probability in self.anomaly_types.items():
            if name not in ANOMALY_TYPES:
                raise UsageError(f"dataset.train.anomaly_types: {name!r} is not one of {', '.join(ANOMALY_TYPES)}")
            if not isinstance(probability, (int, float)) or probability < 0:
                raise UsageError(f"dataset.train.anomaly_types.{name}: {probability!r} is not a probability")
        if abs(sum(self.anomaly_types.values()) - 1) > 1e-6:
            raise UsageError(
                f"dataset.train.anomaly_types: the probabilities add up to {sum(self.anomaly_types.values())}"
            )

    def open(self, classes: Sequence[str]) -> None:
        """Find the source pictures of these classes.

        Raises:
            UsageError: a folder that an anomaly type needs is missing or empty.
        """
        if self.anomaly_types.get("dtd"):
            hint = "put the DTD textures there (data/README.md) or set dataset.train.anomaly_types without dtd"
            self.sources["dtd"] = _pictures(self.dtd_dir, "dtd_dir", hint)
        if self.anomaly_types.get("sdas"):
            hint = "run sample.py first, or set dataset.train.anomaly_types: {normal: 0.5, dtd: 0.5}"
            for name in classes:
                folder = self.sdas_dir.replace("{}", name) if self.sdas_dir else None
                self.sources[f"sdas/{name}"] = _pictures(folder, "sdas_dir", hint)

    def draw(
        self, types: dict[str, float], clsname: str, appearance: Appearance, rng: np.random.Generator
    ) -> tuple[np.ndarray, float] | None:
        """(source picture (H,W,3) uint8, opacity), or None for a normal sample."""
        names = list(types)
        chosen = names[int(rng.choice(len(names), p=list(types.values())))]
        if chosen == "normal":
            return None
        paths = self.sources["dtd" if chosen == "dtd" else f"sdas/{clsname}"]
        path = paths[int(rng.integers(len(paths)))]
        if chosen == "sdas":
            source = read_picture(path, appearance.size, appearance.color_mode)
            return source, float(rng.uniform(*self.sdas_transparency_range))
        texture = augment_texture(read_picture(path, color_mode=appearance.color_mode), rng)
        return resize(texture, appearance.size), float(rng.uniform(*self.dtd_transparency_range))


def _pictures(folder: str | None, setting: str, hint: str) -> list[Path]:
    found = list_pictures(folder) if folder else []
    if not found:
        raise UsageError(f"dataset.train.{setting}: {folder or 'not set'} holds no picture; {hint}")
    return found


class RealNetTrainSet(Dataset):
    """Normal pictures with synthetic anomalies. Keys are (epoch, index); a sample depends on (seed, epoch, index) only.

    Args:
        samples: the image list, good pictures.
        image_dir: what its names are relative to.
        dataset_type, foreground: see foreground.foreground_of.
        appearance, synthesis: see there.
        seed: of every draw.
        hflip, vflip, rotate: see images.flip_and_rotate.
        cache_mb: memory for resized pictures and their foregrounds.

    Yields:
        image, gt_image: (3,H,W) float32, anomalous and normal; mask: (1,H,W) float32 in {0, 1};
        changed: bool, whether the two pictures differ.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_dir: str | Path,
        dataset_type: str,
        foreground: str | dict | None,
        appearance: Appearance,
        synthesis: Synthesis,
        seed: int,
        hflip: bool = False,
        vflip: bool = False,
        rotate: bool = False,
        cache_mb: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.root = Path(image_dir)
        self.appearance, self.synthesis, self.seed = appearance, synthesis, seed
        self.augmentations = {"hflip": hflip, "vflip": vflip, "rotate": rotate}
        self.always_anomalous = False
        # The foreground mask rides in the cache as a fourth channel.
        self.cache = SharedCache(len(self.samples), (*appearance.size, 4), cache_mb)
        classes = class_names(self.samples)
        synthesis.open(classes)
        self.rules: dict[str, ForegroundRule | None] = {
            name: foreground_of(foreground, dataset_type, name, lambda name=name: self._some_pictures(name))
            for name in classes
        }

    def __len__(self) -> int:
        return len(self.samples)

    def anomalous_only(self) -> "RealNetTrainSet":
        """The same pictures, all with an anomaly, the configured types equally likely (for AFS). Shares the cache."""
        other = copy.copy(self)
        other.always_anomalous = True
        return other

    def _some_pictures(self, clsname: str, most: int = 32) -> list[np.ndarray]:
        mine = [sample for sample in self.samples if sample.clsname == clsname]
        step = max(1, len(mine) // most)
        return [self._read(sample) for sample in mine[::step][:most]]

    def _read(self, sample: Sample) -> np.ndarray:
        return read_picture(self.root / sample.filename, self.appearance.size, self.appearance.color_mode)

    def picture(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized picture (H,W,3) uint8 and its foreground (H,W) uint8 in {0, 1}."""
        kept = self.cache.get(index)
        if kept is not None:
            return kept[..., :3], kept[..., 3]
        image = self._read(self.samples[index])
        foreground = apply_rule(image, self.rules[self.samples[index].clsname])
        if self.cache.has_room(index):
            self.cache.put(index, np.dstack([image, foreground]))
        return image, foreground

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | bool]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        image, foreground = flip_and_rotate(self.picture(index), rng, **self.augmentations)
        anomalous, mask = self._synthesize(image, foreground, self.samples[index].clsname, rng)
        gt = self.appearance.tensor(image)
        changed = anomalous is not None
        return {
            "image": self.appearance.tensor(anomalous) if changed else gt,
            "gt_image": gt,
            "mask": torch.from_numpy(mask[None].astype(np.float32)),
            "changed": changed,
        }

    def _synthesize(
        self, image: np.ndarray, foreground: np.ndarray, clsname: str, rng: np.random.Generator
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """The anomalous picture (None where it stays normal) and its mask."""
        types = self.synthesis.anomaly_types
        if self.always_anomalous:
            others = [name for name, probability in types.items() if name != "normal" and probability > 0]
            types = {name: 1 / len(others) for name in others}
        drawn = self.synthesis.draw(types, clsname, self.appearance, rng)
        if drawn is None:
            return None, np.zeros(image.shape[:2], np.uint8)
        mask = foreground * perlin_mask(
            *image.shape[:2], rng, self.synthesis.min_perlin_scale, self.synthesis.perlin_scale
        )
        source, delta = drawn
        return (blend(image, source, mask, delta) if mask.any() else None), mask


class RealNetTestSet(Dataset):
    """Test pictures with ground truth.

    Yields:
        image: (3,H,W) float32; mask: (H,W) uint8 in {0, 1} (zeros where unknown); index.
    """

    def __init__(self, samples: Sequence[Sample], image_dir: str | Path, appearance: Appearance) -> None:
        self.samples = list(samples)
        self.root = Path(image_dir)
        self.appearance = appearance

    def __len__(self) -> int:
        return len(self.samples)

    def picture(self, index: int) -> np.ndarray:
        """The resized picture (H,W,3) uint8."""
        return read_picture(self.root / self.samples[index].filename, self.appearance.size, self.appearance.color_mode)

    def mask(self, index: int) -> np.ndarray:
        """The resized mask (H,W) uint8 in {0, 1}, zeros where it is not known.

        Raises:
            UsageError: it is unreadable, or of other proportions than the picture, so that of another one.
        """
        sample, size = self.samples[index], self.appearance.size
        if sample.maskname is None:
            return np.zeros(size, np.uint8)
        path, picture = self.root / sample.maskname, self.root / sample.filename
        mask_size, own_size = picture_size(path), picture_size(picture)
        if not same_proportions(mask_size, own_size):
            (h, w), (height, width) = mask_size, own_size
            raise UsageError(f"{path}: mask of {w}x{h} pixels for {picture}, which is {width}x{height}")
        return read_mask(path, size).copy()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return {
            "image": self.appearance.tensor(self.picture(index)),
            "mask": torch.from_numpy(self.mask(index)),
            "index": index,
        }
