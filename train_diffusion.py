"""Train the SDAS diffusion model on normal images of all classes of a data set.

    python train_diffusion.py --dataset MVTec-AD
    torchrun --nproc_per_node=4 train_diffusion.py --dataset MVTec-AD --resume
    python -m torch.distributed.launch --nproc_per_node=4 train_diffusion.py --dataset MVTec-AD

Settings: experiments/<dataset>/diffusion.yaml. Writes diffusion_checkpoints/ckpt_<epoch>.pth.tar, diffusion_log/
and, at every validation, one contact sheet per class to diffusion_vis/.
"""

import argparse
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch.utils.data import DataLoader

from datasets.loaders import EpochBatches, build_sdas_dataset, check_sdas_list, make_loader
from datasets.sdas import SDASDataset
from models.losses import build_criterion
from models.sdas import SpacedDiffusion, check_size, create_diffusion_unet
from utils import cli, distributed
from utils.checkpoint import save_numbered
from utils.config import check_together, load_config, model_kwargs, plain, pretrained_path
from utils.distributed import Run, autocast
from utils.lock import exclusive
from utils.log import Meter, log, progress, set_up_logging
from utils.optim import EMA, EpochLoss, Stepper, accumulation_groups, build_optimizer, precision_of, seed_step
from utils.pictures import contact_sheet, to_uint8, write_image
from utils.resume import resumable
from utils.signals import stop_requests
from utils.training import Saver, Training, report_step, trainer_checks

STRENGTHS = (0.0, 0.1, 0.2)
PICTURES_PER_CLASS = 4


@dataclass
class DiffusionTraining(Training):
    """With the averaged network."""

    ema: EMA
    loss: EpochLoss

    def evaluated(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The averaged network, in the training's precision."""
        with autocast(self.run.device, self.precision):
            return self.ema.model(x, t, y)


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "diffusion")
    config = load_config(path, args.set)
    check(config, path)
    out = cli.experiment_dir(args)
    checkpoints = out / config.saver.checkpoints_dir
    with distributed.session(args.device) as run, stop_requests(run) as stop, exclusive(checkpoints, run):
        board = set_up_logging(run, out / config.saver.log_dir, "train_diffusion")
        train_set = build_sdas_dataset(config.dataset, "train", None, config.random_seed)
        classes = list(train_set.numbers)
        test_set = build_sdas_dataset(config.dataset, "test", classes, config.random_seed)
        batches = EpochBatches(len(train_set), config.dataset.batch_size, run, config.random_seed)
        loader = make_loader(train_set, batches, config.dataset.workers, run)
        log.info("%d pictures of %d classes, %d test pictures", len(train_set), len(classes), len(test_set))

        resumed = resumable(checkpoints, run, args.resume)
        training = set_up_training(config, run, resumed is not None)
        if resumed:
            restore(training, resumed, checkpoints)
        position = training.position
        every = config.trainer.save_freq_step
        saver = Saver(checkpoints, run, stop, every, training.stepper, lambda: resumable_content(training, classes))
        process = SpacedDiffusion(**config.TrainSampler)
        for epoch in range(position.epoch, config.trainer.max_epoch):
            batches.set_epoch(epoch, position.step_in_epoch * config.trainer.accumulate)
            train_one_epoch(training, process, loader, board, saver)
            position.finish_epoch()
            last = position.epoch == config.trainer.max_epoch
            if position.epoch % config.trainer.val_freq_epoch == 0 or last:
                # First, since the pictures of a validation take long: a run that is killed meanwhile loses only them.
                if run.is_main:
                    save_numbered(checkpoints, checkpoint_of(training, classes), config.saver.keep)
                saver.save()
                validate(training, test_set, classes, board, out / config.saver.vis_dir, position.epoch)
        board.close()


def check(config: EasyDict, path: Path) -> None:
    """Find what is wrong with the settings before anything is loaded or trained."""

    def network() -> None:
        with torch.device("meta"):
            create_diffusion_unet(**model_kwargs(config.unet))

    lists = [(split, lambda split=split: check_sdas_list(config, split, "unet")) for split in ("train", "test")]
    check_together(
        path,
        [
            ("dataset", lambda: check_size(config.dataset.input_size, config.unet.channel_mult, "dataset.input_size")),
            ("unet", network),
            ("TrainSampler", lambda: SpacedDiffusion(**config.TrainSampler)),
            ("TestSampler", lambda: SpacedDiffusion(**config.TestSampler)),
            ("criterion", lambda: build_criterion(config.criterion)),
            *trainer_checks(config.trainer),
            *lists,
        ],
    )


def set_up_training(config: EasyDict, run: Run, resumed: bool) -> DiffusionTraining:
    """Network, its average, and the optimiser."""
    torch.manual_seed(config.random_seed)
    start_weights = None if resumed else pretrained_path(config.unet)
    network = create_diffusion_unet(**model_kwargs(config.unet), pertrain_path=start_weights).to(run.device)
    if start_weights is None and not resumed:
        log.info("training from scratch (unet.pertrain_path is not set)")
    if config.trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    ema = EMA(network, config.trainer.ema_decay)
    optimizer = build_optimizer(config.trainer.optimizer, network, run.device)
    precision = precision_of(config.trainer, run.device)
    stepper = Stepper(network, optimizer, precision, config.trainer.clip_max_norm, config.trainer.max_bad_steps)
    compiled = torch.compile(network) if config.trainer.compile else network
    model = distributed.parallel(compiled, run)
    parameters = sum(p.numel() for p in network.parameters())
    log.info("U-Net with %.1f M parameters on %s x %d", parameters / 1e6, run.device.type, run.world_size)
    return DiffusionTraining(config, run, network, model, stepper, precision, ema, EpochLoss(run.device))


def train_one_epoch(
    training: DiffusionTraining, process: SpacedDiffusion, loader: DataLoader, board: Any, saver: Saver
) -> None:
    """One pass over the pictures, or over the rest of them in an epoch that is resumed."""
    config, run, position = training.config, training.run, training.position
    training.model.train()
    meter = Meter()
    if position.step_in_epoch == 0:
        training.loss.reset()
    stream = iter(progress(loader, run, f"epoch {position.epoch + 1}"))
    for group in accumulation_groups(len(loader), config.trainer.accumulate):
        seed_step(config.random_seed, position.step, run.rank)
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
            training.loss.add(loss.detach(), 1 / group)
        training.stepper.step()
        training.ema.update(training.network)
        position.finish_step()
        if position.step % config.trainer.print_freq_step == 0:
            report_step(meter, board, position, training.stepper, run)
        saver.after_step(position)


# ---- validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    training: DiffusionTraining, test_set: SDASDataset, classes: list[str], board: Any, vis_dir: Path, epoch: int
) -> None:
    """Per class a sheet of real pictures, their DDIM reconstructions, and samples at rising strength from one noise.

    Logs the reconstruction error over `val_batch_number` batches of test pictures; ranks share the classes.
    """
    config, run = training.config, training.run
    process = SpacedDiffusion(**config.TestSampler)
    criterion = build_criterion(config.criterion)
    per_class = max(1, config.trainer.val_batch_number * config.dataset.batch_size // len(classes))
    totals = torch.zeros(2, dtype=torch.float64)
    sheets = {}
    for number, name in progress(list(enumerate(classes))[run.rank :: run.world_size], run, "validation"):
        chosen = [i for i, sample in enumerate(test_set.samples) if sample.clsname == name][:per_class]
        rows = []
        for start in range(0, len(chosen), config.dataset.batch_size):
            indices = chosen[start : start + config.dataset.batch_size]
            images = torch.stack([test_set[epoch, i]["image"] for i in indices]).to(run.device)
            y = torch.full((len(indices),), number, device=run.device)
            inverted = process.ddim_reverse_sample_loop(training.evaluated, images, {"y": y})
            recon = process.ddim_sample_loop(training.evaluated, inverted, model_kwargs={"y": y})
            error = sum(loss({"image": images, "image_recon": recon}) for loss in criterion.values())
            totals += torch.tensor([float(error) * len(indices), len(indices)], dtype=torch.float64)
            if not rows:
                rows = [("real", pictures_of(images)), ("DDIM reconstruction", pictures_of(recon))]
        rows += sample_rows(training, process, number, test_set.size)
        sheets[name] = contact_sheet(rows)
    gathered = distributed.gather(sheets)
    distributed.all_reduce_sum(totals)
    if run.is_main:
        for name, sheet in {k: v for part in gathered for k, v in part.items()}.items():
            write_image(vis_dir / f"epoch_{epoch}" / f"{name}.png", sheet)
            board.add_image(f"validation/{name}", sheet, training.position.step, dataformats="HWC")
        if totals[1]:
            error = float(totals[0] / totals[1])
            board.add_scalar("validation/reconstruction_error", error, training.position.step)
            log.info("epoch %d  reconstruction error %.5f  pictures in %s", epoch, error, vis_dir / f"epoch_{epoch}")


def sample_rows(
    training: DiffusionTraining, process: SpacedDiffusion, number: int, size: tuple[int, int]
) -> list[tuple[str, list[np.ndarray]]]:
    """A row of pictures of a class for each strength, from the same noise."""
    device, rows = training.run.device, []
    y = torch.full((PICTURES_PER_CLASS,), number, device=device)
    for s in STRENGTHS:
        generator = torch.Generator().manual_seed(training.config.random_seed)
        noise = torch.randn(PICTURES_PER_CLASS, 3, *size, generator=generator).to(device)
        drawn = process.p_sample_loop(training.evaluated, noise, s=s, model_kwargs={"y": y}, generator=generator)
        rows.append((f"sampled, s = {s:g}", pictures_of(drawn)))
    return rows


def pictures_of(images: torch.Tensor) -> list[np.ndarray]:
    """The first few of a batch in [-1, 1] as (H,W,3) uint8."""
    return list(to_uint8(images[:PICTURES_PER_CLASS].float().cpu().numpy(), (0.5,) * 3, (0.5,) * 3))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_of(training: DiffusionTraining, classes: list[str]) -> dict[str, Any]:
    """The networks, for sampling."""
    return {
        "epoch": training.position.epoch,
        "arch": plain(training.config.unet),
        "classes": classes,
        "state_dict": training.network.state_dict(),
        "ema_state_dict": training.ema.model.state_dict(),
        "loss": training.loss.mean(),
    }


def resumable_content(training: DiffusionTraining, classes: list[str]) -> dict[str, Any]:
    """Everything that a resumed run needs."""
    own = {"ema_updates": training.ema.updates, "epoch_loss": training.loss.state_dict()}
    return training.resumable({**checkpoint_of(training, classes), **own})


def restore(training: DiffusionTraining, content: dict[str, Any], checkpoints: Path) -> None:
    """Continue from a saved state."""

    def own(content: dict[str, Any]) -> None:
        training.ema.model.load_state_dict(content["ema_state_dict"])
        training.ema.updates = content["ema_updates"]
        training.loss.load_state_dict(content["epoch_loss"])

    training.restore(content, checkpoints, own)


if __name__ == "__main__":
    cli.run(main)
