"""Stop a run: at the first signal, it finishes the step and saves its state; a second signal ends it at once."""

import atexit
import multiprocessing
import multiprocessing.util  # must register its exit function before this module does, so that it runs later
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import torch

from utils import distributed
from utils.distributed import Run
from utils.errors import Stopped

# SLURM announces the end of an allocation with SIGUSR1; Windows lacks it.
NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# Ctrl-C reaches a rank twice, from the terminal and from the launcher; within this time, it counts once.
SAME_SIGNAL_SECONDS = 1.0
# Several ranks agree on stopping at every tenth step, or after this time if steps are slow: launchers kill after 30 s.
AGREE_STEPS = 10
AGREE_SECONDS = 5.0

Item = TypeVar("Item")


def signal_name(number: int) -> str:
    """What a user calls a signal.

    Example:
        >>> signal_name(2), signal_name(15)
        ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """The signal that asked this run to end, if one did.

    Training loops ask `agreed` after every step. Phases without steps (calibration, AFS, validation, evaluation) pass
    this to log.progress_bar, or wrap what they go through in `heeded`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.signal = 0
        self.since = 0.0
        self.steps_to_wait = 0
        self.steps_counted, self.counted_since = 0, time.monotonic()

    def receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if self.run.is_main:
                _say(
                    f"{signal_name(number)}: stopping, and saving if there is something to save; once more ends at once"
                )
        elif time.monotonic() - self.since > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; all ranks have to call this together, after every step.

        Ranks may receive a signal at different steps, but have to stop after the same step. With several ranks, they
        ask each other at every tenth step, or more often if steps are slow; at other steps the answer is 0.
        """
        if self.run.world_size == 1:
            return self.signal
        self.steps_counted += 1
        self.steps_to_wait -= 1
        if self.steps_to_wait > 0:
            return 0
        seconds = (time.monotonic() - self.counted_since) / self.steps_counted
        # A CPU tensor, so that this waits for the other ranks but not for a GPU. All ranks go by the slowest one.
        number, seconds = distributed.all_reduce_max(torch.tensor([self.signal, seconds], dtype=torch.float64)).tolist()
        self.steps_to_wait = int(min(AGREE_STEPS, max(1, AGREE_SECONDS / max(seconds, 1e-9))))
        self.steps_counted, self.counted_since = 0, time.monotonic()
        return int(number)

    def heed(self) -> None:
        """End a phase without steps if this rank has received a signal.

        Raises:
            Stopped: it has. Ranks may raise this at different batches: they have no step in common here.
        """
        if self.signal:
            raise Stopped(self.signal)

    def heeded(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items one by one; raises Stopped between them once this rank has received a signal."""
        for item in items:
            self.heed()
            yield item


def _say(text: str) -> None:
    """Print a line from a signal handler, where print() may fail because it has interrupted another print().

    It goes to the terminal if stderr is one, below the progress bar, and else to stdout, where the log goes.
    """
    line, stream = (f"\n{text}\n", 2) if os.isatty(2) else (f"{text}\n", 1)
    with suppress(OSError):
        os.write(stream, line.encode())


@contextmanager
def stop_requests(run: Run) -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGINT and SIGUSR1.

    Raises:
        Stopped: this rank was waiting for another one, which has ended because of the signal.
    """
    request = StopRequest(run)
    before = {name: signal.signal(getattr(signal, name), request.receive) for name in NAMES}
    try:
        yield request
    except RuntimeError as error:
        if request.signal and distributed.is_lost_connection(error):
            raise Stopped(request.signal) from error
        raise
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
