"""The images that predict.py scores: one image, a folder, a list, or paths on standard input."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.folders import (
    SUFFIXES,
    FoundImages,
    find_images,
    has_image_content,
    is_mask_folder,
    masks_beside,
    names_masks,
    not_read,
)
from datasets.images import read_image
from datasets.lists import first_outside, lies_outside, with_slashes
from utils.config import shortened
from utils.errors import UsageError
from utils.log import log

SCORES, HEAT_MAPS, MASKS = "scores.jsonl", "heatmaps", "masks"  # what predict.py writes into its output folder
MASK_VALUES = 8


@dataclass(frozen=True)
class Input:
    """An image to score.

    Args:
        path: path of the file.
        name: its name in the results: the path below the input folder, or the path in the list.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Inputs:
    """The images that --input names.

    Args:
        images: in the order in which they are to be scored.
        count: how many there are, or None if that is not known in advance.
        problems: what is wrong with parts of the input, e.g. a folder that cannot be opened.
    """

    images: Iterable[Input]
    count: int | None
    problems: list[str] = field(default_factory=list)


def find_inputs(
    argument: str,
    image_dir: str | None,
    stdin: Iterable[str],
    output: Path | None = None,
    follow_links: bool = False,
) -> Inputs:
    """Find the images that --input names.

    Args:
        argument: an image, a folder, a text file with a path per line (relative to the working directory or to the
            file), an image list (.json, relative to image_dir), or "-" for paths on stdin.
        image_dir: image folder of the settings that the model was trained with.
        stdin: lines of standard input; bytes if it has a buffer.
        output: the results' folder, whose images are no inputs.
        follow_links: whether links below image_dir may lead out of it; those in an input folder always may.

    Raises:
        UsageError: the input does not exist, or holds no image.
    """
    if argument == "-":
        # File names that are not UTF-8 come through undamaged.
        lines = (os.fsdecode(line).strip() for line in getattr(stdin, "buffer", stdin))
        return Inputs((_listed_file(line, Path()) for line in lines if line), None)
    check_input(argument)
    path = Path(argument)
    if path.is_dir():
        return _in_folder(path, output)
    # A single image is read whatever its ending, because it was named.
    single = path.suffix.lower() in SUFFIXES or has_image_content(path)
    inputs = [Input(path, path.name)] if single else _listed(path, image_dir, follow_links)
    return Inputs(inputs, len(inputs))


def check_input(argument: str) -> None:
    """Refuse an --input that does not exist, which can be told before a model is loaded.

    Raises:
        UsageError: neither a file nor a folder, nor "-".
    """
    path = Path(argument)
    if argument != "-" and not (path.is_dir() or path.is_file()):
        raise UsageError(f"--input {path} does not exist")


def no_input(path: Path, results: Path | None) -> bool:
    """Whether a folder below the input holds masks, or results as those in the folder `results`, a resolved path."""
    drawn = path.name in (HEAT_MAPS, MASKS) and (path.parent / SCORES).is_file()
    masks = is_mask_folder(path) or (names_masks(path) and _holds_masks(path))
    return drawn or masks or _holds_own_pictures(path) or (results is not None and path.resolve() == results)


def _in_folder(folder: Path, output: Path | None) -> Inputs:
    results = output.resolve() if output else None
    found = find_images(folder, lambda path: no_input(path, results))
    masks = masks_beside(found.images)
    images = [path for path in found.images if path not in masks]
    _tell_left_out(folder, found, len(masks))
    if not images:
        others = not_read(found.others)
        raise UsageError(f"--input {folder}: holds no image ({others or ' '.join(SUFFIXES)})")
    problems = [f"{path} cannot be opened ({reason})" for path, reason in found.closed]
    return Inputs([Input(path, path.relative_to(folder).as_posix()) for path in images], len(images), problems)


def _holds_own_pictures(folder: Path) -> bool:
    """Whether training, evaluation or preparation have written the pictures in a folder, by its place and name."""
    beside = folder.parent
    drawn = folder.name.endswith("_vis") and any(beside.glob("*.yaml"))
    return drawn or (folder.name == "preview" and (beside / "samples").is_dir())


def _holds_masks(folder: Path) -> bool:
    """Whether the first images in a folder have few grey values, as masks do."""
    images = find_images(folder).images[:3]
    try:
        return bool(images) and all(len(np.unique(read_image(path))) <= MASK_VALUES for path in images)
    except UsageError:
        return False


def _tell_left_out(folder: Path, found: FoundImages, masks: int) -> None:
    if found.left_out:
        names = [f"{path.relative_to(folder).as_posix()}/" for path in found.left_out]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        text = "left out: masks or results, not images to score: %s%s (to score such a folder, pass it as --input)"
        log.info(text, ", ".join(names[:5]), more)
    if masks:
        log.info("left out: masks that lie beside their images (x_mask.png beside x.png): %d", masks)
    if found.others:
        log.info("%s", not_read(found.others))


def _listed(path: Path, image_dir: str | None, follow_links: bool) -> list[Input]:
    try:
        # surrogateescape: file names need not be UTF-8.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"--input {path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise UsageError(f"--input {path}: neither an image nor text that lists images")
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        raise UsageError(f"--input {path}: is a table; pass a text file with the path of one image per line")
    lines = [line.strip() for line in text.split("\n")]
    inputs, names = [], []
    root = Path(image_dir or path.parent)
    for number, line in enumerate(lines, start=1):
        if line.startswith("{"):
            try:
                name = json.loads(line)["filename"]
                name = with_slashes(name, root)
                names.append(name)
                inputs.append(Input(root / name, name))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{path}, line {number}: not a JSON object with a filename") from None
            if lies_outside(name):
                raise UsageError(f"{path}, line {number}: {name} lies outside {root}")
        elif line:
            inputs.append(_listed_file(line, path.parent))
    if not inputs:
        raise UsageError(f"--input {path}: lists no image")
    # Another text file than a list, or a list in another folder than its images.
    if not any(os.path.exists(image.path) for image in inputs):
        first = shortened(str(inputs[0].path))
        raise UsageError(f"--input {path}: none of the {len(inputs)} images that it lists exists, e.g. {first}")
    outside = None if follow_links else first_outside(root, names)
    if outside is not None:
        raise UsageError(f"{path}: {outside} is reached by a link that leads out of {root}; list its path instead")
    return inputs


def _listed_file(line: str, folder: Path) -> Input:
    """A path that is relative to the working directory or to the list's folder, perhaps written on Windows."""
    for name in dict.fromkeys((line, line.replace("\\", "/"))):
        for file in (Path(name), folder / name):
            # Not Path.exists(), which raises an error if a name is too long.
            if os.path.exists(file):
                return Input(file, name)
    return Input(Path(line), line)


class ResultNames:
    """Gives each image a distinct name for its result files, in the same subfolder as the image.

    Args:
        suffixes: of the result files.
        taken: names that are in use.
    """

    def __init__(self, suffixes: Iterable[str] = ("png",), taken: Iterable[str] = ()) -> None:
        self.like_files = re.compile(rf"\.({'|'.join(suffixes)})$", re.IGNORECASE)
        self.taken = {name.lower() for name in taken}

    def of(self, name: str) -> str:
        """A relative path without suffix that no other image has.

        Example:
            >>> names = ResultNames()
            >>> [names.of(name) for name in ("a/x.png", "a/x.bmp", "b/x.png")]
            ['a/x', 'a/x_2', 'b/x']
        """
        path = os.path.splitext(name)[0].replace("\\", "/")
        parts = [part.replace(":", "") for part in path.split("/") if part not in ("", ".", "..")] or ["image"]
        # A folder "x.png" could not lie beside the result file "x.png".
        *folders, stem = parts
        base = "/".join(
            [*(self.like_files.sub(lambda end: f"_{end[1].lower()}", part) for part in folders), stem or "image"]
        )
        chosen, number = base, 2
        while chosen.lower() in self.taken:
            chosen, number = f"{base}_{number}", number + 1
        self.taken.add(chosen.lower())
        return chosen
