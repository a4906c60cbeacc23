"""Running means, speed and remaining time of a training."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from utils.counts import counted

log = logging.getLogger("realnet")


@dataclass(frozen=True)
class Reading:
    """What a meter measured since the last reading.

    Args:
        means: by name.
        images_per_second: of all ranks.
        data_share: share of the time that was spent waiting for data, 0 .. 1.
        step_seconds: per optimiser step.
    """

    means: dict[str, float]
    images_per_second: float
    data_share: float
    step_seconds: float


class Meter:
    """Covers exactly the steps since it was last read. Sums stay on the device, so that only reading waits for it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Any] = {}
        self.additions = self.images = self.steps = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    def waiting_for(self, batches: Iterable) -> Iterator:
        """The same batches; the time until each arrives counts as waiting for data."""
        source = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def add(self, values: dict[str, Any], images: int) -> None:
        """Add the values of a batch, as tensors on the device or numbers."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.additions += 1
        self.images += images

    def finish_step(self) -> None:
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside, for example on a validation."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self) -> Reading:
        """Return what was measured, and start over."""
        means = {name: float(value) / self.additions for name, value in self.sums.items()}
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        reading = Reading(means, self.images / elapsed, min(1.0, self.waited / elapsed), elapsed / max(1, self.steps))
        self.reset()
        return reading


class Forecast:
    """Says once, after the first steps of a run, how long the rest will take, and where it is too long, what to do."""

    FIRST, LAST = 5, 20  # steps of the run that are timed; the very first ones are slow
    DAY = 24 * 3600

    def __init__(self) -> None:
        self.steps, self.start = 0, 0.0

    def finish_step(self, left: int, wait: Callable[[], object]) -> None:
        """Count a step.

        Args:
            left: optimiser steps that are left.
            wait: waits for the device.
        """
        self.steps += 1
        if self.steps not in (self.FIRST, self.LAST):
            return
        wait()
        if self.steps == self.FIRST:
            self.start = time.perf_counter()
            return
        each = (time.perf_counter() - self.start) / (self.LAST - self.FIRST)
        if left > 0:
            steps, duration = counted(left, "step is left", "steps are left"), timedelta(seconds=round(left * each))
            log.info("%s, about %s without validations (%.2g s a step)", steps, duration, each)
        if left * each > self.DAY:
            log.warning(
                "warning: that is more than a day; fewer steps (trainer.max_step), a smaller dataset.input_size or "
                "network (for detectors, prepare_data.py --preset quick), trainer.amp: auto or more GPUs shorten it"
            )
