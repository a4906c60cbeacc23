"""Pairs of a good image with an anomaly that the diffusion model has drawn on it, and the mask of what has changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.anomaly import is_grey
from datasets.catalog import known_classes
from datasets.images import resize
from datasets.pairs import Pair, enlarged_mask, tries
from datasets.perlin import perlin_mask
from datasets.realnet import RealNetTrainSet
from models.sdas.edit import GoodImage, edit_images
from models.sdas.sampler import Sampler, image_seed, open_networks, set_up_sampler
from utils import distributed
from utils.choices import EDIT
from utils.config import load_config, plain
from utils.counts import counted
from utils.device import use_fast_kernels
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.files import sha256

ATTEMPTS = 5  # on one good image, until a change shows
IMAGES = 4  # good images in a row that are tried
STREAM = 2**30  # keeps the random numbers of masks apart from the training's, whose second part is the epoch


class EditPairs:
    """Makes pair i of a class: good image i modulo their number, edited inside a Perlin mask on the foreground.

    Where nothing shows, the same image is edited again with other random numbers, up to ATTEMPTS times, then the images
    after it. Images are not augmented, so that training can augment a pair together with its good image.

    Args:
        train_set: the good images, and how masks are drawn.
        indices: of the images of the class in the train set.
        full_size: whether to make pairs of the images' own sizes instead of the input size.
        sampler: the diffusion model. number: of the class.
        strength, depth: ranges [low, high], see edit.edit_images.
        heed: is called before each try, and may end it by an exception when the run is to stop.
    """

    def __init__(
        self,
        train_set: RealNetTrainSet,
        indices: Sequence[int],
        full_size: bool,
        sampler: Sampler,
        number: int,
        strength: Sequence[float],
        depth: Sequence[float],
        heed: Callable[[], object] = lambda: None,
    ) -> None:
        self.train_set, self.indices, self.full_size = train_set, list(indices), full_size
        self.sampler, self.number, self.strength, self.depth = sampler, number, strength, depth
        self.heed = heed

    def __call__(self, i: int) -> Pair:
        """Make a pair; it depends on the settings, the model, the seed and i only.

        Raises:
            RunError: nothing shows on IMAGES good images.
        """
        for epoch, index in tries(i, self.indices, IMAGES, ATTEMPTS):
            self.heed()
            pair = self._edited(epoch, index)
            if pair is not None:
                return pair
        first = self.train_set.samples[self.indices[i % len(self.indices)]].filename
        others = counted(min(IMAGES, len(self.indices)) - 1, "image")
        raise RunError(
            f"{first}: no edit shows on it or the {others} after it, in {ATTEMPTS} tries each; raise "
            "--depth or --strength, or is their foreground empty (dataset.foreground)?"
        )

    def _edited(self, epoch: int, index: int) -> Pair | None:
        train_set, sample = self.train_set, self.train_set.samples[index]
        image, foreground = train_set.read(index)
        rng = np.random.default_rng([train_set.seed, STREAM + epoch, index])
        scales = train_set.synthesis.min_perlin_scale, train_set.synthesis.perlin_scale
        mask = foreground * perlin_mask(*image.shape[:2], rng, *scales)
        if self.full_size:
            image = train_set.preprocessing.read_full(train_set.images.path(index))
            mask = enlarged_mask(mask, image.shape[:2])
        if not mask.any():
            return None
        grey = train_set.synthesis.match_grey and is_grey(image)
        seed = image_seed(train_set.seed, f"{sample.clsname}/{EDIT}/{epoch}", index)
        good = GoodImage(image, resize(image, self.sampler.size), mask, seed, grey)
        (edit,) = edit_images(self.sampler, self.number, [good], self.strength, self.depth)
        if not edit.mask.any():
            return None
        return Pair(edit.image, edit.mask, EDIT, sample.filename, 1.0, epoch, index, None, edit.strength, edit.depth)


@dataclass(frozen=True)
class Editing:
    """The diffusion model that edits good images, and how.

    Args:
        sampler: the model.
        classes: its classes, in the order of their numbers.
        strength, depth: ranges [low, high], see edit.edit_images.
        record: what edits depend on besides the good images; JSON values.
    """

    sampler: Sampler
    classes: list[str]
    strength: Sequence[float]
    depth: Sequence[float]
    record: dict[str, Any]

    def pairs(
        self,
        train_set: RealNetTrainSet,
        indices: Sequence[int],
        full_size: bool,
        name: str,
        heed: Callable[[], object] = lambda: None,
    ) -> EditPairs:
        """What makes the pairs of a class; arguments as for EditPairs.

        Raises:
            UsageError: the model does not know the class.
        """
        if name not in self.classes:
            raise UsageError(
                f"--source edit: the classes of the diffusion model are {', '.join(self.classes)}, not {name}"
            )
        number = self.classes.index(name)
        return EditPairs(train_set, indices, full_size, self.sampler, number, self.strength, self.depth, heed)


def set_up_editing(
    path: Path, dataset: str | None, strength: Sequence[float], depth: Sequence[float], run: Run
) -> Editing:
    """Load the diffusion model that a sample.yaml names.

    Args:
        path: of the sample.yaml.
        dataset: name of the data set, whose classes are known if it is one of the catalogue's.

    Raises:
        UsageError: the file or the model is missing, or its sampler has no use for a strength.
    """
    if not path.is_file():
        raise UsageError(f"--source edit: {path}, which names the diffusion model, does not exist")
    config = load_config(path, (), "sample")
    if config.sampler == "dpmpp_2m" and strength[1] > 0:
        text = "adds no noise, so a strength has no effect; set dpmpp_2m_sde there, or pass --strength 0 0"
        raise UsageError(f"{path}: sampler dpmpp_2m {text}")
    use_fast_kernels(run.device, config.tf32)
    networks, classes = open_networks(config, path, known_classes(dataset))
    model = {name: distributed.on_main(partial(sha256, checkpoint)) for name, (checkpoint, _) in networks.items()}
    keys = ("classifier_scale", "sampler", "amp", "dataset", "TestSampler")
    used = {key: value for key, value in plain(config).items() if key in keys}
    used["dataset"] = {key: used["dataset"][key] for key in ("H", "W")}
    record = {**used, "model": model, "strength": list(strength), "depth": list(depth)}
    return Editing(set_up_sampler(config, run, networks), classes, strength, depth, record)
