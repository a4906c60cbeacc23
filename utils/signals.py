"""Stop a run: at the first signal, it finishes the step and saves its state; a second signal ends it at once."""

import atexit
import multiprocessing
import multiprocessing.util  # must register its exit function before this module does, so that it runs later
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
# Ctrl-C reaches a rank twice, from the terminal and from the launcher; within this time, it counts once.
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
        """The signal that any rank has received, or 0; all ranks have to call this together.

        Ranks may receive a signal at different steps, but have to stop after the same step.
        """
        if self.run.world_size == 1:
            return self.signal
        # A CPU tensor, so that this waits for the other ranks but not for a GPU.
        return int(distributed.all_reduce_max(torch.tensor(self.signal)))


@contextmanager
def stop_requests(run: Run) -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGINT and SIGUSR1."""
    request = StopRequest(run)
    before = {name: signal.signal(getattr(signal, name), request.receive) for name in NAMES}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def outlive_signals() -> None:
    """Keep a loader worker alive when a signal stops the job: its rank still has to finish the step.

    Launchers and terminals signal the rank's process group, so the worker leaves it. SLURM signals every process, so
    the worker ignores these signals. It ends when its rank tells it to, or when the rank has ended.
    """
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    for name in NAMES:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """Kill the loader workers that still run when a rank ends.

    Otherwise, multiprocessing would send them SIGTERM, which they ignore, and wait for them forever.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
    for worker in workers:
        worker.kill()
