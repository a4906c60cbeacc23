"""The images that predict.py scores: one image, a folder, a list, or paths on standard input."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from datasets.images import SUFFIXES, list_images
from utils.errors import UsageError

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Input:
    """An image to score.

    Args:
        path: path of the file.
        name: its name in the results: the path below the input folder, or the path in the list.
    """

    path: Path
    name: str


def find_inputs(argument: str, image_dir: str | None, stdin: Iterable[str]) -> tuple[Iterable[Input], int | None]:
    """The images that --input names, and how many there are (None if not known in advance).

    Args:
        argument: an image, a folder, a text file with a path per line (relative to the working directory or to the
            file), an image list (.json, relative to image_dir), or "-" for paths on stdin.
        image_dir: image folder of the settings that the model was trained with.

    Raises:
        UsageError: the input does not exist, or holds no image.
    """
    if argument == "-":
        return (Input(Path(line.strip()), line.strip()) for line in stdin if line.strip()), None
    path = Path(argument)
    if path.is_dir():
        inputs = [Input(file, file.relative_to(path).as_posix()) for file in list_images(path)]
        if not inputs:
            raise UsageError(f"--input {path}: holds no image ({' '.join(SUFFIXES)})")
    elif not path.is_file():
        raise UsageError(f"--input {path} does not exist")
    elif path.suffix.lower() in SUFFIXES:
        inputs = [Input(path, path.name)]
    else:
        inputs = _listed(path, image_dir)
    return inputs, len(inputs)


def _listed(path: Path, image_dir: str | None) -> list[Input]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise UsageError(f"--input {path}: neither an image nor UTF-8 text that lists images") from None
    inputs = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("{"):
            try:
                name = json.loads(line)["filename"]
                inputs.append(Input(Path(image_dir or path.parent) / name, name))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{path}, line {number}: not a JSON object with a filename") from None
        elif line:
            file = Path(line)
            beside = path.parent / file
            inputs.append(Input(beside if not file.exists() and beside.exists() else file, line))
    if not inputs:
        raise UsageError(f"--input {path}: lists no image")
    return inputs


class ResultNames:
    """Gives each input a distinct name for its pictures, in the same subfolder as the input."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, name: str) -> str:
        """A relative path without suffix that no other input has."""
        parts = [part for part in Path(os.path.splitext(name)[0]).parts if part not in ("/", "..", os.sep)]
        base = "/".join(part.replace(":", "") for part in parts) or "image"
        chosen, number = base, 2
        while chosen.lower() in self.taken:
            chosen, number = f"{base}_{number}", number + 1
        self.taken.add(chosen.lower())
        return chosen


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Yield function(item) for every item, in order. Threads compute up to `ahead` results in advance."""
    items = iter(items)
    with ThreadPoolExecutor(min(ahead, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(function, item) for item in islice(items, ahead)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(items, 1)]
            yield result
