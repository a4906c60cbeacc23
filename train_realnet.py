"""Train RealNet on normal pictures of a class with synthetic anomalies.

    python train_realnet.py --dataset MVTec-AD --class_name bottle
    python train_realnet.py --dataset MVTec-AD --class_name all
    torchrun --nproc_per_node=2 train_realnet.py --dataset MVTec-AD --class_name bottle,cable
    python -m torch.distributed.launch --nproc_per_node=1 train_realnet.py --dataset MVTec-AD --class_name bottle

Settings: experiments/<dataset>/realnet.yaml. Writes, per class, realnet_checkpoints/<class>/ckpt_best.pth.tar (and
ckpt_last.pth.tar to resume from), realnet_log/<class>/, and a sheet of training samples to realnet_vis/<class>/.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import nn
from torch.utils.data import DataLoader

from datasets.lists import UNIFIED, listed_classes
from datasets.loaders import (
    EpochBatches,
    SharedBatches,
    build_realnet_test_set,
    build_realnet_train_set,
    check_realnet_data,
    make_loader,
)
from datasets.realnet import RealNetTestSet, RealNetTrainSet
from evaluation.metrics import Ranking, image_scores
from evaluation.score import GatheredMaps, avgpool_size, score_test_set
from models import build_realnet, check_realnet
from models.losses import build_criterion
from utils import cli, distributed
from utils.checkpoint import save_checkpoint
from utils.config import check_together, load_config, plain
from utils.distributed import Run, autocast
from utils.errors import UsageError
from utils.lock import exclusive
from utils.log import Meter, log, progress, set_up_logging
from utils.optim import Stepper, build_optimizer, precision_of, seed_step
from utils.pictures import contact_sheet, heat_overlay, spread, to_uint8, write_image
from utils.resume import resumable
from utils.signals import StopRequest, stop_requests
from utils.training import Saver, Training, report_step, trainer_checks

CALIBRATION_BATCHES = 8
SHEET_PICTURES = 8


@dataclass
class RealNetTraining(Training):
    """With the best metric so far."""

    best_metric: float = -1.0


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--resume", action="store_true", help="go on from ckpt_last.pth.tar of each class")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set)
    classes = check(config, path, args.class_name)
    out = cli.experiment_dir(args)
    with distributed.session(args.device) as run, stop_requests(run) as stop:
        for class_name in classes:
            board = set_up_logging(run, out / config.saver.log_dir / class_name, "train_realnet")
            with exclusive(out / config.saver.checkpoints_dir / class_name, run):
                train_class(config, class_name, run, out, board, args.resume, stop)
            board.close()


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Find what is wrong with the settings before anything is loaded or trained; returns the classes to train."""
    classes: list[str] = []

    def choose() -> None:
        classes.extend(cli.chosen_classes(class_name, config.dataset.train.meta_file, listed_classes, UNIFIED))

    def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "--class_name", choose
        yield "structure, net", lambda: check_realnet(config)
        yield "net.afs.kwargs.init_bsn", lambda: afs_batches(config)
        yield "criterion", lambda: build_criterion(config.criterion)
        yield "evaluator", lambda: (avgpool_size(config.evaluator), key_metric({}, config.evaluator.key_metric))
        yield from trainer_checks(config.trainer)
        for name in classes:
            yield "dataset", lambda name=name: check_realnet_data(config.dataset, name)

    check_together(path, checks())
    return classes


def train_class(
    config: EasyDict, class_name: str, run: Run, out: Path, board: Any, resume: bool, stop: StopRequest
) -> None:
    """Train one detector: AFS first, then reconstruction and RRS together."""
    seed = config.random_seed
    train_set = build_realnet_train_set(config.dataset, class_name, seed)
    test_set = build_realnet_test_set(config.dataset, class_name)
    log.info("%s: %d training pictures, %d test pictures", class_name, len(train_set), len(test_set))
    if not len(test_set):
        log.info("%s: the test list is empty: no validation; ckpt_best will be the newest", class_name)
    batches = EpochBatches(len(train_set), config.dataset.batch_size, run, seed)
    loader = make_loader(train_set, batches, config.dataset.workers, run)
    test_batches = SharedBatches(len(test_set), config.dataset.batch_size, run)
    test_loader = make_loader(test_set, test_batches, config.dataset.workers, run)
    checkpoints = out / config.saver.checkpoints_dir / class_name

    torch.manual_seed(seed)
    resumed = resumable(checkpoints, run, resume)
    network = build_realnet(config, "checkpoint" if resumed else None).to(run.device)
    if not resumed:
        prepare_features(network, train_set, config, run, board)
    training = set_up_training(config, network, run)
    if resumed:
        restore(training, resumed, checkpoints)

    criterion = build_criterion(config.criterion)
    position = training.position
    every = config.trainer.save_freq_step
    saver = Saver(checkpoints, run, stop, every, training.stepper, lambda: training.resumable(checkpoint_of(training)))
    sheet_path = out / config.saver.vis_dir / class_name / "training_samples.png"
    for epoch in range(position.epoch, config.trainer.max_epoch):
        batches.set_epoch(epoch, position.step_in_epoch)
        train_one_epoch(training, criterion, loader, board, saver, sheet_path if position.step == 0 else None)
        position.finish_epoch()
        if position.epoch % config.trainer.val_freq_epoch == 0 or position.epoch == config.trainer.max_epoch:
            metric = validate(training, test_set, test_loader, board)
            if run.is_main:
                save_best(training, metric, checkpoints)
            saver.save()


def prepare_features(network: nn.Module, train_set: RealNetTrainSet, config: EasyDict, run: Run, board: Any) -> None:
    """Calibrate random weights where they are asked for, and select channels (AFS)."""
    init_batches = afs_batches(config)
    batches = EpochBatches(len(train_set), config.dataset.batch_size, run, config.random_seed + 1)
    batches.epochs = -(-init_batches // len(batches))
    loader = make_loader(train_set.anomalous_only(), batches, config.dataset.workers, run)
    if network.backbone.needs_calibration:
        gt_images = (batch["gt_image"].to(run.device) for batch in loader)
        network.backbone.calibrate(gt_images, min(CALIBRATION_BATCHES, init_batches))
    bar = progress(loader, run, "AFS", total=init_batches)
    losses = network.afs.init_indexes(network.backbone, bar, init_batches)
    for name, loss in losses.items():
        kept = len(getattr(network.afs.indexes, name))
        log.info("AFS %s: kept %d of %d channels, loss %.4f .. %.4f", name, kept, len(loss), loss.min(), loss.max())
        board.add_scalar(f"afs/{name}_kept", kept, 0)
        board.add_histogram(f"afs/{name}_loss", loss[loss.isfinite()], 0)


def afs_batches(config: EasyDict) -> int:
    """net.afs.kwargs.init_bsn: how many batches AFS looks at."""
    kwargs = next((part.get("kwargs") or {} for part in config.net if part["name"] == "afs"), {})
    count = kwargs.get("init_bsn", 64)
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"net.afs.kwargs.init_bsn: {count!r} is not a number of batches")
    return count


def set_up_training(config: EasyDict, network: nn.Module, run: Run) -> RealNetTraining:
    """Optimiser and ranks around a network whose features are prepared."""
    network = distributed.synchronize_batchnorm(network, run)
    if config.trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.trainer.optimizer, network, run.device)
    precision = precision_of(config.trainer, run.device)
    stepper = Stepper(network, optimizer, precision, config.trainer.clip_max_norm, config.trainer.max_bad_steps)
    model = distributed.parallel(torch.compile(network) if config.trainer.compile else network, run)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log.info("%.1f M trainable parameters on %s x %d", trainable / 1e6, run.device.type, run.world_size)
    return RealNetTraining(config, run, network, model, stepper, precision)


def train_one_epoch(
    training: RealNetTraining,
    criterion: dict[str, nn.Module],
    loader: DataLoader,
    board: Any,
    saver: Saver,
    sheet_path: Path | None,
) -> None:
    """One pass over the pictures, or over the rest of them in an epoch that is resumed.

    Shows the first batch where a path for its sheet is given.
    """
    run, position = training.run, training.position
    training.model.train()
    meter = Meter()
    for batch in progress(loader, run, f"epoch {position.epoch + 1}"):
        if sheet_path is not None:
            show_samples(batch, training, board, sheet_path)
            sheet_path = None
        # `changed` stays on the CPU: it becomes an index without waiting for the device.
        seed_step(training.config.random_seed, position.step, run.rank)
        batch = {
            name: value if name == "changed" else value.to(run.device, non_blocking=True)
            for name, value in batch.items()
        }
        with autocast(run.device, training.precision):
            outputs = training.model(batch, train=True)
        losses = {name: loss(outputs) for name, loss in criterion.items()}
        total = sum(losses.values())
        training.stepper.backward(total)
        training.stepper.step()
        position.finish_step()
        values = {name: value.detach() for name, value in losses.items()}
        meter.add({"loss": total.detach(), **values}, len(batch["image"]) * run.world_size)
        if position.step % training.config.trainer.print_freq_step == 0:
            report_step(meter, board, position, training.stepper, run)
        saver.after_step(position)


def show_samples(batch: dict[str, torch.Tensor], training: RealNetTraining, board: Any, path: Path) -> None:
    """A sheet of pictures, their anomalous versions and masks."""
    if not training.run.is_main:
        return
    config = training.config.dataset
    rows = []
    for caption, name in (("image", "gt_image"), ("with a synthetic anomaly", "image")):
        images = batch[name][:SHEET_PICTURES].numpy()
        rows.append((caption, list(to_uint8(images, config.pixel_mean, config.pixel_std))))
    masks = batch["mask"][:SHEET_PICTURES, 0].numpy()
    rows.append(("mask", list((masks * 255).astype(np.uint8))))
    sheet = contact_sheet(rows)
    write_image(path, sheet)
    board.add_image("train/samples", sheet, training.position.step, dataformats="HWC")
    log.info("training samples in %s", path)


# ---- validation and checkpoints --------------------------------------------------------------------------------------


def validate(training: RealNetTraining, test_set: RealNetTestSet, loader: DataLoader, board: Any) -> float | None:
    """The metric by which checkpoints are compared, on rank 0; None elsewhere.

    Without test pictures there is nothing to compare by, and the newest checkpoint counts as the best.
    """
    if not len(test_set):
        return 0.0 if training.run.is_main else None
    maps = score_test_set(training.network, loader, training.run, training.precision)
    if maps is None:
        return None
    if not np.isfinite(maps.scores).all():
        log.warning("epoch %d  the anomaly maps hold values that are not finite", training.position.epoch)
        return float("-inf")
    metrics = validation_metrics(maps, test_set, avgpool_size(training.config.evaluator))
    text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    log.info(
        "epoch %d  %s", training.position.epoch, text or "validation: the test list lacks good or defective pictures"
    )
    for name, value in metrics.items():
        board.add_scalar(f"validation/{name}", value, training.position.epoch)
    board.add_image("validation/heat_maps", heat_map_sheet(test_set, maps), training.position.epoch, dataformats="HWC")
    return key_metric(metrics, training.config.evaluator.key_metric)


def heat_map_sheet(test_set: RealNetTestSet, maps: GatheredMaps) -> np.ndarray:
    """A few test pictures of each kind with masks and heat maps, coloured from the median to the highest score."""
    chosen = spread([sample.kind for sample in test_set.samples], SHEET_PICTURES)
    low, high = float(np.median(maps.scores)), float(maps.scores.max())
    images = [test_set.picture(i) for i in chosen]
    scaled = (maps.scores[chosen] - low) / max(high - low, 1e-6)
    heat = [heat_overlay(image, values, None) for image, values in zip(images, scaled, strict=True)]
    masks = [mask.astype(np.uint8) * 255 for mask in maps.masks[chosen]]
    return contact_sheet([("test picture", images), ("ground truth", masks), ("anomaly map", heat)])


def validation_metrics(maps: GatheredMaps, test_set: RealNetTestSet, window: tuple[int, int]) -> dict[str, float]:
    """Image and pixel AUROC, those of them that are defined."""
    labels = np.array([sample.label for sample in test_set.samples], dtype=bool)
    found = {"image_auroc": Ranking.of(image_scores(maps.scores, window), labels).auroc()}
    known = np.array([sample.mask_known for sample in test_set.samples])
    found["pixel_auroc"] = Ranking.of(maps.scores[known].ravel(), maps.masks[known].ravel()).auroc()
    return {name: value for name, value in found.items() if value is not None}


def key_metric(metrics: dict[str, float], key: str) -> float:
    """What evaluator.key_metric names (mean, image, pixel); the mean of what there is where that is undefined."""
    if key not in ("mean", "image", "pixel"):
        raise UsageError(f"evaluator.key_metric: {key!r} is not one of mean, image, pixel")
    if f"{key}_auroc" in metrics:
        return metrics[f"{key}_auroc"]
    # Without any defective picture nothing can be compared; then the newest checkpoint counts as the best.
    return float(np.mean(list(metrics.values()))) if metrics else 0.0


def save_best(training: RealNetTraining, metric: float, checkpoints: Path) -> None:
    """ckpt_best, where the metric is at least as good as before."""
    best = metric >= training.best_metric
    training.best_metric = max(metric, training.best_metric)
    if best:
        save_checkpoint(checkpoints / "ckpt_best.pth.tar", checkpoint_of(training))
        log.info("saved %s (%.4f)", checkpoints / "ckpt_best.pth.tar", metric)


def checkpoint_of(training: RealNetTraining) -> dict[str, Any]:
    """The detector with the settings that it needs to be used."""
    return {
        "epoch": training.position.epoch,
        "arch": plain(training.config.net),
        "state_dict": training.network.state_dict(),
        "best_metric": training.best_metric,
        "config": plain(training.config),
    }


def restore(training: RealNetTraining, content: dict[str, Any], checkpoints: Path) -> None:
    """Continue from a saved state; the channels that AFS has selected are in it."""

    def own(content: dict[str, Any]) -> None:
        training.best_metric = content["best_metric"]

    training.restore(content, checkpoints, own)


if __name__ == "__main__":
    cli.run(main)
