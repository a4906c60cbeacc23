"""Logging on rank 0: to the terminal, to a file, and to tensorboard."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import Run
from utils.files import delete_older
from utils.names import shown
from utils.signals import StopRequest

log = logging.getLogger("realnet")

LOG_SECONDS = 12.0
PICTURES = "pictures"


class _TqdmHandler(logging.StreamHandler):
    """Prints above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log file; if it cannot be written, a line says so once, and the run goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record
        log.removeHandler(self)
        reason = getattr(sys.exc_info()[1], "strerror", None) or sys.exc_info()[1]
        log.warning("warning: %s: cannot be written (%s); the run goes on without it", self.baseFilename, reason)


class _Lines(logging.Formatter):
    """Lines in which names from files cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class Board:
    """Takes what is to be shown in tensorboard; this one, for ranks other than 0, shows nothing."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...

    def add_histogram(self, name: str, values: Any, step: int) -> None: ...

    def add_image(self, name: str, image: Any, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard(Board):
    """Writes to tensorboard. Pictures get a file per step, so that old ones can be deleted: they would fill the disk.

    Args:
        folder: of the tensorboard files; pictures go to its subfolder PICTURES.
        keep: how many steps with pictures to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        # Imported here, because it takes a second, which commands that fail early should not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.keep, self.writer_class = folder, keep, SummaryWriter
        self.numbers, self.pictures, self.step = SummaryWriter(str(folder)), None, -1
        self.broken = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._try(self.numbers.add_scalar, name, value, step)

    def add_histogram(self, name: str, values: Any, step: int) -> None:
        self._try(self.numbers.add_histogram, name, values, step)

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Add an (H,W,3) uint8 picture."""
        self._try(self._add_image, name, image, step)

    def _add_image(self, name: str, image: Any, step: int) -> None:
        if self.pictures is None or step != self.step:
            self._close_pictures()
            folder = self.folder / PICTURES
            delete_older(folder.glob("events.*"), self.keep - 1)
            self.pictures, self.step = self.writer_class(str(folder), filename_suffix=f".step{step}"), step
        self.pictures.add_image(name, image, step, dataformats="HWC")

    def _close_pictures(self) -> None:
        if self.pictures is not None:
            self.pictures.close()

    def close(self) -> None:
        self._try(self._close_pictures)
        self._try(self.numbers.close)

    def _try(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function that writes; once the disk is full, a line says so, and nothing more is written."""
        if self.broken:
            return
        try:
            function(*args)
        except OSError as error:
            self.broken = True
            reason = error.strerror or error
            log.warning("warning: %s: cannot be written (%s); tensorboard will lack what follows", self.folder, reason)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Start logging to the terminal, and nowhere else."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(level)
    terminal = _TqdmHandler()
    terminal.setFormatter(_Lines("%(message)s"))
    log.addHandler(terminal)


def log_to_file(path: Path) -> None:
    """Log to a file as well, behind what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)


def set_up_logging(run: Run, log_dir: str | Path, name: str, keep_pictures: int) -> Board:
    """Start logging to the terminal, to `log_dir`/<name>.log and to tensorboard; silent on other ranks than 0.

    Args:
        keep_pictures: how many steps with pictures tensorboard keeps.
    """
    log_to_terminal(logging.INFO if run.is_main else logging.ERROR)
    if not run.is_main:
        return Board()
    log_to_file(Path(log_dir) / f"{name}.log")
    return TensorBoard(Path(log_dir) / name, keep_pictures)


def _logged(items: Iterable, description: str, total: int | None) -> Iterator:
    """The items; how many are done is logged every LOG_SECONDS, for phases whose steps log nothing themselves."""
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > LOG_SECONDS:
            log.info("%s: %d%s done", description, count, f" of {total}" if total else "")
            last = time.monotonic()
        yield item


def progress_bar(
    items: Iterable, run: Run, description: str, total: int | None = None, stop: StopRequest | None = None
) -> tqdm:
    """Go through items with a progress bar on rank 0, hidden if stderr is not a terminal.

    Args:
        stop: for phases without steps, which end between two items when a signal has arrived. Training loops leave it
            out, as all ranks have to end after the same step there (training.Saver).

    Raises:
        Stopped: a signal has arrived.
    """
    if stop is not None:
        total = len(items) if total is None and isinstance(items, Sized) else total
        items = stop.heeded(items)
        if run.is_main and not sys.stderr.isatty():
            items = _logged(items, description, total)
    quiet = not run.is_main or not sys.stderr.isatty()
    return tqdm(items, desc=description, total=total, leave=False, disable=quiet, dynamic_ncols=True)
