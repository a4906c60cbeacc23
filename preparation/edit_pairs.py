"""Pairs of a good image with an anomaly that the diffusion model has drawn on it, and the mask of what has changed."""

from collections.abc import Sequence

import numpy as np

from datasets.anomaly import is_grey
from datasets.images import resize
from datasets.pairs import LATER, Pair, enlarged_mask
from datasets.perlin import perlin_mask
from datasets.realnet import RealNetTrainSet
from models.sdas.edit import GoodImage, edit_images
from models.sdas.sampler import Sampler, image_seed
from utils.errors import RunError

EDIT = "edit"  # the type of these anomalies
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
    ) -> None:
        self.train_set, self.indices, self.full_size = train_set, list(indices), full_size
        self.sampler, self.number, self.strength, self.depth = sampler, number, strength, depth

    def __call__(self, i: int) -> Pair:
        """Make a pair; it depends on the settings, the model, the seed and i only.

        Raises:
            RunError: nothing shows on IMAGES good images.
        """
        epoch, start = divmod(i, len(self.indices))
        images = min(IMAGES, len(self.indices))
        for number in range(images * ATTEMPTS):
            index = self.indices[(start + number // ATTEMPTS) % len(self.indices)]
            pair = self._edited(epoch + number * LATER, index)
            if pair is not None:
                return pair
        first = self.train_set.samples[self.indices[start]].filename
        raise RunError(
            f"{first}: no edit shows on it or the {images - 1} images after it, in {ATTEMPTS} tries each; raise "
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
