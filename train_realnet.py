"""Train RealNet on normal images of a class and synthetic anomalies.

    python train_realnet.py --dataset MVTec-AD --class_name bottle
    python train_realnet.py --dataset MVTec-AD --class_name all
    torchrun --nproc_per_node=2 train_realnet.py --dataset MVTec-AD --class_name bottle,cable
    python -m torch.distributed.launch --nproc_per_node=1 train_realnet.py --dataset MVTec-AD --class_name bottle

Settings: experiments/<dataset>/realnet.yaml. Writes, per class, realnet_checkpoints/<class>/ckpt_best.pth.tar (and
ckpt_last.pth.tar to resume from), realnet_log/<class>/, and a sheet of training samples to realnet_vis/<class>/.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import nn
from torch.utils.data import DataLoader

from datasets.build import build_realnet_test_set, build_realnet_train_set, check_realnet_data, preprocessing_of
from datasets.lists import UNIFIED, listed_classes
from datasets.loaders import EpochBatches, SharedBatches, make_loader
from datasets.realnet import GoodImages, RealNetTestSet, RealNetTrainSet
from evaluation.metrics import Ranking
from evaluation.score import ScoredImages, pooling_window, predict_maps
from evaluation.thresholds import heat_range, sidecar
from models import build_realnet, check_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.realnet import RealNet
from models.subspace import Moments
from utils import cli, distributed
from utils.checkpoint import BEST, load_for_resume, refuse_earlier_run, save_checkpoint
from utils.config import collect_errors, load_config, plain
from utils.distributed import Run
from utils.errors import RunError
from utils.log import Board, log, progress_bar
from utils.optim import seed_step
from utils.pictures import contact_sheet, heat_overlay, spread, write_image
from utils.precision import autocast
from utils.run_record import identity_of
from utils.signals import StopRequest, stop_requests
from utils.training import Saver, Training, log_json, report_step, set_up_training, trainer_checks, training_folders

CALIBRATION_BATCHES = 8
SHEET_IMAGES = 8
NORMAL_IMAGES = 48  # good training images that evaluator.score is measured on
DIVERGED = float("-inf")  # the metric of a network whose anomaly maps are not finite


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    cli.add_resume_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set, "realnet")
    classes = check(config, path, args.class_name)
    out = cli.experiment_dir(args)
    with distributed.session(args.device, identity_of(config, classes=classes)) as run, stop_requests(run) as stop:
        for class_name in classes:
            # Said before the first class is trained, not hours later.
            folder = out / config.saver.checkpoints_dir / class_name
            distributed.on_main(lambda folder=folder: refuse_earlier_run(folder, args.resume, args.overwrite))
        for class_name in classes:
            checkpoints, log_dir = (out / config.saver[key] / class_name for key in ("checkpoints_dir", "log_dir"))
            with training_folders("train_realnet", checkpoints, log_dir, config, args, run) as board:
                train_class(config, class_name, run, out, board, args, stop)
        cli.log_next("evaluation_realnet.py", args)


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the settings before anything is loaded or trained; returns the classes to train."""
    classes: list[str] = []

    def choose_classes() -> None:
        classes.extend(cli.chosen_classes(class_name, config.dataset.train.meta_file, listed_classes, UNIFIED))

    def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "--class_name", choose_classes
        yield "structure, net", lambda: check_realnet(config)
        yield "criterion", lambda: build_criterion(config.criterion, DETECTOR_LOSSES)
        yield from trainer_checks(config.trainer)
        for name in classes:
            yield "dataset", lambda name=name: check_realnet_data(config.dataset, name)

    collect_errors(path, checks())
    return classes


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


def train_class(
    config: EasyDict,
    class_name: str,
    run: Run,
    out: Path,
    board: Board,
    args: argparse.Namespace,
    stop: StopRequest,
) -> None:
    """Train one detector: AFS first, then reconstruction and RRS together."""
    seed = config.random_seed
    train_set = build_realnet_train_set(config.dataset, class_name, seed)
    test_set = build_realnet_test_set(config.dataset, class_name)
    log.info("%s: %d training images, %d test images", class_name, len(train_set), len(test_set))
    if not len(test_set):
        log.info("%s: the test list is empty, so there is no validation; ckpt_best will be the newest", class_name)
    batches = EpochBatches(len(train_set), config.dataset.batch_size, run, seed)
    loader = make_loader(train_set, batches, config.dataset.workers, run)
    test_batches = SharedBatches(len(test_set), config.dataset.batch_size, run)
    test_loader = make_loader(test_set, test_batches, config.dataset.workers, run)
    checkpoints = out / config.saver.checkpoints_dir / class_name

    torch.manual_seed(seed)
    saved = load_for_resume(checkpoints, run, args.resume)
    network = build_realnet(config, "checkpoint" if saved else None).to(run.device)
    if not saved:
        prepare_features(network, train_set, config, run, board, stop)
    freeze_untrained(network, config)
    # The checkpoint holds the settings, so that the detector needs no YAML; the weights hold AFS's channels.
    settings = {"arch": plain(config.net), "config": plain(config)}
    lists, figures = (train_set.images.summary(), test_set.images.summary()), {"best_metric": -1.0}
    training = set_up_training(config, network, run, settings, lists, figures)
    training.class_name = class_name
    training.steps_per_epoch = len(batches)
    training.json_log = out / config.saver.log_dir / class_name / "train_realnet.jsonl"
    training.begin(saved, checkpoints, args)

    criterion = build_criterion(config.criterion, DETECTOR_LOSSES)
    progress, metric = training.progress, None
    saver = Saver(checkpoints, training, stop)
    sheet_path = out / config.saver.vis_dir / class_name / "training_samples.png"
    while not training.is_over:
        batches.set_epoch(progress.epoch, progress.step_in_epoch)
        train_one_epoch(training, criterion, loader, board, saver, sheet_path if progress.step == 0 else None)
        saver.after_epoch()
        if training.is_due(config.trainer.val_freq_epoch):
            with training.meter.paused(), saver.save_if_stopped():
                measure_normal(training, train_set, stop)
                metric = validate(training, test_set, test_loader, board, stop)
                if run.is_main:
                    save_best(training, metric, checkpoints)
                saver.save()
    if distributed.broadcast(metric == DIVERGED):
        raise RunError(
            f"{class_name}: the anomaly maps of the last validation are not finite; start anew with --overwrite and a "
            "lower trainer.optimizer.kwargs.lr"
        )


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
        network.backbone.calibrate((batch["gt_image"].to(run.device) for batch in bar), count)
    bar = progress_bar(loader, run, "AFS", total=init_batches, stop=stop)
    moments = Moments() if network.recon.start == "subspace" else None
    losses = network.afs.init_indexes(network.backbone, bar, init_batches, moments)
    for name, loss in losses.items():
        kept = len(getattr(network.afs.indexes, name))
        log.info("AFS %s: kept %d of %d channels, loss %.4f .. %.4f", name, kept, len(loss), loss.min(), loss.max())
        board.add_scalar(f"afs/{name}_kept", kept, 0)
        board.add_histogram(f"afs/{name}_loss", loss[loss.isfinite()], 0)
    if moments is not None:
        for block, (mean, covariance) in network.afs.kept_moments(moments, network.backbone).items():
            count = network.recon.subspace(block).fit(mean, covariance, network.recon.share)
            log.info("normal subspace of %s: %d of %d components", block, count, len(mean))


def afs_batches(config: EasyDict) -> int:
    """The number of batches that AFS looks at, net.afs.kwargs.init_bsn."""
    kwargs = next((part.get("kwargs") or {} for part in config.net if part["name"] == "afs"), {})
    return kwargs.get("init_bsn", 64)


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


def measure_normal(training: Training, train_set: RealNetTrainSet, stop: StopRequest) -> None:
    """Measure what evaluator.score needs on some good training images: what the residual is where nothing is wrong."""
    if training.config.evaluator.score == "discriminator":
        return
    network, run = training.deployed, training.run
    chosen = GoodImages(train_set, spread([0] * len(train_set), NORMAL_IMAGES))
    batches = SharedBatches(len(chosen), training.config.dataset.batch_size, run)
    loader = make_loader(chosen, batches, 0, run)

    def outputs() -> Iterator[dict]:
        for batch in progress_bar(loader, run, "good images", stop=stop):
            with autocast(run.device, training.precision):
                yield network({"image": batch.to(run.device)})

    was_training = network.training
    network.eval()
    network.score.measure(outputs)
    network.train(was_training)


def validate(
    training: Training, test_set: RealNetTestSet, loader: DataLoader, board: Board, stop: StopRequest
) -> float | None:
    """The metric that selects the best checkpoint, on rank 0; None on other ranks.

    Without test images it is always 0, so that the newest checkpoint counts as the best.
    """
    if not len(test_set):
        return 0.0 if training.run.is_main else None
    shown = spread([sample.defect_type for sample in test_set.samples], SHEET_IMAGES)
    window = pooling_window(training.config.evaluator)
    scored = predict_maps(training.deployed, test_set, loader, training.run, window, training.precision, shown, stop)
    if scored is None:
        return None
    epoch = training.progress.epoch
    if not scored.finite:
        log.warning("epoch %d  the anomaly maps hold values that are not finite", epoch)
        return DIVERGED
    metrics = validation_metrics(scored)
    text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    log.info("epoch %d  %s", epoch, text or "validation: the test list lacks good or defective images")
    for name, value in metrics.items():
        board.add_scalar(f"validation/{name}", value, epoch)
    log_json(training, {"epoch": epoch, "step": training.progress.step, "validation": metrics})
    board.add_image("validation/heat_maps", heat_map_sheet(scored, shown), epoch)
    return key_metric(metrics, training.config.evaluator.key_metric)


def heat_map_sheet(scored: ScoredImages, shown: list[int]) -> np.ndarray:
    """Some test images with masks and heat maps, coloured from the median to the maximum of all maps."""
    low, high = heat_range(scored.maps)
    images = [scored.images[i] for i in shown]
    heat = [heat_overlay(scored.images[i], scored.maps[i], low, high) for i in shown]
    masks = [mask.astype(np.uint8) * 255 for mask in scored.masks[shown]]
    return contact_sheet([("test image", images), ("ground truth", masks), ("anomaly map", heat)])


def validation_metrics(scored: ScoredImages) -> dict[str, float]:
    """Image and pixel AUROC, without undefined ones."""
    known = scored.mask_known
    image = Ranking.of(scored.scores, scored.labels)
    pixel = Ranking.of(scored.maps[known].ravel(), scored.masks[known].ravel())
    metrics = {"image_auroc": image.auroc(), "pixel_auroc": pixel.auroc()}
    return {name: value for name, value in metrics.items() if value is not None}


def key_metric(metrics: dict[str, float], key: str) -> float:
    """The AUROC that evaluator.key_metric names (mean, image, pixel); if undefined, the mean of the defined ones."""
    if f"{key}_auroc" in metrics:
        return metrics[f"{key}_auroc"]
    # Without defective images, none is defined; 0 makes the newest checkpoint the best.
    return float(np.mean(list(metrics.values()))) if metrics else 0.0


def save_best(training: Training, metric: float, checkpoints: Path) -> None:
    """Write ckpt_best if the metric is at least as good as the best one so far."""
    figures = training.figures
    best = metric >= figures["best_metric"]
    figures["best_metric"] = max(metric, figures["best_metric"])
    if best:
        # They were chosen on the scores of the checkpoint that is replaced.
        thresholds = sidecar(checkpoints / BEST)
        if thresholds.is_file():
            thresholds.unlink()
            log.info("%s belonged to the checkpoint before and is deleted; evaluate to have new ones", thresholds)
        content = training.checkpoint()
        if training.ema is not None:
            # The averaged weights were validated, and are what evaluation and prediction use.
            content["state_dict"] = content.pop("ema_state_dict")
        save_checkpoint(checkpoints / BEST, content)
        log.info("saved %s (%.4f)", checkpoints / BEST, metric)


if __name__ == "__main__":
    cli.run(main)
