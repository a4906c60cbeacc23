"""Features of images for image_quality.py: of the detector's own backbone, or of one that the settings name."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from torch.utils.data import Dataset

from datasets.build import preprocessing_of
from datasets.images import Preprocessing, resize
from models.backbones import Backbone, missing_weights
from models.realnet import parse_structure
from models.sdas.sampler import Sampler
from models.structures import NORMALIZATIONS, structure_of
from utils import distributed
from utils.config import load_config, plain
from utils.device import to_device
from utils.errors import RunError, UsageError

log = logging.getLogger("realnet")

BATCH = 16
CALIBRATION_IMAGES = 64  # that measure the BatchNorm statistics of random weights
Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Which network's features are compared, and how it sees an image.

    Args:
        backbone, weights: as for models.backbones.Backbone.
        layers: names of the layers.
        preprocessing: of its input.
    """

    backbone: str
    weights: str
    layers: Sequence[str]
    preprocessing: Preprocessing

    @property
    def text(self) -> str:
        size, grey = self.preprocessing.size, ", grey" if self.preprocessing.color_mode == "GRAY" else ""
        where = f"at {size[0]}x{size[1]}{grey}, weights {self.weights}"
        return f"{self.backbone}'s {', '.join(self.layers)} {where}"


def source_of(features: EasyDict, folder: Path) -> Source:
    """The network that the settings' section `features` names, or the detector's, from realnet.yaml in a folder.

    Raises:
        UsageError: it names none and there is no realnet.yaml, or no layers are known for it.
    """
    if features.backbone is None:
        return _detector_source(folder / "realnet.yaml")
    if features.layers:
        layers = list(features.layers)
    else:
        try:
            layers = [layer["idx"] for block in structure_of(features.backbone) for layer in block["layers"]]
        except UsageError as error:
            text = str(error).replace("--backbone", "features.backbone:", 1)
            raise UsageError(f"{text}; or name its layers in features.layers") from None
    mean, std = NORMALIZATIONS[features.normalization]
    return Source(features.backbone, features.weights, layers, Preprocessing(tuple(features.input_size), mean, std))


def _detector_source(path: Path) -> Source:
    if not path.is_file():
        advice = "write it with prepare_data.py, or name a network: --set features.backbone=squeezenet1_1"
        raise UsageError(f"{path} does not exist, whose backbone would compare the images; {advice}")
    config = load_config(path, script="realnet")
    kwargs = next((part.kwargs for part in config.net if part.name == "backbone"), None)
    if kwargs is None:
        raise UsageError(f"{path}: net has no part named backbone")
    layers = dict.fromkeys(layer for block in parse_structure(plain(config.structure)) for layer, _ in block.layers)
    return Source(kwargs.backbone, kwargs.get("weights", "auto"), list(layers), preprocessing_of(config.dataset))


class Extractor:
    """Turns images into features, averaged over positions. Draws no global random numbers.

    Args:
        source: the network.
        device: where it runs.
        examples: images that random weights are calibrated on; the same on all ranks.
        download: whether weights that are not in pretrain/ may be downloaded.

    Raises:
        UsageError: the network or its weights file does not fit.
        RunError: the weights are missing.
    """

    def __init__(
        self, source: Source, device: torch.device, examples: Iterable[np.ndarray] = (), download: bool = True
    ) -> None:
        missing = None if download or source.weights != "auto" else missing_weights(source.backbone)
        if missing:
            raise RunError(missing)
        self.source, self.device = source, device
        # A network begins with random weights. They are the same every time, and leave other draws as they are.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            backbone = Backbone(source.backbone, source.layers, source.weights)
        self.backbone = backbone.to(device)
        if backbone.needs_calibration:
            images = list(examples)[:CALIBRATION_IMAGES]
            batches = [self._input(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
            backbone.calibrate(batches, len(batches))

    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        """(H,W,3) uint8 RGB images of any sizes -> {layer: (N,C) float32}."""
        parts = []
        for start in range(0, len(images), BATCH):
            maps = self.backbone.maps(self._input(images[start : start + BATCH]))
            parts.append({layer: values.mean(dim=(2, 3)).float().cpu().numpy() for layer, values in maps.items()})
        return joined(parts)

    def _input(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The images as the detector would read them from files, (N,3,H,W) on the device."""
        preprocessing = self.source.preprocessing
        if preprocessing.color_mode == "GRAY":
            images = [np.repeat(np.asarray(Image.fromarray(i).convert("L"))[..., None], 3, axis=2) for i in images]
        tensors = [preprocessing.tensor(resize(image, preprocessing.size)) for image in images]
        return to_device(torch.stack(tensors), self.device)


def spaced(indices: Sequence[int], most: int) -> list[int]:
    """At most this many of the indices, evenly spaced."""
    return [indices[int(k)] for k in np.linspace(0, len(indices) - 1, min(most, len(indices)))]


def joined(parts: Sequence[Features]) -> Features:
    """Features of several batches as those of one."""
    return {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]}


def selected(features: Features, rows: Sequence[int] | slice) -> Features:
    """The features of some of the images."""
    return {layer: values[rows] for layer, values in features.items()}


def pictures_of(dataset: Dataset, indices: Sequence[int]) -> list[np.ndarray]:
    """Images of an SDAS data set as they are trained on in the first epoch, (H,W,3) uint8 RGB at its size."""
    return [dataset.preprocessing.pictures(dataset[0, i]["image"][None].numpy())[0] for i in indices]


def gathered(parts: dict[int, Features]) -> Features | None:
    """On rank 0, the features of all ranks' batches, in the order of their numbers; on other ranks, None."""
    everything = distributed.gather(parts)
    if everything is None:
        return None
    batches = {number: features for part in everything for number, features in part.items()}
    return joined([batches[number] for number in sorted(batches)])


def real_features(extractor: Extractor, dataset: Dataset, indices: Sequence[int], batches: Iterable) -> Features | None:
    """Features of real images on rank 0, None elsewhere.

    Args:
        batches: SharedBatches over the indices, perhaps in a progress bar.
    """
    return gathered({b[0]: extractor(pictures_of(dataset, [indices[i] for i in b])) for b in batches})


def drawn_features(
    extractor: Extractor, sampler: Sampler, name: str, number: int, strengths: Sequence[float], count: int,
    batches: Iterable,
) -> list[Features] | None:  # fmt: skip
    """Features of `count` drawn images of a class for each strength, on rank 0; None elsewhere.

    The images of all strengths begin with the same random numbers.

    Args:
        batches: SharedBatches over len(strengths) * count numbers, perhaps in a progress bar.
    """
    parts = {}
    for batch in batches:
        s = torch.tensor([strengths[i // count] for i in batch])
        parts[batch[0]] = extractor(list(sampler.draw(name, number, [i % count for i in batch], s, s)))
    features = gathered(parts)
    if features is None:
        return None
    return [selected(features, slice(k * count, (k + 1) * count)) for k in range(len(strengths))]
