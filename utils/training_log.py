"""What a training says of its steps: in the terminal, in tensorboard, and as lines of JSON."""

import json
import logging
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

from utils import distributed
from utils.counts import counted
from utils.distributed import peak_memory
from utils.errors import RunError
from utils.files import append_text
from utils.log import Board
from utils.training import Training

log = logging.getLogger("realnet")


def report_step(training: Training, board: Board) -> None:
    """Print and record what the meter measured since the last report, learning rate, memory and skipped steps."""
    progress, stepper, trainer = training.progress, training.stepper, training.config.trainer
    reading = training.meter.read()
    reading = replace(reading, means=distributed.mean_over_ranks(reading.means))
    if not training.run.is_main:
        return
    skipped, steps = int(stepper.bad_steps), training.total_steps
    eta = timedelta(seconds=round(max(0, steps - progress.step) * reading.step_seconds))
    parts = [
        f"epoch {progress.epoch + 1}/{trainer.max_epoch}",
        f"step {progress.step}/{steps}",
        *(f"{name} {value:.4f}" for name, value in reading.means.items()),
        f"{reading.images_per_second:.1f} images/s",
        f"data {100 * reading.data_share:.0f}%",
        f"eta {eta}",
        *([f"{counted(skipped, 'step')} skipped (loss not finite)"] if skipped else []),
    ]
    log.info("%s", "  ".join(parts))
    scalars = {
        **reading.means,
        "images_per_second": reading.images_per_second,
        "data_share": reading.data_share,
        "learning_rate": stepper.optimizer.param_groups[0]["lr"],
        "peak_memory_GiB": peak_memory(training.run.device) / 2**30,
        "skipped_steps": skipped,
    }
    for name, value in scalars.items():
        board.add_scalar(f"train/{name}", value, progress.step)
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    line = {"epoch": progress.epoch + 1, "step": progress.step, "eta_seconds": eta.total_seconds(), **finite}
    log_json(training, line)


def log_json(training: Training, line: dict[str, Any]) -> None:
    """Append a line to the JSON log of this training, if it has one."""
    if training.json_log is None:
        return
    try:
        append_text(training.json_log, json.dumps(line) + "\n")
    except RunError as error:
        # The disk is full, say: a save will end the run if it has to end.
        log.warning("warning: %s; the run goes on without this file", error)
        training.json_log = None
