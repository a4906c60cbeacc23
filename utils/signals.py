"""Stopping a run: the first signal lets the step finish and the state be saved, the second one ends it at once."""

import atexit
import multiprocessing
import multiprocessing.util  # registers its exit function first, so that it runs after the one here
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from utils import distributed
from utils.distributed import Run

# SLURM announces the end of an allocation with SIGUSR1; Windows lacks it.
NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# A launcher passes on a signal that the terminal has sent to all processes already.
SAME_SIGNAL_SECONDS = 1.0


class StopRequest:
    """The signal that asked this run to end, if one did."""

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

        Ranks receive a signal at different steps, and have to stop after the same one.
        """
        if self.run.world_size == 1:
            return self.signal
        # On the CPU: this waits for the other ranks, but for no device.
        return int(distributed.all_reduce_max(torch.tensor(self.signal)))


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


def outlive_signals() -> None:
    """Keep a loader worker alive when a signal asks the whole job to stop: its rank still finishes the step.

    Launchers and terminals signal the process group of the rank, which the worker leaves; SLURM signals every process.
    The worker ends when its rank asks for it, or has ended itself.
    """
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    for name in NAMES:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """Kill the loader workers that are left when a rank ends.

    multiprocessing would send them SIGTERM, which they ignore, and wait for them forever.
    """
    left = multiprocessing.active_children()
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in left:
        worker.kill()
