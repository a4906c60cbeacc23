"""Train RealNet on normal images of a class and synthetic anomalies.

    python train_realnet.py --dataset MVTec-AD --class_name bottle
    python train_realnet.py --dataset MVTec-AD --class_name all
    torchrun --nproc_per_node=2 train_realnet.py --dataset MVTec-AD --class_name bottle,cable
    python -m torch.distributed.launch --nproc_per_node=1 train_realnet.py --dataset MVTec-AD --class_name bottle

Settings: experiments/<dataset>/realnet.yaml. Writes, per class, to realnet_checkpoints/<class>/: ckpt_last.pth.tar to
resume from, and ckpt_best.pth.tar, which evaluator.select chooses. With held-out good images
(dataset.train.validation_fraction), ckpt_best_test is the best on the test list, and ckpt_best_synthetic the best on
these images with synthetic anomalies. Also realnet_log/<class>/, and a sheet of training samples to
realnet_vis/<class>/.
"""

import argparse

from utils import arguments


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    arguments.add_resume_options(parser)
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datasets.build import (
    build_held_out_set,
    build_realnet_test_set,
    build_realnet_train_set,
    check_realnet_data,
    hold_out,
    preprocessing_of,
)
from datasets.lists import chosen_classes, gives_metrics
from datasets.loaders import EpochBatches, SharedBatches, make_loader
from datasets.realnet import GoodImages, RealNetTestSet, RealNetTrainSet
from datasets.validation import HeldOutSet
from evaluation.selections import FILES, LAST, SYNTHETIC, TEST
from evaluation.thresholds import sidecar
from evaluation.trained_model import joined_names
from evaluation.validation import DIVERGED, SHEET_IMAGES, validate_held_out, validate_test
from models import build_realnet, check_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.realnet import RealNet
from models.subspace import Moments
from utils import cli, distributed
from utils.checkpoint import BEST, load_for_resume, refuse_earlier_run, save_checkpoint
from utils.checkpoint import LAST as NEWEST
from utils.choices import DISCRIMINATOR
from utils.config import collect_errors, load_config, plain
from utils.counts import counted
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.files import link_file
from utils.log import Board, log, progress_bar
from utils.optim import seed_step
from utils.pictures import contact_sheet, spread, write_image
from utils.precision import autocast
from utils.run_record import identity_of
from utils.saver import Saver
from utils.signals import StopRequest, stop_requests
from utils.training import (
    BEST_SYNTHETIC,
    STALE,
    Training,
    set_up_training,
    trainer_checks,
    training_folders,
)
from utils.training_log import report_step

CALIBRATION_BATCHES = 8
NORMAL_IMAGES = 48  # good training images that evaluator.score is measured on
FIGURES = {TEST: "best_metric", SYNTHETIC: BEST_SYNTHETIC}  # the best metrics so far, by selection


@dataclass(frozen=True)
class Folders:
    """Where the training of a class writes."""

    checkpoints: Path
    log: Path
    vis: Path

    @classmethod
    def of(cls, saver: EasyDict, experiment: Path, class_name: str) -> "Folders":
        return cls(*(experiment / saver[f"{name}_dir"] / class_name for name in ("checkpoints", "log", "vis")))


@dataclass(frozen=True)
class ClassImages:
    """What the detector of a class is trained and validated on.

    Args:
        train: good images, with synthetic anomalies.
        held_out: good images that are not trained on, plain and with anomalies; None if there are none.
        test: the images of the test list, which may be empty.
    """

    train: RealNetTrainSet
    held_out: HeldOutSet | None
    test: RealNetTestSet

    @property
    def tested(self) -> bool:
        """Whether the test list gives metrics."""
        return gives_metrics(self.test.samples)


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set, "realnet")
    classes = check(config, path, args.class_name)
    out = cli.experiment_dir(args)
    with distributed.session(args.device, identity_of(config, classes=classes)) as run, stop_requests(run) as stop:
        folders = {name: Folders.of(config.saver, out, name) for name in classes}
        for own in folders.values():
            # Said before the first class is trained, not hours later.
            distributed.on_main(lambda own=own: refuse_earlier_run(own.checkpoints, args.resume, args.overwrite))
        for name, own in folders.items():
            with training_folders("train_realnet", own.checkpoints, own.log, config, args, run) as board:
                train_class(config, name, own, run, board, args, stop)
        if any(len(build_realnet_test_set(config.dataset, name)) for name in classes):
            cli.log_next("evaluation_realnet.py", args)
        else:
            # Good images alone: nothing to evaluate on.
            log.info("Next: python %s", cli.predict_command(folders[classes[0]].checkpoints))


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the settings before anything is loaded or trained; returns the classes to train."""
    classes: list[str] = []

    def choose_classes() -> None:
        classes.extend(chosen_classes(class_name, config.dataset.train.meta_file))

    def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "--class_name", choose_classes
        yield "structure, net", lambda: check_realnet(config)
        yield "criterion", lambda: build_criterion(config.criterion, DETECTOR_LOSSES)
        yield from trainer_checks(config.trainer)
        yield "evaluator.select", lambda: check_selection(config)
        for name in classes:
            yield "dataset", lambda name=name: check_realnet_data(config.dataset, name)

    collect_errors(path, checks())
    return classes


def check_selection(config: EasyDict) -> None:
    """Check that evaluator.select has something to select by.

    Raises:
        UsageError: it has not.
    """
    select, fraction = config.evaluator.select, config.dataset.train.validation_fraction
    if select == SYNTHETIC and not fraction:
        raise UsageError(f"{SYNTHETIC} needs held-out good images; set dataset.train.validation_fraction, e.g. to 0.2")
    if select == LAST and config.trainer.patience is not None:
        raise UsageError(f"{LAST} leaves nothing to be patient for; set trainer.patience: null, or select {SYNTHETIC}")


def train_class(
    config: EasyDict,
    class_name: str,
    folders: Folders,
    run: Run,
    board: Board,
    args: argparse.Namespace,
    stop: StopRequest,
) -> None:
    """Train one detector: AFS first, then reconstruction and RRS together."""
    images = open_images(config, class_name, run, stop)
    select = selection(config, class_name, images.held_out is not None, images.tested)
    batches = EpochBatches(len(images.train), config.dataset.batch_size, run, config.random_seed)
    loader = make_loader(images.train, batches, config.dataset.workers, run)

    torch.manual_seed(config.random_seed)
    saved = load_for_resume(folders.checkpoints, run, args.resume)
    network = build_realnet(config, "checkpoint" if saved else None).to(run.device)
    if not saved:
        prepare_features(network, images.train, config, run, board, stop)
    freeze_untrained(network, config)
    training = set_up_detector(config, network, images, select, run)
    training.class_name = class_name
    training.steps_per_epoch = len(batches)
    training.json_log = folders.log / "train_realnet.jsonl"
    training.begin(saved, folders.checkpoints, args)

    criterion = build_criterion(config.criterion, DETECTOR_LOSSES)
    validations = validations_of(training, images, board, stop)
    saver = Saver(folders.checkpoints, training, stop)
    progress, metrics = training.progress, {}
    while not training.is_complete:
        batches.set_epoch(progress.epoch, progress.step_in_epoch)
        if not training.is_over:  # else a stopped run has only the last validation left
            sheet_path = folders.vis / "training_samples.png" if progress.step == 0 else None
            train_one_epoch(training, criterion, loader, board, saver, sheet_path)
        saver.after_epoch()
        if training.is_due(config.trainer.val_freq_epoch):
            with training.meter.paused(), saver.save_if_stopped():
                measure_normal(training, images.train, stop)
                metrics = validate(training, validations)
                keep_best(training, metrics, select, folders.checkpoints)
                saver.save_validated()
                if select == LAST:
                    link_newest(training, folders.checkpoints)
    report_end(training, metrics)


# ---- before the first step -------------------------------------------------------------------------------------------


def open_images(config: EasyDict, class_name: str, run: Run, stop: StopRequest) -> ClassImages:
    """The images of a class, or of several in one list."""
    seed = config.random_seed
    held_out = hold_out(config.dataset, class_name, seed, run, stop)
    train_set = build_realnet_train_set(config.dataset, class_name, seed, held_out)
    test_set = build_realnet_test_set(config.dataset, class_name)
    trained, tested = counted(len(train_set), "training image"), counted(len(test_set), "test image")
    log.info("%s: %s, %d held out, %s", class_name, trained, len(held_out), tested)
    held_out_set = build_held_out_set(config.dataset, class_name, train_set, held_out) if held_out else None
    return ClassImages(train_set, held_out_set, test_set)


def selection(config: EasyDict, class_name: str, held_out: bool, tested: bool) -> str:
    """What ckpt_best is selected by: evaluator.select, or what comes nearest if there are no images for that."""
    select = wanted = config.evaluator.select
    if wanted == TEST and not tested:
        select = SYNTHETIC if held_out else LAST
        log.info("%s: the test list gives no metric; ckpt_best is selected by: %s", class_name, select)
    elif wanted == SYNTHETIC and not held_out:
        select = LAST
        log.warning("%s: too few good images to hold some out; ckpt_best will be the last", class_name)
    return select


def prepare_features(
    network: nn.Module,
    train_set: RealNetTrainSet,
    config: EasyDict,
    run: Run,
    board: Board,
    stop: StopRequest,
) -> None:
    """Calibrate the backbone if its weights are random, and select channels (AFS)."""
    init_batches = afs_batches(config)
    batches = EpochBatches(len(train_set), config.dataset.batch_size, run, config.random_seed + 1)
    batches.epochs = -(-init_batches // len(batches))
    loader = make_loader(train_set.anomalous_only(), batches, config.dataset.workers, run)
    if network.backbone.needs_calibration:
        count = min(CALIBRATION_BATCHES, init_batches)
        bar = progress_bar(loader, run, "calibration", total=count, stop=stop)
        network.backbone.calibrate((batch["gt_image"].to(run.device, non_blocking=True) for batch in bar), count)
    bar = progress_bar(loader, run, "AFS", total=init_batches, stop=stop)
    subspaces = network.subspaces()
    moments = Moments() if subspaces else None
    losses = network.afs.init_indexes(network.backbone, bar, init_batches, moments)
    for name, loss in losses.items():
        kept = len(getattr(network.afs.indexes, name))
        log.info("AFS %s: kept %d of %d channels, loss %.4f .. %.4f", name, kept, len(loss), loss.min(), loss.max())
        board.add_scalar(f"afs/{name}_kept", kept, 0)
        board.add_histogram(f"afs/{name}_loss", loss[loss.isfinite()], 0)
    if moments is not None:
        for block, (mean, covariance) in network.afs.kept_moments(moments, network.backbone).items():
            for subspace in subspaces[block]:
                count = subspace.fit(mean, covariance)
                log.info("normal subspace of %s: %d of %d components", block, count, len(mean))


def afs_batches(config: EasyDict) -> int:
    """The number of batches that AFS looks at, net.afs.kwargs.init_bsn."""
    kwargs = next((part.get("kwargs") or {} for part in config.net if part["name"] == "afs"), {})
    return kwargs.get("init_bsn", 64)


def freeze_untrained(network: RealNet, config: EasyDict) -> None:
    """Freeze the part that no loss reaches, and warn; several ranks would wait for its gradients forever."""
    types = {entry["type"] for entry in config.criterion}
    if types == {"FeatureMSELoss"}:
        network.rrs.requires_grad_(False)
        log.warning(
            "warning: criterion: FeatureMSELoss alone does not train rrs, which is frozen; add SegmentCrossEntropyLoss"
        )
    elif "FeatureMSELoss" not in types and network.rrs.stop_grad:
        network.recon.requires_grad_(False)
        log.warning(
            "warning: criterion: nothing trains recon, which is frozen; add FeatureMSELoss, or set "
            "net.rrs.kwargs.stop_grad: False"
        )


def set_up_detector(config: EasyDict, network: RealNet, images: ClassImages, select: str, run: Run) -> Training:
    """The Training of a detector, with what its checkpoints hold and the figures that `select` needs."""
    # The checkpoint holds the settings, so that the detector needs no YAML; the weights hold AFS's channels.
    settings = {"arch": plain(config.net), "config": plain(config)}
    settings["trained_on"] = joined_names(sample.filename for sample in images.train.images.samples)
    lists, figures = (images.train.images.summary(), images.test.images.summary()), {FIGURES[TEST]: -1.0}
    if images.held_out is not None:
        figures[FIGURES[SYNTHETIC]] = -1.0
    if config.trainer.patience is not None and select != LAST:
        figures[STALE] = 0
    # What comes before sees as many distinct images as a batch happens to have; each number would be compiled anew.
    compiled = [network.recon, network.rrs]
    return set_up_training(config, network, run, settings, lists, figures, compiled=compiled)


# ---- an epoch --------------------------------------------------------------------------------------------------------


def train_one_epoch(
    training: Training,
    criterion: dict[str, nn.Module],
    loader: DataLoader,
    board: Board,
    saver: Saver,
    sheet_path: Path | None,
) -> None:
    """One pass over the images, or over the remaining ones if the epoch was resumed.

    Args:
        sheet_path: where to write a sheet of the first batch, or None.
    """
    run, progress = training.run, training.progress
    training.model.train()
    meter = training.meter
    for batch in meter.waiting_for(progress_bar(loader, run, f"epoch {progress.epoch + 1}")):
        if sheet_path is not None:
            show_samples(batch, training, board, sheet_path)
            sheet_path = None
        # `changed` stays on the CPU, so that indexing by it does not wait for the device.
        seed_step(training.config.random_seed, progress.step, run.rank)
        batch = {
            name: value if name == "changed" else value.to(run.device, non_blocking=True)
            for name, value in batch.items()
        }
        with autocast(run.device, training.precision):
            outputs = training.model(batch, train=True)
        losses = {name: loss(outputs) for name, loss in criterion.items()}
        del outputs  # Its features would stay until the end of the next forward pass.
        total = sum(losses.values())
        training.stepper.backward(total)
        training.finish_step()
        values = {name: value.detach() for name, value in losses.items()}
        meter.add({"loss": total.detach(), **values}, len(batch["image"]) * run.world_size)
        if progress.step % training.config.trainer.print_freq_step == 0:
            report_step(training, board)
        saver.after_step()
        if training.is_over:
            return


def show_samples(batch: dict[str, torch.Tensor], training: Training, board: Board, path: Path) -> None:
    """Write a sheet of images, their anomalous versions and masks."""
    if not training.run.is_main:
        return
    preprocessing = preprocessing_of(training.config.dataset)
    rows = []
    for caption, name in (("image", "gt_image"), ("with a synthetic anomaly", "image")):
        rows.append((caption, list(preprocessing.pictures(batch[name][:SHEET_IMAGES].numpy()))))
    masks = batch["mask"][:SHEET_IMAGES, 0].numpy()
    rows.append(("mask", list((masks * 255).astype(np.uint8))))
    sheet = contact_sheet(rows)
    write_image(path, sheet)
    board.add_image("train/samples", sheet, training.progress.step)
    log.info("training samples in %s", path)


# ---- validation and checkpoints --------------------------------------------------------------------------------------


def validations_of(
    training: Training, images: ClassImages, board: Board, stop: StopRequest
) -> dict[str, Callable[[], Any]]:
    """The validations that the images allow, by value of evaluator.select."""
    config, run, validations = training.config, training.run, {}
    if images.tested:
        loader = test_loader(images.test, config, run)
        validations[TEST] = partial(validate_test, training, images.test, loader, board, stop)
    if images.held_out is not None:
        loader = test_loader(images.held_out, config, run)
        validations[SYNTHETIC] = partial(validate_held_out, training, images.held_out, loader, board, stop)
    return validations


def test_loader(images: Dataset, config: EasyDict, run: Run) -> DataLoader:
    """Batches of a whole set, which do not depend on the number of ranks."""
    batches = SharedBatches(len(images), config.dataset.batch_size, run)
    return make_loader(images, batches, config.dataset.workers, run)


def measure_normal(training: Training, train_set: RealNetTrainSet, stop: StopRequest) -> None:
    """Measure what evaluator.score needs on some good training images: what the residual is where nothing is wrong.

    In float32, as the score is computed afterwards.
    """
    if training.config.evaluator.score == DISCRIMINATOR:
        return
    network, run = training.deployed, training.run
    chosen = GoodImages(train_set, spread([0] * len(train_set), NORMAL_IMAGES))
    batches = SharedBatches(len(chosen), training.config.dataset.batch_size, run)
    loader = make_loader(chosen, batches, 0, run)

    def outputs() -> Iterator[dict]:
        for batch in progress_bar(loader, run, "good images", stop=stop):
            yield network({"image": batch.to(run.device)})

    was_training = network.training
    network.eval()
    network.score.measure(outputs)
    network.train(was_training)


def validate(training: Training, validations: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Metrics of the network as it is, by value of evaluator.select; the same on all ranks."""
    metrics, held_out = {}, None
    for name, run_validation in validations.items():
        result = run_validation()
        if name == SYNTHETIC and result is not None:
            result, held_out = result
        metrics[name] = result
    metrics, content = distributed.broadcast((metrics, held_out.as_content() if held_out else None))
    training.measured = {} if content is None else {"held_out": content}
    return metrics


def keep_best(training: Training, metrics: dict[str, float], select: str, folder: Path) -> None:
    """Write ckpt_best_<selection> where the metric is at least as good as the best so far, and ckpt_best for `select`.

    Files of the same content are one file with several names. If `select` is all there is, ckpt_best is the only one.
    """
    figures, before, better = training.figures, training.figures.get(FIGURES.get(select)), []
    for name, metric in metrics.items():
        if metric >= figures[FIGURES[name]]:
            better.append(name)
        figures[FIGURES[name]] = max(metric, figures[FIGURES[name]])
    if STALE in figures:
        figures[STALE] = 0 if metrics[select] > before else figures[STALE] + 1
    paths = [folder / FILES[name] for name in better if set(metrics) != {select}]
    if select in better:
        paths.append(folder / BEST)
    if not training.run.is_main or not paths:
        return
    content = training.checkpoint()
    if training.ema is not None:
        # The averaged weights were validated, and are what evaluation and prediction use.
        content["state_dict"] = content.pop("ema_state_dict")
    save_checkpoint(paths[0], content)
    for path in paths[1:]:
        link_file(paths[0], path)
    for path in paths:
        forget_thresholds(path)
    values = ", ".join(f"{name} {metrics[name]:.4f}" for name in better)
    log.info("saved %s (%s)", " = ".join([str(paths[0]), *(path.name for path in paths[1:])]), values)


def link_newest(training: Training, folder: Path) -> None:
    """Make ckpt_best another name of ckpt_last, which holds the network as it is."""
    if training.run.is_main:
        link_file(folder / NEWEST, folder / BEST)
        forget_thresholds(folder / BEST)
        log.info("%s is %s", folder / BEST, NEWEST)


def forget_thresholds(checkpoint: Path) -> None:
    """Delete the thresholds beside a checkpoint that was replaced: they were chosen on other scores."""
    thresholds = sidecar(checkpoint)
    if thresholds.is_file():
        thresholds.unlink()
        log.info("%s belonged to the checkpoint before and is deleted; evaluate to have new ones", thresholds)


def report_end(training: Training, metrics: dict[str, float]) -> None:
    """Say why a training ended early; `metrics` are those of its last validation, if there was one.

    Raises:
        RunError: the anomaly maps of that validation are not finite.
    """
    config, name = training.config, training.class_name
    if metrics and training.out_of_patience:
        validations = counted(config.trainer.patience, "validation")
        text = "%s: ends after step %d: %s without a better checkpoint (trainer.patience)"
        log.info(text, name, training.progress.step, validations)
    if DIVERGED in metrics.values():
        raise RunError(
            f"{name}: the anomaly maps of the last validation are not finite; start anew with --overwrite and a "
            "lower trainer.optimizer.kwargs.lr"
        )


if __name__ == "__main__":
    cli.run(main)
