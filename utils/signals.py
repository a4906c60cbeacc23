"""Ending in good order: a first signal lets the step finish and the state be saved, a second ends at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from utils import distributed
from utils.distributed import Run
from utils.errors import Stopped

# SLURM announces the end of an allocation with SIGUSR1; Windows lacks it.
NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# A launcher passes on a signal that the terminal has sent to all processes already.
SAME_SIGNAL_SECONDS = 1.0


class StopRequest:
    """Whether a signal has asked this run to end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.signal = 0
        self.since = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; all ranks have to ask together.

        Ranks get a signal at different steps, and stop after the same one.
        """
        if self.run.world_size == 1:
            return self.signal
        # On the CPU: this waits for the other ranks, but for no device.
        return int(distributed.all_reduce_max(torch.tensor(self.signal)))

    def exit(self, number: int) -> None:
        raise Stopped(number)


@contextmanager
def stop_requests(run: Run) -> Iterator[StopRequest]:
    """Listen to SIGTERM, SIGINT and SIGUSR1."""
    request = StopRequest(run)
    before = {name: signal.signal(getattr(signal, name), request.receive) for name in NAMES}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
