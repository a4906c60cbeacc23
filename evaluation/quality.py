"""What `sample.py --quality` does: draw images over the strength s, and compare them with the training images."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import good_images_of_sdas
from datasets.loaders import SharedBatches
from datasets.sdas import SDASDataset
from evaluation.image_features import (
    CALIBRATION_IMAGES,
    Extractor,
    drawn_features,
    gathered,
    pictures_of,
    real_features,
    source_of,
    spaced,
)
from evaluation.quality_report import text_of, write_quality
from evaluation.quality_rows import FEWEST_DRAWN, FEWEST_REAL, NOISE, Row, class_rows, name_of
from models.sdas.pictures import to_pictures
from models.sdas.sampler import Sampler, image_seed
from utils import distributed
from utils.checkpoint import trained_checkpoint
from utils.config import plain, pretrained_path
from utils.counts import counted
from utils.distributed import Run
from utils.errors import UsageError
from utils.files import remove_parts
from utils.lock import folder_lock
from utils.log import Board, progress_bar
from utils.signals import StopRequest

log = logging.getLogger("realnet")


@dataclass
class Quality:
    """Measures how close drawn images are to the training images.

    Args:
        sampler: draws the images.
        extractor: the network whose features are compared.
        real: the training images, at the size of the drawn ones.
        folder: where tables and plots are written.
        identity: what the numbers depend on; what was measured with the same is not measured again.
        strengths: of the drawn images.
        count: images drawn at each strength.
        batch: images at once, per rank.
    """

    sampler: Sampler
    extractor: Extractor
    real: SDASDataset
    run: Run
    folder: Path
    identity: dict[str, Any]
    strengths: Sequence[float]
    count: int
    batch: int

    def check(self, classes: Iterable[str]) -> None:
        """Check that classes can be measured.

        Raises:
            UsageError: a class has too few training images.
        """
        for name in classes:
            found = len(self.real.images.of_class(name))
            if found < FEWEST_REAL:
                images = counted(found, "training image")
                text = f"{images}, but --quality needs at least {FEWEST_REAL}; see --class_name"
                raise UsageError(f"{name}: {text}")

    def report(self, classes: Mapping[str, int], overwrite: bool, board: Board, stop: StopRequest) -> None:
        """Measure classes, given with their numbers, one after the other; the files are written after each.

        Args:
            classes: which `check` has accepted.
            overwrite: also measure classes that are in the files already.

        Raises:
            Stopped: a signal has arrived; the same command goes on with the class that was interrupted.
        """
        with folder_lock(self.folder, self.run):
            if self.run.is_main:
                remove_parts(self.folder)
            measured = distributed.on_main(self._measured)
            note = f"{self.count} images of each strength, in features of {self.extractor.source.text}"
            log.info("%s", note)
            for name, number in classes.items():
                kept = name in measured and not overwrite
                if not kept:
                    measured[name] = self.measure(name, number, stop)
                if self.run.is_main:
                    write_quality(self.folder, self.identity, measured, self.strengths, note)
                    self._show(name, measured[name], kept, board)
            log.info("tables and plots: %s", self.folder / "quality.html")

    def _measured(self) -> dict[str, dict[str, Row]]:
        """The classes that an earlier run has measured, if all that the numbers depend on is the same."""
        try:
            content = json.loads((self.folder / "quality.json").read_text(encoding="utf-8"))
            return dict(content["classes"]) if content["of"] == json.loads(json.dumps(self.identity)) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def measure(self, name: str, number: int, stop: StopRequest) -> dict[str, Row]:
        """The rows of a class, on rank 0; nothing on other ranks. Ranks share the images."""

        def shared(length: int, what: str) -> Any:
            batches = SharedBatches(length, self.batch, self.run)
            return progress_bar(batches, self.run, f"{name}, {what}", stop=stop)

        indices = self.real.images.of_class(name)
        real = real_features(self.extractor, self.real, indices, shared(len(indices), "training images"))
        size, seed = self.sampler.size, self.sampler.seed
        noisy = gathered(
            {batch[0]: self.extractor([noise(size, seed, i) for i in batch]) for batch in shared(self.count, "noise")}
        )
        batches = shared(len(self.strengths) * self.count, "drawn images")
        drawn = drawn_features(self.extractor, self.sampler, name, number, self.strengths, self.count, batches)
        if real is None or noisy is None or drawn is None:
            return {}
        named = {name_of(s): features for s, features in zip(self.strengths, drawn, strict=True)}
        return class_rows(real, {**named, NOISE: noisy}, seed)

    def _show(self, name: str, rows: dict[str, Row], kept: bool, board: Board) -> None:
        """Show a class in the terminal, and in tensorboard, where a step is a hundredth of s."""
        log.info("%s%s\n%s", name, " (measured before; --overwrite measures again)" if kept else "", text_of(rows))
        for s in self.strengths:
            for key, value in rows[name_of(s)].items():
                board.add_scalar(f"quality_{key}/{name}", value, round(100 * s))


def set_up_quality(
    sampler: Sampler, run: Run, config: EasyDict, experiment: Path, strengths: Sequence[float], count: int
) -> Quality:
    """Load the network whose features are compared, and find the training images.

    Args:
        config: the settings of sample.yaml.
        experiment: the folder of the settings: diffusion.yaml names the training images, realnet.yaml the network
            (unless the section `features` names one).
        strengths, count: of the drawn images.

    Raises:
        UsageError: too few images, or the settings of training images or network are missing.
        RunError: the weights of the network are missing.
    """
    if count < FEWEST_DRAWN:
        raise UsageError(f"--quality-images {count}: at least {FEWEST_DRAWN}")
    real = good_images_of_sdas(experiment, sampler.size, sampler.seed, "--quality compares with")
    source = source_of(config.features, experiment)
    examples = spaced(range(len(real)), CALIBRATION_IMAGES)
    extractor = Extractor(source, run.device, (pictures_of(real, [i])[0] for i in examples))
    networks = [config[section] for section in ("unet", "classifier") if config[section] is not None]
    identity = {
        "checkpoints": [_file_of(trained_checkpoint(pretrained_path(network))) for network in networks],
        "sampler": sampler.method,
        "TestSampler": plain(config.TestSampler),
        "classifier_scale": config.classifier_scale,
        "random_seed": sampler.seed,
        "start_depth": config.start_depth,
        "color_mode": config.color_mode,
        "size": list(sampler.size),
        "precision": sampler.precision,
        "training_images": real.images.summary(),
        "features": source.text,
        "strengths": list(strengths),
        "images": count,
    }
    folder = experiment / config.saver.vis_dir / "quality"
    return Quality(sampler, extractor, real, run, folder, identity, strengths, count, config.dataset.batch_size)


def _file_of(path: Path) -> list[str | int]:
    """By which a file is known again: path, size and time of its last change."""
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def noise(size: tuple[int, int], seed: int, index: int) -> np.ndarray:
    """What a sampler begins with, as an image (H,W,3) uint8."""
    generator = torch.Generator().manual_seed(image_seed(seed, NOISE, index))
    return to_pictures(torch.randn(1, 3, *size, generator=generator))[0]
