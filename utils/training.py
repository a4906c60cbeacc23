"""Shared by the training scripts: the state of a training run, and what sets it up."""

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from utils import distributed
from utils.checkpoint import (
    clear_earlier_run,
    has_finite_weights,
    load_weights,
    refuse_earlier_run,
    state_dict_of,
)
from utils.config import MOST, changed_settings, plain, shortened
from utils.counts import counted
from utils.device import use_fast_kernels
from utils.distributed import Run
from utils.errors import UsageError
from utils.lock import folder_lock
from utils.log import Board, set_up_logging
from utils.meter import Forecast, Meter
from utils.optim import EMA, EpochLoss, Stepper, build_optimizer, check_optimizer, learning_rate_factor
from utils.precision import resolve_precision, training_precision
from utils.run_record import log_run, write_record

log = logging.getLogger("realnet")


BEST_SYNTHETIC = "best_synthetic"  # the figure of held-out images
STALE = "stale_validations"  # the figure that trainer.patience limits
OPTIONAL = (BEST_SYNTHETIC, STALE)  # figures that an earlier run with other settings may not have


@dataclass
class Progress:
    """How far a training run has got.

    Args:
        epoch: finished epochs.
        step: optimiser steps in total.
        step_in_epoch: optimiser steps since the last finished epoch.
        validated: steps after which everything that follows them was done too, if that was recorded.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    validated: int = 0

    def finish_step(self) -> None:
        self.step += 1
        self.step_in_epoch += 1

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0

    def reopen_epoch(self, steps: int) -> None:
        """Take finish_epoch back, so that a resumed run repeats what follows an epoch's last step: the validation."""
        self.epoch -= 1
        self.step_in_epoch = steps

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        # A checkpoint from before `validated` was recorded is taken as complete.
        state = {"validated": state["step"], **state}
        for name in asdict(self):
            value = state[name]
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
                raise ValueError(f"position.{name} is {shortened(value)}, not a number of steps or epochs")
            setattr(self, name, value)


@dataclass
class Training:
    """A network in training, with everything that goes into its checkpoints.

    Args:
        config: the settings of the run.
        network: the network whose weights are saved.
        model: the same network, wrapped for several ranks.
        stepper: optimiser and loss scale.
        precision: "off", "bf16" or "fp16".
        settings: what checkpoints save about the network, by key: arch, and classes or config.
        figures: results that checkpoints save, by key: best_metric or acc.
        measured: what the last validation has found out about the network as it is, saved with it, by key.
        ema: the averaged network, if one is kept.
        epoch_loss: the mean loss of the epoch, if checkpoints save it.
        train_list, test_list: number of images and a hash of their names (see lists.ImageList.summary).
        steps_per_epoch: optimiser steps of a whole epoch, for the remaining time.
        json_log: file that gets a line of JSON per report, and per validation of a detector.
        meter: what was measured since the last report.
        class_name: the class that is trained on, if it is one.
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
    train_list: str = ""
    test_list: str = ""
    steps_per_epoch: int = 0
    json_log: Path | None = None
    meter: Meter = field(default_factory=Meter)
    class_name: str | None = None
    forecast: Forecast = field(default_factory=Forecast)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first_figures = dict(self.figures)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        trainer = self.config.trainer
        steps = self.steps_per_epoch * trainer.max_epoch
        return steps if trainer.max_step is None else min(steps, trainer.max_step)

    @property
    def is_complete(self) -> bool:
        """Whether it is over, and what follows the last step is done too: a stop may have come in between."""
        return self.is_over and (self.out_of_patience or self.progress.validated == self.progress.step)

    @property
    def is_over(self) -> bool:
        """Whether trainer.max_epoch, trainer.max_step or trainer.patience is reached."""
        trainer = self.config.trainer
        enough = trainer.max_step is not None and self.progress.step >= trainer.max_step
        return enough or self.progress.epoch >= trainer.max_epoch or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether too many validations in a row have brought no better checkpoint."""
        patience = self.config.trainer.get("patience")
        return patience is not None and self.figures.get(STALE, 0) >= patience

    @property
    def deployed(self) -> nn.Module:
        """The network that is validated and used later: the averaged one, if there is one."""
        return self.network if self.ema is None else self.ema.model

    def is_due(self, epochs: int) -> bool:
        """Whether something is due that is done every few epochs, and at the end."""
        return self.is_over or (self.progress.step_in_epoch == 0 and self.progress.epoch % epochs == 0)

    def finish_step(self) -> None:
        """Make the optimiser step that the backward passes have prepared, and count it."""
        schedule = self.config.trainer.schedule
        self.stepper.step(learning_rate_factor(schedule, self.progress.step, self.total_steps))
        if self.ema is not None:
            self.ema.update(self.network, self.progress.step)
        self.progress.finish_step()
        self.measured = {}
        self.meter.finish_step()
        # Reading the number of skipped steps waits for the device.
        self.forecast.finish_step(self.total_steps - self.progress.step, lambda: int(self.stepper.bad_steps))

    def checkpoint(self) -> dict[str, Any]:
        """The part of a checkpoint that other scripts use: weights, settings of the network, and figures."""
        content = {
            "epoch": self.progress.epoch,
            **self.settings,
            "state_dict": self.network.state_dict(),
            **self.figures,
            **self.measured,
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
        parts = {key: part.state_dict() for key, part in self._parts().items()}
        return {**self.checkpoint(), **parts, "run": self._run_settings()}

    def _run_settings(self) -> dict[str, Any]:
        """What a resumed run is compared with."""
        lists = {"training list": self.train_list, "test list": self.test_list}
        if self.class_name is not None:
            lists["class"] = self.class_name
        return {"settings": plain(self.config), "ranks": self.run.world_size, **lists}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        weights = state_dict_of(content)
        for key, part in self._parts().items():
            state = weights if key == "state_dict" else content[key]
            if not isinstance(state, dict):
                raise ValueError(f"{key} is a {type(state).__name__}, not a mapping")
            network = part.model if isinstance(part, EMA) else part
            if isinstance(network, nn.Module):
                load_weights(network, state, "the checkpoint", "the settings of the networks")
            else:
                part.load_state_dict(state)
        if self.progress.step and self.stepper.lacks_state:
            raise ValueError("the optimiser's state is empty")
        content = {**{name: value for name, value in self.first_figures.items() if name in OPTIONAL}, **content}
        for name in self.figures:
            if not isinstance(content[name], (int, float)) or math.isnan(content[name]):
                raise ValueError(f"{name} is {shortened(content[name])}, not a number")
        if not has_finite_weights(self.network):
            raise ValueError("the weights hold values that are not finite")
        if self.progress.step_in_epoch > self.steps_per_epoch > 0:
            raise ValueError(f"position.step_in_epoch is {self.progress.step_in_epoch}, beyond the end of the epoch")
        self.figures = {name: content[name] for name in self.figures}

    def begin(self, saved: dict[str, Any] | None, folder: Path, args: argparse.Namespace) -> None:
        """Resume from a checkpoint, or (--overwrite) clear the folder of an earlier run, and record the new one."""
        if saved:
            self.resume(saved, folder)
        elif args.overwrite:
            clear_earlier_run(folder, self.run)
        if self.json_log is not None:
            write_record(self.run, self.json_log.parent, self.json_log.stem, self.config)

    def resume(self, content: dict[str, Any], folder: Path) -> None:
        """Continue from a checkpoint that checkpoint.load_for_resume has read from a folder.

        Learning rate and other settings of this run apply. All that differ from the earlier run's are logged, also if
        the checkpoint is refused because of them.

        Raises:
            UsageError: the checkpoint belongs to other networks, or to another class or other classes.
        """
        before, now = content.get("classes"), self.settings.get("classes")
        if isinstance(before, (list, tuple)) and before and now and list(before) != list(now):
            texts = [", ".join(map(str, names)) for names in (before, now)]
            raise UsageError(
                f"{folder}: cannot be resumed: it was trained on the classes {texts[0]}, and the image list has "
                f"{texts[1]}; their numbers would mean other classes"
            )
        changes = self._changes_since(content["run"] if isinstance(content.get("run"), dict) else None)
        for change in changes:
            log.info("  changed since: %s", change)
            if change.startswith("class: "):
                raise UsageError(f"{folder}: cannot be resumed: it was trained on another class ({change[7:]})")
        try:
            self.load_state_dict(content)
        # What a damaged or foreign file may hold in place of a state.
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UsageError(f"{folder}: cannot be resumed with these settings ({reason})") from error
        log.info("resumed %s after epoch %d, step %d", folder, self.progress.epoch, self.progress.step)
        self._apply_changes(changes)
        if self.is_complete:
            trainer = self.config.trainer
            done = counted(trainer.max_epoch, "epoch (trainer.max_epoch) is", "epochs (trainer.max_epoch) are")
            if trainer.max_step is not None and self.progress.step >= trainer.max_step:
                done = counted(trainer.max_step, "step (trainer.max_step) is", "steps (trainer.max_step) are")
            elif self.out_of_patience:
                which = "without a better checkpoint (trainer.patience)"
                done = counted(trainer.patience, f"validation {which} is", f"validations {which} are")
            log.info("nothing is left to do: %s done", done)

    def _changes_since(self, before: dict[str, Any] | None) -> list[str]:
        """What differs from the run that is resumed, as "key: old -> new"."""
        if before is None:
            return []
        now = self._run_settings()
        # An older checkpoint holds less.
        now = {key: value for key, value in now.items() if key in before}
        return [text.removeprefix("settings.") for text in changed_settings(before, now)]

    def _apply_changes(self, changes: list[str]) -> None:
        """Begin figures anew that are of other images or another metric, and the epoch if its batches are others."""
        synthetic = {BEST_SYNTHETIC} & set(self.figures)
        of_test = set(self.figures) - {BEST_SYNTHETIC, STALE}
        for change, names, what in (
            ("test list:", of_test, "other test images"),
            ("training list:", synthetic, "other held-out images"),
            ("evaluator.key_metric:", of_test | synthetic, "another metric"),
        ):
            if names and any(text.startswith(change) for text in changes):
                # With them, the patience for better ones.
                anew = {name: self.first_figures[name] for name in self.figures if name in names | {STALE}}
                self.figures.update(anew)
                log.info("  the best figures so far are of %s and begin anew", what)
        cuts = ("dataset.batch_size:", "trainer.accumulate:", "ranks:", "training list:", "random_seed:")
        if self.progress.step_in_epoch and any(change.startswith(cuts) for change in changes):
            self.progress.step_in_epoch = 0
            log.info("  the epoch has other batches now and begins anew")


@contextmanager
def training_folders(
    name: str, checkpoints: Path, log_dir: Path, config: EasyDict, args: argparse.Namespace, run: Run
) -> Iterator[Board]:
    """Lock the folder of the checkpoints, start logging, set up the GPU; yields the board for tensorboard.

    A run that is refused here writes nothing. One that fails before it trains adds to the log, but the record and the
    checkpoints in the folders stay those of the run before: Training.begin replaces them.

    Args:
        name: of the script, without its ending.

    Raises:
        UsageError: another run writes there, or an earlier one did and the arguments do not say what to do with it.
    """
    with folder_lock(checkpoints, run):
        distributed.on_main(lambda: refuse_earlier_run(checkpoints, args.resume, args.overwrite))
        board = set_up_logging(run, log_dir, name, config.saver.keep_pictures)
        use_fast_kernels(run.device, config.trainer.tf32, config.trainer.cudnn_benchmark)
        try:
            log_run(run)
            yield board
        finally:
            board.close()


def set_up_training(
    config: EasyDict,
    network: nn.Module,
    run: Run,
    settings: dict[str, Any],
    lists: tuple[str, str],
    figures: dict[str, float] | None = None,
    epoch_loss: EpochLoss | None = None,
    compiled: Sequence[nn.Module] | None = None,
) -> Training:
    """Build the Training of a network that is on its device already: optimiser, average, precision, and ranks.

    Args:
        lists: summaries of the training and test lists.
        compiled: the parts that trainer.compile compiles; None for the whole network.
    """
    trainer = config.trainer
    distributed.require_same({"image lists": list(lists)})
    network = distributed.synchronize_batchnorm(network, run)
    if trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    ema = None if trainer.get("ema_decay") is None else EMA(network, trainer.ema_decay)
    optimizer = build_optimizer(trainer.optimizer, network, run.device)
    precision = training_precision(trainer, run.device)
    stepper = Stepper(network, optimizer, precision, trainer.clip_max_norm, trainer.max_bad_steps)
    if trainer.compile:
        for part in [network] if compiled is None else compiled:
            part.compile()  # in place: names of tensors stay, and the average is not compiled
    model = distributed.parallel(network, run)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log.info("%.1f M trainable parameters on %s x %d", trainable / 1e6, run.device.type, run.world_size)
    training = Training(config, run, network, model, stepper, precision, settings, figures or {}, ema, epoch_loss)
    training.train_list, training.test_list = lists
    return training


def trainer_checks(trainer: EasyDict) -> list[tuple[str, Callable[[], Any]]]:
    """Checks of a `trainer` section, for config.collect_errors."""
    cpu = torch.device("cpu")
    return [
        ("trainer.optimizer", lambda: check_optimizer(trainer.optimizer)),
        ("trainer.amp", lambda: resolve_precision(trainer.amp, cpu)),
    ]
