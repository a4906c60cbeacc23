"""Train the SDAS diffusion model on normal images of all classes of a data set.

    python train_diffusion.py --dataset MVTec-AD
    torchrun --nproc_per_node=4 train_diffusion.py --dataset MVTec-AD --resume
    python -m torch.distributed.launch --nproc_per_node=4 train_diffusion.py --dataset MVTec-AD

Settings: experiments/<dataset>/diffusion.yaml. Writes diffusion_checkpoints/ckpt_<epoch>.pth.tar, diffusion_log/
and, at every validation, one contact sheet per class to diffusion_vis/. Validations also measure how far drawn images
are from training images (KID, docs/synthesis.md).
"""

import argparse

from utils import arguments


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    arguments.add_resume_options(parser)
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from torch.utils.data import DataLoader

from datasets.build import build_sdas_dataset, check_sdas_list
from datasets.loaders import EpochBatches, make_loader
from datasets.sdas import SDASDataset
from evaluation.validation_kid import set_up_kid
from models.losses import build_criterion
from models.sdas import SpacedDiffusion, check_training_size, create_diffusion_unet
from models.sdas.pictures import to_pictures
from models.sdas.reconstruction import reconstruct
from utils import cli, distributed
from utils.checkpoint import load_for_resume, save_numbered
from utils.config import collect_errors, load_config, model_kwargs, plain, pretrained_path
from utils.counts import counted
from utils.device import to_device
from utils.errors import RunError
from utils.files import delete_older
from utils.log import Board, log, progress_bar
from utils.optim import EpochLoss, accumulation_groups, seed_step
from utils.pictures import contact_sheet, write_image
from utils.precision import autocast
from utils.run_record import identity_of
from utils.saver import Saver
from utils.signals import StopRequest, stop_requests
from utils.training import Training, set_up_training, trainer_checks, training_folders
from utils.training_log import report_step

STRENGTHS = (0.0, 0.1, 0.2)
IMAGES_PER_CLASS = 4


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "diffusion")
    config = load_config(path, args.set, "diffusion")
    check(config, path)
    out = cli.experiment_dir(args)
    checkpoints, log_dir = out / config.saver.checkpoints_dir, out / config.saver.log_dir
    with (
        distributed.session(args.device, identity_of(config)) as run,
        stop_requests(run) as stop,
        training_folders("train_diffusion", checkpoints, log_dir, config, args, run) as board,
    ):
        train_set = build_sdas_dataset(config.dataset, "train", None, config.random_seed)
        classes = list(train_set.numbers)
        test_set = build_sdas_dataset(config.dataset, "test", classes, config.random_seed)
        batches = EpochBatches(len(train_set), config.dataset.batch_size, run, config.random_seed)
        loader = make_loader(train_set, batches, config.dataset.workers, run)
        sizes = counted(len(train_set), "image"), counted(len(classes), "class"), counted(len(test_set), "test image")
        log.info("%s of %s, %s", *sizes)

        torch.manual_seed(config.random_seed)
        saved = load_for_resume(checkpoints, run, args.resume)
        network = build_network(config, saved is not None).to(run.device)
        settings = {
            "arch": plain(config.unet),
            "classes": classes,
            "process": plain(config.TrainSampler),
            "input_size": list(config.dataset.input_size),
        }
        lists = train_set.images.summary(), test_set.images.summary()
        training = set_up_training(config, network, run, settings, lists, epoch_loss=EpochLoss(run.device))
        training.steps_per_epoch = len(accumulation_groups(len(batches), config.trainer.accumulate))
        training.json_log = log_dir / "train_diffusion.jsonl"
        training.begin(saved, checkpoints, args)
        progress = training.progress
        saver = Saver(checkpoints, training, stop)
        process = SpacedDiffusion(**config.TrainSampler)
        kid = set_up_kid(config, path.parent, train_set, run)
        while not training.is_complete:
            batches.set_epoch(progress.epoch, progress.step_in_epoch * config.trainer.accumulate)
            if not training.is_over:  # else a stopped run has only the last validation left
                train_one_epoch(training, process, loader, board, saver)
            saver.after_epoch()
            if training.is_due(config.trainer.val_freq_epoch):
                # Save first: validation takes long, and a run killed during it then loses only the validation.
                with training.meter.paused():
                    if run.is_main:
                        save_numbered(checkpoints, training.checkpoint(), config.saver.keep)
                    saver.save()
                    with saver.save_if_stopped():
                        validate(training, test_set, classes, board, out / config.saver.vis_dir, stop)
                        if kid is not None:
                            kid.measure(training, STRENGTHS, board, stop)
                    if training.is_over:
                        saver.save_validated()


def check(config: EasyDict, path: Path) -> None:
    """Check the settings before anything is loaded or trained."""
    sizes = config.dataset.input_size, config.dataset.crop

    def network() -> None:
        with torch.device("meta"):
            create_diffusion_unet(**model_kwargs(config.unet))

    lists = [(split, lambda split=split: check_sdas_list(config, split, "unet")) for split in ("train", "test")]
    collect_errors(
        path,
        [
            ("dataset", lambda: check_training_size(*sizes, config.unet.channel_mult)),
            ("unet", network),
            ("TrainSampler", lambda: SpacedDiffusion(**config.TrainSampler)),
            ("TestSampler", lambda: SpacedDiffusion(**config.TestSampler)),
            ("criterion", lambda: build_criterion(config.criterion, ["ImageMSELoss"])),
            *trainer_checks(config.trainer),
            *lists,
        ],
    )


def build_network(config: EasyDict, resumed: bool) -> torch.nn.Module:
    """The U-Net, from unet.pertrain_path unless the run is resumed."""
    start_weights = None if resumed else pretrained_path(config.unet)
    if start_weights is None and not resumed:
        log.info("training from scratch (unet.pertrain_path is not set)")
    return create_diffusion_unet(**model_kwargs(config.unet), pertrain_path=start_weights)


def train_one_epoch(
    training: Training, process: SpacedDiffusion, loader: DataLoader, board: Board, saver: Saver
) -> None:
    """One pass over the images, or over the remaining ones if the epoch was resumed."""
    config, run, progress = training.config, training.run, training.progress
    training.model.train()
    meter = training.meter
    if progress.step_in_epoch == 0:
        training.epoch_loss.reset()
    stream = meter.waiting_for(progress_bar(loader, run, f"epoch {progress.epoch + 1}"))
    for group in accumulation_groups(len(loader), config.trainer.accumulate):
        seed_step(config.random_seed, progress.step, run.rank)
        for micro, batch in enumerate(islice(stream, group)):
            image = batch["image"].to(run.device, non_blocking=True)
            if config.trainer.channels_last:
                image = image.to(memory_format=torch.channels_last)
            y = batch["label"].to(run.device, non_blocking=True)
            t = torch.randint(process.num_timesteps, (len(image),), device=run.device)
            # Gradients are exchanged once per optimiser step, with the last micro-batch.
            with distributed.no_sync(training.model, micro + 1 < group):
                with autocast(run.device, training.precision):
                    losses = process.training_losses(training.model, image, t, {"y": y})
                loss = losses["loss"].mean()
                training.stepper.backward(loss / group)
            meter.add({name: value.detach().mean() for name, value in losses.items()}, len(image) * run.world_size)
            training.epoch_loss.add(loss.detach(), 1 / group)
        training.finish_step()
        if progress.step % config.trainer.print_freq_step == 0:
            report_step(training, board)
        saver.after_step()
        if training.is_over:
            return


# ---- validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    training: Training,
    test_set: SDASDataset,
    classes: list[str],
    board: Board,
    vis_dir: Path,
    stop: StopRequest,
) -> None:
    """Write a sheet per class: real images, their DDIM reconstructions, and samples of one noise at rising strength.

    Logs the reconstruction error over `val_batch_number` batches of test images; ranks share the classes.
    """
    config, run, epoch = training.config, training.run, training.progress.epoch
    process = SpacedDiffusion(**config.TestSampler)
    criterion = build_criterion(config.criterion, ["ImageMSELoss"])
    per_class = max(1, config.trainer.val_batch_number * config.dataset.batch_size // len(classes))
    totals = torch.zeros(2, dtype=torch.float64)  # summed error, images
    sheets = {}
    for number, name in progress_bar(list(enumerate(classes))[run.rank :: run.world_size], run, "validation"):
        chosen = test_set.images.of_class(name)[:per_class]
        rows = []
        for start in stop.heeded(range(0, len(chosen), config.dataset.batch_size)):
            indices = chosen[start : start + config.dataset.batch_size]
            images = to_device(torch.stack([test_set[epoch, i]["image"] for i in indices]), run.device)
            recon = reconstruct(process, partial(averaged_model, training), images, number)
            error = sum(loss({"image": images, "image_recon": recon}) for loss in criterion.values())
            if not torch.isfinite(error):
                raise RunError(f"epoch {epoch}: the reconstruction error is not finite; lower the learning rate")
            totals += torch.tensor([float(error) * len(indices), len(indices)], dtype=torch.float64)
            if not rows:
                rows = [("real", first_images(images)), ("DDIM reconstruction", first_images(recon))]
        rows += sample_rows(training, process, number, test_set.size, stop)
        sheets[name] = contact_sheet(rows)
    gathered = distributed.gather(sheets)
    distributed.all_reduce_sum(totals)
    if run.is_main:
        delete_older(vis_dir.glob("epoch_*"), config.saver.keep_pictures - 1)
        for name, sheet in {name: sheet for part in gathered for name, sheet in part.items()}.items():
            write_image(vis_dir / f"epoch_{epoch}" / f"{name}.png", sheet)
            board.add_image(f"validation/{name}", sheet, training.progress.step)
        if totals[1]:
            error = float(totals[0] / totals[1])
            board.add_scalar("validation/reconstruction_error", error, training.progress.step)
            log.info("epoch %d  reconstruction error %.5f  pictures in %s", epoch, error, vis_dir / f"epoch_{epoch}")


def averaged_model(training: Training, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The averaged network's prediction, in the training's precision."""
    with autocast(training.run.device, training.precision):
        return training.ema.model(x, t, y)


def sample_rows(
    training: Training, process: SpacedDiffusion, number: int, size: tuple[int, int], stop: StopRequest
) -> list[tuple[str, list[np.ndarray]]]:
    """A row of samples of a class for each strength, from the same noise."""
    device, rows = training.run.device, []
    model, y = partial(averaged_model, training), torch.full((IMAGES_PER_CLASS,), number, device=device)
    for s in stop.heeded(STRENGTHS):
        generator = torch.Generator().manual_seed(training.config.random_seed)
        noise = to_device(torch.randn(IMAGES_PER_CLASS, 3, *size, generator=generator), device)
        samples = process.p_sample_loop(model, noise, s=s, model_kwargs={"y": y}, generator=generator)
        rows.append((f"sampled, s = {s:g}", first_images(samples)))
    return rows


def first_images(images: torch.Tensor) -> list[np.ndarray]:
    """The first few images of a batch in [-1, 1], as (H,W,3) uint8."""
    return list(to_pictures(images[:IMAGES_PER_CLASS]))


if __name__ == "__main__":
    cli.run(main)
