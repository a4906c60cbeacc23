"""Finds the images that arrive in a folder, once they are complete."""

import os
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from datasets.folders import SUFFIXES, image_stem, is_visible
from evaluation.inputs import Input, no_input
from utils.errors import UsageError
from utils.log import log
from utils.signals import StopRequest

SLICE_SECONDS = 0.1  # how soon a pause ends after a signal

Stamp = tuple[int, int]  # modification time in ns, and size


class FolderWatch:
    """Looks for new images in a folder and below it, with the rules of predict.py --input.

    An image is complete when two looks find it with the same size and modification time. Files that were handed out are
    known by their names and not looked at again, except those that failed: they are handed out again when they change.

    Args:
        folder: where images arrive.
        output: the results' folder, whose images are no inputs.
        done: names that have results.

    Raises:
        UsageError: the folder does not exist.
    """

    def __init__(self, folder: Path, output: Path, done: Collection[str] = ()) -> None:
        if not folder.is_dir():
            raise UsageError(f"--watch {folder}: is not a folder")
        self.folder, self.results = folder, output.resolve()
        self.taken = set(done)
        self.arriving: dict[str, tuple[int, Stamp]] = {}  # the look that found it first, and its last stamp
        self.handed_out: dict[str, Stamp] = {}  # by the last look
        self.broken: dict[str, Stamp] = {}
        self.named: set[str] = set()
        self.closed: set[str] = set()
        self.left_out: set[str] = set()
        self.looks = 0

    def look(self) -> list[Input]:
        """The images that are complete since the last look, in the order in which they arrived."""
        self.looks += 1
        present = set(self._names())
        stems = {os.path.splitext(name)[0].lower() for name in present}
        arriving, complete = {}, []
        for name in present - self.taken:
            stamp = None if _is_mask(name, stems) else self._stamp(name)
            if stamp is None or stamp == self.broken.get(name):
                continue
            first, before = self.arriving.get(name, (self.looks, None))
            if stamp == before:
                complete.append((first, stamp, name))
            else:
                arriving[name] = first, stamp
        self.arriving = arriving
        self.handed_out = {name: stamp for _, stamp, name in complete}
        self.taken.update(self.handed_out)
        return [Input(self.folder / name, name) for _, _, name in sorted(complete)]

    def failed(self, name: str) -> bool:
        """Hand an image of the last look out again once it has changed; returns whether this is its first failure."""
        self.taken.discard(name)
        self.broken[name] = self.handed_out[name]
        first = name not in self.named
        self.named.add(name)
        return first

    def scored(self, name: str) -> None:
        """An image of the last look has a result now."""
        self.broken.pop(name, None)

    def _names(self) -> Iterator[str]:
        """The paths of all images below the folder, relative to it; their files are not opened, nor asked for sizes."""
        folders, links, entered = [""], [], set()
        while folders or links:
            # Links come last, so that an image which can be reached twice has its real path.
            prefix = (folders or links).pop()
            path = self.folder / prefix
            try:
                status = os.stat(path)
                with os.scandir(path) as found:
                    entries = list(found)
            except OSError as error:
                if prefix not in self.closed:
                    log.warning("warning: %s cannot be opened (%s); it is tried again", path, error.strerror or error)
                    self.closed.add(prefix)
                continue
            if prefix in self.closed:
                log.info("%s can be opened again", path)
                self.closed.discard(prefix)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            for entry in entries:
                if not is_visible(entry.name):
                    continue
                name = prefix + entry.name
                if entry.is_dir():
                    if not self._leaves_out(name):
                        (links if entry.is_symlink() else folders).append(f"{name}/")
                elif os.path.splitext(name)[1].lower() in SUFFIXES:
                    yield name

    def _leaves_out(self, name: str) -> bool:
        # Asked once, because the content of some folders has to be read for it; those that are empty fill later.
        if name not in self.left_out and no_input(self.folder / name, self.results):
            self.left_out.add(name)
        return name in self.left_out

    def _stamp(self, name: str) -> Stamp | None:
        """None if the file is gone, or no regular file."""
        try:
            status = os.stat(self.folder / name)
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def _is_mask(name: str, stems: Collection[str]) -> bool:
    """Whether it is the mask of an image that is there, too; by the rule of folders.masks_beside."""
    path = Path(name)
    stem = image_stem(path.stem)
    return stem != path.stem and path.with_name(stem).as_posix().lower() in stems


def pause(seconds: float, stop: StopRequest) -> None:
    """Wait; ends early when the run is asked to stop."""
    end = time.monotonic() + seconds
    while not stop.signal and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_SECONDS))
