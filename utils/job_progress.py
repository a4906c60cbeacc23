"""How far a job over several classes is: what is left, and for how long, in a progress bar or in the log."""

import logging
import sys
import time
from datetime import timedelta

from tqdm import tqdm

from utils.counts import counted
from utils.distributed import Run
from utils.log import LOG_SECONDS

log = logging.getLogger("realnet")


class JobProgress:
    """Counts images of a job that ranks share; rank 0 shows it: in a bar on a terminal, else every LOG_SECONDS.

    Args:
        total: images of all ranks.
        own: images of this rank. The others are taken to be as far.

    Example:
        >>> import torch
        >>> job = JobProgress(20, 10, Run(0, 2, torch.device("cpu")))
        >>> job.add(5, "bottle")
        >>> job.left
        10
    """

    def __init__(self, total: int, own: int, run: Run) -> None:
        self.total, self.own, self.own_done = total, own, 0
        self.start = self.last_line = time.monotonic()
        quiet = not run.is_main or not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="image", leave=False, disable=quiet, dynamic_ncols=True)

    @property
    def left(self) -> int:
        """Images of all ranks that are left, about."""
        return round(self.total * (1 - self.own_done / max(1, self.own)))

    @property
    def summary(self) -> str:
        """How many images are left, and about how long they take."""
        of = f"of {counted(self.total, 'image')}"
        left = counted(self.left, f"{of} is left", f"{of} are left")
        if not self.own_done or not self.left:
            return left
        seconds = (time.monotonic() - self.start) / self.own_done * (self.own - self.own_done)
        return f"{left}, about {timedelta(seconds=round(seconds))}"

    def add(self, count: int, class_name: str) -> None:
        """Count images of this rank that are done."""
        before = self.left
        self.own_done += count
        self.bar.set_description(class_name, refresh=False)
        self.bar.update(before - self.left)
        if self.bar.disable and time.monotonic() - self.last_line > LOG_SECONDS:
            log.info("%s: %s", class_name, self.summary)
            self.last_line = time.monotonic()

    def close(self) -> None:
        self.bar.close()
