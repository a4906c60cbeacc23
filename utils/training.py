"""What the training scripts share around their loops: how far they are, and when their state is saved."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from utils.checkpoint import state_dict_of
from utils.distributed import Run, peak_memory, resolve_precision
from utils.errors import Stopped, UsageError
from utils.log import Meter
from utils.optim import Stepper, build_optimizer
from utils.resume import LAST, save_resumable
from utils.signals import StopRequest

log = logging.getLogger("realnet")


@dataclass
class Position:
    """How far a training is.

    Args:
        epoch: finished epochs.
        step: optimiser steps in all.
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
    """What an epoch needs and a checkpoint holds; scripts add what is theirs.

    Args:
        network: whose weights are saved. model: the same, compiled and shared over ranks as the settings ask for.
    """

    config: EasyDict
    run: Run
    network: nn.Module
    model: nn.Module
    stepper: Stepper
    precision: str
    position: Position = field(default_factory=Position, kw_only=True)

    def resumable(self, own: dict[str, Any]) -> dict[str, Any]:
        """What a resumed run needs besides the weights and what is the script's own; random draws follow the step."""
        return {**own, "position": self.position.state_dict(), "stepper": self.stepper.state_dict()}

    def restore(self, content: dict[str, Any], path: Path, own: Callable[[dict[str, Any]], None]) -> None:
        """Continue from a saved state.

        Args:
            content: what resumable() gave.
            path: its folder, for messages.
            own: loads what is the script's own.

        Raises:
            UsageError: it was saved with other settings.
        """
        try:
            self.network.load_state_dict(state_dict_of(content))
            self.stepper.load_state_dict(content["stepper"])
            own(content)
            self.position.load_state_dict(content["position"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UsageError(f"{path}: cannot be resumed with these settings ({reason})") from error
        log.info("resumed %s after epoch %d, step %d", path, self.position.epoch, self.position.step)


class Saver:
    """Saves what a training resumes from: every so many steps, when asked to, and when a signal ends the run.

    Args:
        folder: of the checkpoints.
        stop: the signals.
        every: steps between two saves; 0 saves at the ends of epochs only.
        stepper: is asked whether the losses are finite.
        content: gives what is saved; called on all ranks, and only rank 0's is used.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        stop: StopRequest,
        every: int,
        stepper: Stepper,
        content: Callable[[], dict[str, Any]],
    ) -> None:
        self.folder, self.run, self.stop, self.every = folder, run, stop, every
        self.stepper, self.content = stepper, content

    def after_step(self, position: Position) -> None:
        """Save where it is time to, and end the run where a signal asks for it.

        Raises:
            Stopped: the state is saved.
            RunError: too many steps in a row had no finite loss.
        """
        # Asking waits for the device, so on a GPU not after every step.
        if self.run.device.type == "cpu" or position.step % self.stepper.max_bad_steps == 0:
            self.stepper.check(self.folder / LAST)
        number = self.stop.agreed()
        if number or (self.every and position.step % self.every == 0):
            self.save()
        if number:
            log.info("signal %d: saved after step %d; go on with --resume", number, position.step)
            raise Stopped(number)

    def save(self) -> None:
        content = self.content()
        if self.run.is_main:
            save_resumable(self.folder, content)


def report_step(meter: Meter, board: Any, position: Position, stepper: Stepper, run: Run) -> None:
    """Print and record the mean losses since the last report, speed, learning rate, memory and skipped steps."""
    means, rate = meter.read()
    skipped = int(stepper.bad_steps)
    text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    told = f"  {skipped} steps skipped (loss not finite)" if skipped else ""
    log.info("epoch %d  step %d  %s  %.1f images/s%s", position.epoch + 1, position.step, text, rate, told)
    scalars = {
        **means,
        "images_per_second": rate,
        "learning_rate": stepper.optimizer.param_groups[0]["lr"],
        "peak_memory_GiB": peak_memory(run.device) / 2**30,
        "skipped_steps": skipped,
    }
    for name, value in scalars.items():
        board.add_scalar(f"train/{name}", value, position.step)


def trainer_checks(trainer: dict) -> list[tuple[str, Callable[[], Any]]]:
    """Checks of a `trainer` section, for config.check_together."""
    cpu = torch.device("cpu")
    return [
        ("trainer.optimizer", lambda: build_optimizer(trainer.optimizer, nn.Linear(1, 1), cpu)),
        ("trainer.amp", lambda: resolve_precision(trainer.amp, cpu)),
    ]
