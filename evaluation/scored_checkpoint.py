"""A checkpoint's scores on a test list, and the thresholds that come from them or from its held-out good images."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import preprocessing_of
from datasets.loaders import SharedBatches, make_loader
from datasets.realnet import RealNetTestSet
from evaluation.detector import Detector, Tiles
from evaluation.normal_scores import TARGET_FPR
from evaluation.results import ClassResult, evaluate_class
from evaluation.score import ScoredImages, at_input_size, at_own_sizes, pooling_window, predict_maps
from evaluation.thresholds import (
    Thresholds,
    heat_range,
    of_normals,
    read_thresholds,
    sidecar,
    thresholds_of,
    write_thresholds,
)
from evaluation.tiled_scores import score_in_tiles, score_normals
from evaluation.trained_model import TrainedModel, load_trained
from utils.checkpoint import has_finite_weights
from utils.choices import BEST_RULE, HELD_OUT_RULE
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.log import log
from utils.precision import FP32, cast_weights
from utils.signals import StopRequest


@dataclass(frozen=True)
class Options:
    """What an evaluation's command line asks for beyond the settings.

    Args:
        rule: what thresholds are chosen by, one of RULES; None: held-out images if there are some, or else the list.
        target_fpr: the share of false alarms, 0 .. 1, that they are chosen by.
        pro_limit: the highest false positive rate in PRO, 0 .. 1.
        gallery: the number of test images of each class in the report.
        pictures: the format of the picture of each test image, one of FORMATS.
        other_checkpoint: the checkpoint is not the class's ckpt_best.
        full_size: pixel metrics at the images' own sizes.
        tiles: how images are cut into tiles; None: scored whole.
        precision: of the forward passes, one of FORWARD_PRECISIONS.
    """

    rule: str | None
    target_fpr: float | None
    pro_limit: float
    gallery: int
    pictures: str
    other_checkpoint: bool
    full_size: bool
    tiles: Tiles | None
    precision: str

    @property
    def for_predict(self) -> str:
        """The options with which predict.py scores images in the same way, each after a space."""
        tiles = f" --tile {self.tiles.size} --overlap {self.tiles.overlap}" if self.tiles else ""
        return tiles + ("" if self.precision == FP32 else f" --precision {self.precision}")

    @property
    def measure_note(self) -> str:
        """At which size the pixel metrics are taken, and in which precision."""
        return self._size_note + ("" if self.precision == FP32 else f" The forward passes ran in {self.precision}.")

    @property
    def _size_note(self) -> str:
        if self.tiles:
            return f"Images were scored in tiles of {self.tiles.name}; pixel metrics are at the images' own sizes."
        where = "the images' own sizes (--full-size)" if self.full_size else "the model's input size"
        return f"Pixel metrics compare maps and masks at {where}."


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A checkpoint's model with what it gives on a test list; on other ranks than 0, the model alone.

    Args:
        trained: the model.
        pictured: its maps at its input size, for pictures.
        measured: its maps at the size for pixel metrics.
        held_out: the thresholds of held-out good images; None if the list shall give them.
    """

    trained: TrainedModel
    pictured: ScoredImages | None
    measured: ScoredImages | None
    held_out: Thresholds | None

    def evaluate(self, name: str, chosen: np.ndarray, options: Options) -> ClassResult:
        """The result of a class, whose images a mask (N,) chooses."""
        thresholds = None if self.held_out is None else self.held_out.classes.get(name, self.held_out)
        return evaluate_class(name, self.measured.subset(chosen), options.target_fpr, options.pro_limit, thresholds)


def score_checkpoint(
    checkpoint: Path,
    config: EasyDict,
    test_set: RealNetTestSet,
    run: Run,
    options: Options,
    pictured: Collection[int],
    stop: StopRequest,
) -> ScoredCheckpoint:
    """Load a checkpoint, and score the test list and, where thresholds need it, its held-out good images.

    Args:
        pictured: indices of the images to keep for pictures.

    Raises:
        UsageError: see check_threshold_options.
        RunError: weights or maps are not finite.
    """
    torch.manual_seed(config.random_seed)
    trained = load_trained(checkpoint, config)
    check_threshold_options(trained, checkpoint, options)
    test_set = RealNetTestSet(test_set.images, preprocessing_of(trained.config.dataset))
    if options.tiles:
        detector = Detector.of(trained, None, run.device, options.precision)
        measured = score_in_tiles(detector, test_set, options.tiles, run, pictured, stop)
        scored = None if measured is None else at_input_size(measured, test_set)
    else:
        batches = SharedBatches(len(test_set), config.dataset.batch_size, run)
        loader = make_loader(test_set, batches, config.dataset.workers, run)
        window, model = pooling_window(trained.config.evaluator), trained.network.to(run.device)
        cast_weights(model, options.precision)
        scored = predict_maps(model, test_set, loader, run, window, options.precision, pictured, stop)
        if scored is not None and not (scored.finite and has_finite_weights(model)):
            raise RunError(f"{checkpoint}: its weights or anomaly maps are not finite; train it again with a lower lr")
        resized = options.full_size and scored is not None
        measured = at_own_sizes(scored, test_set, run, stop) if resized else scored
    image_dir = Path(config.dataset.image_reader.kwargs.image_dir)
    own = held_out_thresholds(trained, image_dir, run, options, stop)
    return ScoredCheckpoint(trained, scored, measured, own)


def check_threshold_options(trained: TrainedModel, checkpoint: Path, options: Options) -> None:
    """Before anything is scored.

    Raises:
        UsageError: the checkpoint's held-out good images cannot give the thresholds that are asked for.
    """
    if trained.held_out is None:
        if options.rule == HELD_OUT_RULE:
            raise UsageError(
                f"--threshold-rule {HELD_OUT_RULE}: {checkpoint} has no held-out good images; train it with "
                "dataset.train.validation_fraction, e.g. 0.2"
            )
    elif options.rule != BEST_RULE and options.target_fpr == 0:
        raise UsageError("--target-fpr 0: held-out good images can promise no such rate; pass one above 0, e.g. 0.01")


def held_out_thresholds(
    trained: TrainedModel, image_dir: Path, run: Run, options: Options, stop: StopRequest
) -> Thresholds | None:
    """The thresholds that held-out good images give; None if there are none, or if the list shall give them.

    On other ranks than 0, always None.

    Args:
        image_dir: the folder of the held-out images, for tiles or another precision than that of the checkpoint.
    """
    if options.rule == BEST_RULE or trained.held_out is None:
        return None
    target, held_out = options.target_fpr or TARGET_FPR, trained.held_out
    if options.tiles is None and options.precision == held_out.precision:
        return trained.own_thresholds(target) if run.is_main else None
    detector = Detector.of(trained, None, run.device, options.precision)
    preprocessing = preprocessing_of(trained.config.dataset)
    normals = {}
    for name, files in held_out.files.items():
        paths = [image_dir / file for file in files]
        normals[name] = score_normals(detector, preprocessing, paths, held_out.parts_of(name), options.tiles, run, stop)
    return of_normals(normals, target, held_out.low, held_out.high, trained.fingerprint) if run.is_main else None


def thresholds_on_list(
    scored: ScoredImages, results: list[ClassResult], options: Options, fingerprint: str, chosen_on: str
) -> Thresholds:
    """The thresholds from the evaluated list: for all images, and for each class if the model serves several."""
    if len(results) == 1:
        thresholds = replace(results[0].thresholds, class_name=results[0].name)
    else:
        # The thresholds for all images are for new images of unknown class.
        rankings = scored.rankings()
        thresholds = thresholds_of(scored.scores, scored.maps, scored.labels, *rankings, options.target_fpr)
        thresholds = replace(thresholds, classes={result.name: result.thresholds for result in results})
    return replace(thresholds, fingerprint=fingerprint, chosen_on=chosen_on)


def thresholds_to_save(
    scored: ScoredCheckpoint, checkpoint: Path, results: list[ClassResult], options: Options, chosen_on: str
) -> Thresholds:
    """What the sidecar shall hold: thresholds of held-out images, with the list's range of heat maps, or of the list.

    With tiles, they stand beside those for whole images that are there.
    """
    trained, chosen = scored.trained, scored.held_out
    if chosen is None:
        chosen = thresholds_on_list(scored.measured, results, options, trained.fingerprint, chosen_on)
    else:
        low, high = heat_range(scored.measured.maps)
        classes = {result.name: result.thresholds for result in results} if chosen.classes else {}
        chosen = replace(chosen, low=low, high=high, classes={**chosen.classes, **classes})
    chosen = chosen.measured_in(options.precision)
    if options.tiles is None:
        return chosen
    none = Thresholds(None, None, "none for whole images", class_name=chosen.class_name)
    whole = trained.thresholds(checkpoint) or none
    return replace(whole.with_tiled(options.tiles.name, chosen), fingerprint=trained.fingerprint)


def save_thresholds(checkpoint: Path, thresholds: Thresholds, options: Options) -> None:
    """Write the sidecar.

    An evaluation of a checkpoint on another list does not replace the thresholds from the model's own test list.
    """
    before = None
    with suppress(UsageError):  # a broken file is replaced
        before = read_thresholds(checkpoint)
    same_model = before is not None and before.fingerprint == thresholds.fingerprint
    if same_model and options.other_checkpoint and before.chosen_on not in ("", thresholds.chosen_on):
        text = "%s was chosen on %s and is kept; delete it to have the thresholds of %s"
        log.warning(text, sidecar(checkpoint), before.chosen_on, thresholds.chosen_on)
        return
    if same_model:
        thresholds = thresholds.keeping_tiles(before)
    path = write_thresholds(checkpoint, thresholds)
    log.info("thresholds in %s: %s", path, thresholds.rule)
