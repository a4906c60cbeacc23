"""Shared by the training scripts: the state of a training run, saving it, and reporting its steps."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from utils import distributed
from utils.checkpoint import LAST, save_for_resume, state_dict_of
from utils.distributed import Run, peak_memory
from utils.errors import Stopped, UsageError
from utils.log import Meter
from utils.optim import EMA, EpochLoss, Stepper, build_optimizer
from utils.precision import resolve_precision, training_precision
from utils.signals import StopRequest

log = logging.getLogger("realnet")


@dataclass
class Progress:
    """How far a training run has got.

    Args:
        epoch: finished epochs.
        step: optimiser steps in total.
        step_in_epoch: optimiser steps since the last finished epoch.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0

    def finish_step(self) -> None:
        self.step += 1
        self.step_in_epoch += 1

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name in asdict(self):
            setattr(self, name, int(state[name]))


@dataclass
class Training:
    """A network in training, with everything that goes into its checkpoints.

    Args:
        config: the settings of the run.
        network: the network whose weights are saved.
        model: the same network, compiled if the settings say so, and wrapped for several ranks.
        stepper: optimiser and loss scale.
        precision: "off", "bf16" or "fp16".
        settings: what checkpoints save about the network, by key: arch, and classes or config.
        figures: results that checkpoints save, by key: best_metric or acc.
        ema: the averaged network, if one is kept.
        epoch_loss: the mean loss of the epoch, if checkpoints save it.
    """

    config: EasyDict
    run: Run
    network: nn.Module
    model: nn.Module
    stepper: Stepper
    precision: str
    settings: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    ema: EMA | None = None
    epoch_loss: EpochLoss | None = None
    progress: Progress = field(default_factory=Progress)

    def checkpoint(self) -> dict[str, Any]:
        """The part of a checkpoint that other scripts use: weights, settings of the network, and figures."""
        content = {
            "epoch": self.progress.epoch,
            **self.settings,
            "state_dict": self.network.state_dict(),
            **self.figures,
        }
        if self.ema is not None:
            content["ema_state_dict"] = self.ema.state_dict()
        if self.epoch_loss is not None:
            content["loss"] = self.epoch_loss.mean()
        return content

    def _parts(self) -> dict[str, Any]:
        """The parts that a resumed run restores, by checkpoint key; each has state_dict and load_state_dict."""
        parts = {
            "state_dict": self.network,
            "ema_state_dict": self.ema,
            "stepper": self.stepper,
            "epoch_loss": self.epoch_loss,
            "position": self.progress,
        }
        return {key: part for key, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint that a run can resume from. Random numbers need no state: each step seeds them."""
        return {**self.checkpoint(), **{key: part.state_dict() for key, part in self._parts().items()}}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        weights = state_dict_of(content)
        for key, part in self._parts().items():
            part.load_state_dict(weights if key == "state_dict" else content[key])
        self.figures = {name: content[name] for name in self.figures}

    def resume(self, content: dict[str, Any], folder: Path) -> None:
        """Continue from a checkpoint that checkpoint.load_for_resume has read from a folder.

        Raises:
            UsageError: the checkpoint was saved with other settings.
        """
        try:
            self.load_state_dict(content)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UsageError(f"{folder}: cannot be resumed with these settings ({reason})") from error
        log.info("resumed %s after epoch %d, step %d", folder, self.progress.epoch, self.progress.step)


def set_up_training(
    config: EasyDict,
    network: nn.Module,
    run: Run,
    settings: dict[str, Any],
    figures: dict[str, float] | None = None,
    epoch_loss: EpochLoss | None = None,
) -> Training:
    """Build the Training of a network that is on its device already: optimiser, average, precision, and ranks."""
    trainer = config.trainer
    network = distributed.synchronize_batchnorm(network, run)
    if trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    ema = None if trainer.get("ema_decay") is None else EMA(network, trainer.ema_decay)
    optimizer = build_optimizer(trainer.optimizer, network, run.device)
    precision = training_precision(trainer, run.device)
    stepper = Stepper(network, optimizer, precision, trainer.clip_max_norm, trainer.max_bad_steps)
    model = distributed.parallel(torch.compile(network) if trainer.compile else network, run)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log.info("%.1f M trainable parameters on %s x %d", trainable / 1e6, run.device.type, run.world_size)
    return Training(config, run, network, model, stepper, precision, settings, figures or {}, ema, epoch_loss)


class Saver:
    """Saves checkpoints to resume from: every trainer.save_freq_step steps, and when a signal ends the run.

    Args:
        folder: of the checkpoints.
        stop: the stop request of this run.
    """

    def __init__(self, folder: Path, training: Training, stop: StopRequest) -> None:
        self.folder, self.training, self.stop = folder, training, stop

    def after_step(self) -> None:
        """Save if a save is due, and end the run if a signal has arrived.

        Raises:
            Stopped: a signal has arrived; the state is saved.
            RunError: too many steps in a row had no finite loss.
        """
        training, step = self.training, self.training.progress.step
        every = training.config.trainer.save_freq_step
        # The check waits for the device, so on a GPU it is not done after every step.
        if training.run.device.type == "cpu" or step % training.stepper.max_bad_steps == 0:
            training.stepper.check(self.folder / LAST)
        number = self.stop.agreed()
        if number or (every and step % every == 0):
            self.save()
        if number:
            log.info("signal %d: saved after step %d; continue with --resume", number, step)
            raise Stopped(number)

    def save(self) -> None:
        if self.training.run.is_main:
            save_for_resume(self.folder, self.training.state_dict())


def report_step(training: Training, meter: Meter, board: Any) -> None:
    """Print and record the mean losses since the last report, speed, learning rate, memory and skipped steps."""
    progress, stepper = training.progress, training.stepper
    means, rate = meter.read()
    skipped = int(stepper.bad_steps)
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    warning = f"  {skipped} steps skipped (loss not finite)" if skipped else ""
    log.info("epoch %d  step %d  %s  %.1f images/s%s", progress.epoch + 1, progress.step, losses, rate, warning)
    scalars = {
        **means,
        "images_per_second": rate,
        "learning_rate": stepper.optimizer.param_groups[0]["lr"],
        "peak_memory_GiB": peak_memory(training.run.device) / 2**30,
        "skipped_steps": skipped,
    }
    for name, value in scalars.items():
        board.add_scalar(f"train/{name}", value, progress.step)


def trainer_checks(trainer: dict) -> list[tuple[str, Callable[[], Any]]]:
    """Checks of a `trainer` section, for config.collect_errors."""
    cpu = torch.device("cpu")
    return [
        ("trainer.optimizer", lambda: build_optimizer(trainer.optimizer, nn.Linear(1, 1), cpu)),
        ("trainer.amp", lambda: resolve_precision(trainer.amp, cpu)),
    ]
