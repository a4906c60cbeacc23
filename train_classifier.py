"""Train the SDAS guidance classifier on noisy normal images.

    python train_classifier.py --dataset MVTec-AD
    torchrun --nproc_per_node=2 train_classifier.py --dataset MVTec-AD --resume
    python -m torch.distributed.launch --nproc_per_node=2 train_classifier.py --dataset MVTec-AD

Settings: experiments/<dataset>/classifier.yaml. Writes classifier_checkpoints/ckpt_<epoch>.pth.tar and
classifier_log/.
"""

import argparse

from utils import arguments


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    arguments.add_resume_options(parser)
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch.utils.data import DataLoader, Dataset

from datasets.build import build_sdas_dataset, check_sdas_list
from datasets.loaders import EpochBatches, SharedBatches, make_loader
from models.sdas import SpacedDiffusion, check_training_size, create_classifier_unet
from utils import cli, distributed
from utils.checkpoint import load_for_resume, save_numbered
from utils.config import collect_errors, load_config, model_kwargs, plain, pretrained_path
from utils.counts import counted
from utils.errors import RunError, UsageError
from utils.log import Board, log, progress_bar
from utils.optim import accumulation_groups, seed_step
from utils.precision import autocast
from utils.run_record import identity_of
from utils.saver import Saver
from utils.signals import StopRequest, stop_requests
from utils.training import Training, set_up_training, trainer_checks, training_folders
from utils.training_log import report_step

T_BINS = 10


class TestImages(Dataset):
    """A validation set keyed by index alone; it always returns the samples of epoch 0."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[0, index]


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "classifier")
    config = load_config(path, args.set, "classifier")
    check(config, path)
    out = cli.experiment_dir(args)
    checkpoints, log_dir = out / config.saver.checkpoints_dir, out / config.saver.log_dir
    with (
        distributed.session(args.device, identity_of(config)) as run,
        stop_requests(run) as stop,
        training_folders("train_classifier", checkpoints, log_dir, config, args, run) as board,
    ):
        train_set = build_sdas_dataset(config.dataset, "train", None, config.random_seed)
        classes = list(train_set.numbers)
        test_set = TestImages(build_sdas_dataset(config.dataset, "test", classes, config.random_seed))
        batches = EpochBatches(len(train_set), config.dataset.batch_size, run, config.random_seed)
        loader = make_loader(train_set, batches, config.dataset.workers, run)
        test_batches = SharedBatches(len(test_set), config.dataset.batch_size, run)
        test_loader = make_loader(test_set, test_batches, config.dataset.workers, run)
        sizes = counted(len(train_set), "image"), counted(len(classes), "class"), counted(len(test_set), "test image")
        log.info("%s of %s, %s", *sizes)

        torch.manual_seed(config.random_seed)
        saved = load_for_resume(checkpoints, run, args.resume)
        network = build_network(config, saved is not None).to(run.device)
        settings = {"arch": plain(config.classifier), "classes": classes}
        lists = train_set.images.summary(), test_set.samples.images.summary()
        training = set_up_training(config, network, run, settings, lists, figures={"acc": 0.0})
        training.steps_per_epoch = len(accumulation_groups(len(batches), config.trainer.accumulate))
        training.json_log = log_dir / "train_classifier.jsonl"
        training.begin(saved, checkpoints, args)
        progress = training.progress
        saver = Saver(checkpoints, training, stop)
        process, test_process = SpacedDiffusion(**config.TrainSampler), SpacedDiffusion(**config.TestSampler)
        while not training.is_complete:
            batches.set_epoch(progress.epoch, progress.step_in_epoch * config.trainer.accumulate)
            if not training.is_over:  # else a stopped run has only the last validation left
                train_one_epoch(training, process, loader, board, saver)
            saver.after_epoch()
            if training.is_due(config.trainer.val_freq_epoch):
                with training.meter.paused(), saver.save_if_stopped():
                    training.figures["acc"] = validate(training, test_process, test_loader, board, stop)
            if training.is_due(config.trainer.save_freq_epoch):
                if run.is_main:
                    save_numbered(checkpoints, training.checkpoint(), config.saver.keep)
                saver.save_validated()


def check(config: EasyDict, path: Path) -> None:
    """Check the settings before anything is loaded or trained."""
    size, crop = config.dataset.input_size, config.dataset.crop

    def network() -> None:
        with torch.device("meta"):
            create_classifier_unet(**model_kwargs(config.classifier), image_size=crop or size)
        if crop is not None and config.classifier.classifier_pool == "attention":
            text = "attention learns a vector for each position, so it cannot guide images larger than dataset.crop"
            raise UsageError(f"classifier_pool: {text}; set adaptive")

    lists = [(split, lambda split=split: check_sdas_list(config, split, "classifier")) for split in ("train", "test")]
    collect_errors(
        path,
        [
            ("dataset", lambda: check_training_size(size, crop, config.classifier.channel_mult)),
            ("classifier", network),
            ("TrainSampler", lambda: SpacedDiffusion(**config.TrainSampler)),
            ("TestSampler", lambda: SpacedDiffusion(**config.TestSampler)),
            *trainer_checks(config.trainer),
            *lists,
        ],
    )


def build_network(config: EasyDict, resumed: bool) -> torch.nn.Module:
    """The classifier, from classifier.pertrain_path unless the run is resumed."""
    start_weights = None if resumed else pretrained_path(config.classifier)
    if start_weights is None and not resumed:
        log.info("training from scratch (classifier.pertrain_path is not set)")
    kwargs, size = model_kwargs(config.classifier), config.dataset.crop or config.dataset.input_size
    return create_classifier_unet(**kwargs, image_size=size, pertrain_path=start_weights)


def train_one_epoch(
    training: Training, process: SpacedDiffusion, loader: DataLoader, board: Board, saver: Saver
) -> None:
    """One pass over the images, or over the remaining ones if the epoch was resumed."""
    config, run, progress = training.config, training.run, training.progress
    training.model.train()
    meter = training.meter
    stream = meter.waiting_for(progress_bar(loader, run, f"epoch {progress.epoch + 1}"))
    for group in accumulation_groups(len(loader), config.trainer.accumulate):
        seed_step(config.random_seed, progress.step, run.rank)
        for micro, batch in enumerate(islice(stream, group)):
            image, label = (batch[name].to(run.device, non_blocking=True) for name in ("image", "label"))
            t = torch.randint(process.num_timesteps, (len(image),), device=run.device)
            with distributed.no_sync(training.model, micro + 1 < group):
                with autocast(run.device, training.precision):
                    logits = training.model(process.q_sample(image, t), process.model_timesteps(t)).float()
                loss = F.cross_entropy(logits, label)
                training.stepper.backward(loss / group)
            top1, top3 = correct(logits.detach(), label)
            values = {"loss": loss.detach(), "top1": top1.mean(), "top3": top3.mean()}
            meter.add(values, len(image) * run.world_size)
        training.finish_step()
        if progress.step % config.trainer.print_freq_step == 0:
            report_step(training, board)
        saver.after_step()
        if training.is_over:
            return


def correct(logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the label has the highest logit, and one of the three highest: two (N,) float tensors."""
    best = logits.topk(min(3, logits.shape[1]), dim=1).indices == label[:, None]
    return best[:, 0].float(), best.any(dim=1).float()


@torch.no_grad()
def validate(
    training: Training, process: SpacedDiffusion, loader: DataLoader, board: Board, stop: StopRequest
) -> float:
    """Log top-1 and top-3 accuracy on the noisy test images of all ranks, overall and by t; returns top-1.

    Each image is classified once in each of T_BINS equal ranges of t, with its own noise.
    """
    run, progress = training.run, training.progress
    model = training.ema.model if training.ema is not None else training.network
    model.eval()
    counts = torch.zeros(4, T_BINS, dtype=torch.float64)  # images, top-1, top-3, finite logits by range of t
    for batch in progress_bar(loader, run, "validation", stop=stop):
        image, label = (batch[name].to(run.device, non_blocking=True) for name in ("image", "label"))
        for k in range(T_BINS):
            t, noise = draw_for(batch["index"], k, process.num_timesteps, image)
            with autocast(run.device, training.precision):
                logits = model(process.q_sample(image, t, noise), process.model_timesteps(t)).float()
            top1, top3 = correct(logits, label)
            finite = logits.isfinite().all(1).float()
            counts[:, k] += torch.stack([torch.ones_like(top1), top1, top3, finite]).sum(1).double().cpu()
    distributed.all_reduce_sum(counts)
    seen, top1, top3, finite = counts.sum(1).tolist()
    if finite < seen:
        raise RunError(f"epoch {progress.epoch}: the logits are not finite; start anew with a lower learning rate")
    by_t = (counts[1] / counts[0].clamp(min=1)).tolist()
    images = counted(round(seen / T_BINS), "image")
    log.info("epoch %d  top-1 %.4f  top-3 %.4f  over %s", progress.epoch, top1 / seen, top3 / seen, images)
    log.info("  top-1 by t from 0 to T: %s", "  ".join(f"{value:.3f}" for value in by_t))
    board.add_scalar("validation/top1", top1 / seen, progress.step)
    board.add_scalar("validation/top3", top3 / seen, progress.step)
    for k, value in enumerate(by_t):
        board.add_scalar(f"validation_top1_by_t/{k * process.num_timesteps // T_BINS:04d}", value, progress.step)
    return top1 / seen


def draw_for(indices: torch.Tensor, k: int, steps: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A timestep in range k and noise for each image, the same in every validation."""
    t, noise = [], []
    for index in indices.tolist():
        generator = torch.Generator().manual_seed(index * T_BINS + k)
        low, high = k * steps // T_BINS, max((k + 1) * steps // T_BINS, k * steps // T_BINS + 1)
        t.append(torch.randint(low, min(high, steps), (), generator=generator))
        noise.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(t).to(like.device), torch.stack(noise).to(like)


if __name__ == "__main__":
    cli.run(main)
