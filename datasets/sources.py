"""The images that anomalies are made of: finding them, leaving out what cannot be read, and reading them."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from datasets.edits import StoredPairs, read_pairs
from datasets.folders import FoundImages, find_images, not_read
from datasets.images import header_problem
from utils.choices import EDIT
from utils.counts import counted
from utils.errors import UsageError

log = logging.getLogger("realnet")

Read = TypeVar("Read")

THREADS = 16  # that open source images: most of the time is spent waiting for the disk
ATTEMPTS = 20  # source images in a row that may turn out to be broken while they are decoded
# Values of anomaly_types: of good images alone, and with a folder of textures.
OF_GOOD_IMAGES = "{normal: 0.5, cutpaste: 0.17, self: 0.16, noise: 0.17}"
WITH_TEXTURES = "{normal: 0.5, dtd: 0.2, cutpaste: 0.1, self: 0.1, noise: 0.1}"
WITHOUT_FOLDER = f"dataset.train.anomaly_types: {OF_GOOD_IMAGES}, which needs no other images"


def source_images(folder: str | None, setting: str, hint: str, tell: bool) -> list[Path]:
    """The images in a folder whose headers can be read.

    Args:
        setting: key of dataset.train that names the folder. hint: what to do without it.
        tell: whether to log what is left out.

    Raises:
        UsageError: the folder is not set, missing or empty, or holds broken images only.
    """
    found = find_images(folder) if folder else None
    if found is None or not found.images:
        missing = "holds no image" if folder and Path(folder).is_dir() else "does not exist"
        problem = f"{folder} {missing}" if folder else "not set"
        others = not_read(found.others) if found else ""
        raise UsageError(f"dataset.train.{setting}: {problem}{f' ({others})' if others else ''}; {hint}")
    problems = _header_problems(tuple(found.images))
    readable = [path for path, problem in zip(found.images, problems, strict=True) if problem is None]
    broken = [problem for problem in problems if problem is not None]
    if not readable:
        raise UsageError(f"dataset.train.{setting}: no image in {folder} can be read ({broken[0]}); {hint}")
    if tell:
        _tell_left_out(f"dataset.train.{setting}", len(problems), broken, found)
    return readable


def stored_pairs(folder: str | None, tell: bool) -> StoredPairs:
    """The pairs in dataset.train.edit_dir whose images and masks have headers that can be read.

    Raises:
        UsageError: as for source_images.
    """
    hint = f"run synthesize.py --source edit first, or set {WITHOUT_FOLDER}"
    try:
        found = read_pairs(folder) if folder else None
    except UsageError as error:
        raise UsageError(f"dataset.train.edit_dir: {error}; {hint}") from None
    if found is None or not found.masks:
        problem = f"{folder} holds no pair of the type {EDIT}" if folder else "not set"
        raise UsageError(f"dataset.train.edit_dir: {problem}; {hint}")
    problems = {}
    for paths in (tuple(found.masks), tuple(found.masks.values())):
        for image, problem in zip(found.masks, _header_problems(paths), strict=True):
            if problem is not None:
                problems.setdefault(image, problem)
    if len(problems) == len(found.masks):
        first = next(iter(problems.values()))
        raise UsageError(f"dataset.train.edit_dir: no pair in {folder} can be read ({first}); {hint}")
    if tell:
        _tell_left_out("dataset.train.edit_dir", len(found.masks), list(problems.values()), FoundImages())
    masks = {image: mask for image, mask in found.masks.items() if image not in problems}
    of_good = {good: [image for image in images if image in masks] for good, images in found.of_good.items()}
    return StoredPairs(masks, of_good)


def _tell_left_out(setting: str, count: int, broken: list[str], found: FoundImages) -> None:
    if broken:
        more = f"\n  and {len(broken) - 3} more" if len(broken) > 3 else ""
        lines = "".join(f"\n  {problem}" for problem in broken[:3])
        of = f"of {counted(count, 'image')} cannot be read and"
        left_out = counted(len(broken), f"{of} is left out", f"{of} are left out")
        log.warning("%s: %s:%s%s", setting, left_out, lines, more)
    if found.others:
        log.warning("%s: %s", setting, not_read(found.others))
    for path, reason in found.closed:
        log.warning("%s: %s cannot be opened (%s)", setting, path, reason)


@cache
def _header_problems(paths: tuple[Path, ...]) -> list[str | None]:
    """The header_problem of each image. Kept, because settings are checked before the data set is built."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(header_problem, paths, chunksize=64))


def first_readable(paths: Sequence[Path], index: int, read: Callable[[Path], Read]) -> tuple[Path, Read]:
    """Path and image at `index`, or the next one that can be decoded, so that a broken one does not end the training.

    Raises:
        UsageError: the next ATTEMPTS images are all broken.
    """
    for step in range(ATTEMPTS):
        path = paths[(index + step) % len(paths)]
        try:
            return path, read(path)
        except UsageError as error:
            _warn_once(str(error))
    raise UsageError(f"{paths[index]} and the {ATTEMPTS - 1} images after it cannot be read; are they still there?")


@cache
def _warn_once(text: str) -> None:
    log.warning("%s; the next image is used instead", text)
