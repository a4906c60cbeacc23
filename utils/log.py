"""Logging on rank 0: to the terminal, to a file, and to tensorboard."""

import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import Run

log = logging.getLogger("realnet")


class _TqdmHandler(logging.StreamHandler):
    """Prints above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class SilentBoard:
    """Stands in for tensorboard's SummaryWriter on ranks other than 0."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None: ...

    def add_image(self, *args: Any, **kwargs: Any) -> None: ...

    def add_histogram(self, *args: Any, **kwargs: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def log_to_terminal(level: int = logging.INFO) -> None:
    """Start logging to the terminal, and nowhere else."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(level)
    terminal = _TqdmHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)


def set_up_logging(run: Run, log_dir: str | Path, name: str) -> Any:
    """Start logging to the terminal and `log_dir`/<name>.log; returns a tensorboard writer (silent on other ranks)."""
    log_to_terminal(logging.INFO if run.is_main else logging.ERROR)
    if not run.is_main:
        return SilentBoard()
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(Path(log_dir) / f"{name}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    # Imported here, because it takes a second, which commands that fail early should not wait for.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(Path(log_dir) / name))


def progress_bar(items: Iterable, run: Run, description: str, total: int | None = None) -> tqdm:
    """A progress bar on rank 0, hidden if stderr is not a terminal."""
    quiet = not run.is_main or not sys.stderr.isatty()
    return tqdm(items, desc=description, total=total, leave=False, disable=quiet, dynamic_ncols=True)


class Meter:
    """Means since the last print. The sums stay on the device, so that only printing waits for it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Any] = {}
        self.steps = 0
        self.images = 0
        self.start = time.perf_counter()

    def add(self, values: dict[str, Any], images: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += images

    def read(self) -> tuple[dict[str, float], float]:
        """Return the means and the images per second, and start over."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        rate = self.images / max(time.perf_counter() - self.start, 1e-9)
        self.reset()
        return means, rate
