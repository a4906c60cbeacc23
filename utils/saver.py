"""Saves a training: when a save is due, and when a signal ends the run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.checkpoint import LAST, save_for_resume
from utils.errors import Stopped
from utils.signals import StopRequest, signal_name
from utils.training import Training

log = logging.getLogger("realnet")


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
            log.info("%s: saved after step %d; the same command with --resume continues", signal_name(number), step)
            raise Stopped(number)

    def after_epoch(self) -> None:
        """Count the epoch if trainer.max_step has not cut it short; its steps may not all have been skipped.

        Raises:
            RunError: they were.
        """
        progress, steps = self.training.progress, self.training.steps_per_epoch
        self.training.stepper.check_epoch(progress.step_in_epoch)
        if progress.step_in_epoch >= steps:
            progress.finish_epoch()

    @contextmanager
    def save_if_stopped(self) -> Iterator[None]:
        """Around a validation: if a signal ends it, save the state so that a resumed run validates anew."""
        try:
            yield
        except Stopped as stopped:
            if self.training.progress.step_in_epoch == 0:
                self.training.progress.reopen_epoch(self.training.steps_per_epoch)
            self.save()
            step = self.training.progress.step
            text = "%s: saved after step %d, in the validation; the same command with --resume continues"
            log.info(text, signal_name(stopped.signal), step)
            raise

    def save_validated(self) -> None:
        """Save with the mark that what follows the last step is done: a resumed run has nothing to repeat."""
        self.training.progress.validated = self.training.progress.step
        self.save()

    def save(self) -> None:
        if self.training.run.is_main:
            save_for_resume(self.folder, self.training.state_dict())
