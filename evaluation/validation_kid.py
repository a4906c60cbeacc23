"""How far a diffusion model's images are from the training images, at every validation."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.loaders import SharedBatches
from datasets.sdas import SDASDataset
from evaluation.image_features import (
    CALIBRATION_IMAGES,
    Extractor,
    Features,
    drawn_features,
    pictures_of,
    real_features,
    source_of,
    spaced,
)
from evaluation.image_quality import FEWEST, KernelDistance, comparable, kernel_distance
from models.sdas import SpacedDiffusion
from models.sdas.sampler import Sampler
from utils import distributed
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.log import Board, progress_bar
from utils.signals import StopRequest
from utils.training import Training
from utils.training_log import log_json

log = logging.getLogger("realnet")

FEWEST_OF_CLASS = 4  # drawn images
MOST_REAL = 200  # images of a class, evenly spaced in the list


class ValidationKID:
    """Measures the kernel distance of drawn images at each validation, averaged over the classes.

    Args:
        extractor: the network whose features are compared.
        train_set: the training images.
        total: drawn images at each strength, over all classes.
    """

    def __init__(self, extractor: Extractor, train_set: SDASDataset, total: int) -> None:
        self.extractor, self.train_set = extractor, train_set
        indices = {name: train_set.images.of_class(name) for name in train_set.numbers}
        self.indices = {name: spaced(found, MOST_REAL) for name, found in indices.items() if len(found) >= FEWEST}
        self.count = max(FEWEST_OF_CLASS, -(-total // max(1, len(self.indices))))
        self.real: dict[str, Features | None] = {}  # features of the training images, on rank 0

    @torch.no_grad()
    def measure(self, training: Training, strengths: Sequence[float], board: Board, stop: StopRequest) -> None:
        """Draw images at each strength with the averaged weights, and log their distances.

        A model that draws values which are not finite is reported; the training goes on.

        Raises:
            Stopped: a signal has arrived.
        """
        config, run, progress = training.config, training.run, training.progress
        process, size = SpacedDiffusion(**config.TestSampler), self.train_set.size
        # Grey images are drawn where grey ones are trained on, as sample.py does with color_mode: GRAY.
        grey = self.train_set.preprocessing.color_mode == "GRAY"
        sampler = _Tolerant(
            process,
            training.ema.model,
            None,
            "ancestral",
            training.precision,
            size,
            config.random_seed,
            run.device,
            grey=grey,
        )
        found: list[list[KernelDistance]] = []
        for name, indices in self.indices.items():
            if name not in self.real:
                batches = SharedBatches(len(indices), config.dataset.batch_size, run)
                shown = progress_bar(batches, run, f"{name}, real", stop=stop)
                self.real[name] = real_features(self.extractor, self.train_set, indices, shown)
            batches = SharedBatches(len(strengths) * self.count, config.dataset.batch_size, run)
            shown = progress_bar(batches, run, f"{name}, drawn", stop=stop)
            number = self.train_set.numbers[name]
            drawn = drawn_features(self.extractor, sampler, name, number, strengths, self.count, shown)
            real = self.real[name]
            if drawn is not None:
                reference = comparable(real, real)
                found.append([kernel_distance(comparable(features, real), reference) for features in drawn])
        failed = distributed.all_reduce_max(torch.tensor(float(sampler.failed)))
        if not run.is_main or not found:
            return
        if failed:
            log.warning("warning: epoch %d: KID is not measured, as the model draws infinite values", progress.epoch)
            return
        line: dict[str, float] = {}
        for s, distances in zip(strengths, zip(*found, strict=True), strict=True):
            mean = float(np.mean([distance.value for distance in distances]))
            error = math.sqrt(sum(distance.error**2 for distance in distances)) / len(distances)
            line |= {f"kid_s{s:g}": mean, f"kid_s{s:g}_error": error}
            board.add_scalar(f"validation/kid_s{s:g}", mean, progress.step)
        texts = [f"{line[f'kid_s{s:g}']:.3f} +- {line[f'kid_s{s:g}_error']:.3f} at s = {s:g}" for s in strengths]
        log.info("epoch %d  KID %s  (%d images of each class)", progress.epoch, ", ".join(texts), self.count)
        log_json(training, {"epoch": progress.epoch, "step": progress.step, "validation": line})


class _Tolerant(Sampler):
    """Draws black images, and remembers it, where the model draws values that are not finite: other ranks wait."""

    failed = False

    def draw(self, name: str, number: int, indices: Sequence[int], *strengths: torch.Tensor) -> np.ndarray:
        try:
            return super().draw(name, number, indices, *strengths)
        except RunError:
            self.failed = True
            return np.zeros((len(indices), *self.size, 3), np.uint8)


def set_up_kid(config: EasyDict, folder: Path, train_set: SDASDataset, run: Run) -> ValidationKID | None:
    """What measures KID at validations; None if trainer.val_kid_images is 0 or there is no network for it.

    Downloads nothing, draws no global random numbers, and never ends a training.

    Args:
        folder: of the settings, which may hold realnet.yaml.
    """
    if not config.trainer.val_kid_images:
        return None
    try:
        examples = (pictures_of(train_set, [i])[0] for i in spaced(range(len(train_set)), CALIBRATION_IMAGES))
        extractor = Extractor(source_of(config.features, folder), run.device, examples, download=False)
    except (UsageError, RunError) as error:
        log.info("validations will not measure KID (trainer.val_kid_images): %s", error)
        return None
    log.info("validations measure KID in features of %s", extractor.source.text)
    return ValidationKID(extractor, train_set, config.trainer.val_kid_images)
