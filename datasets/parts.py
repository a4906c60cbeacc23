"""Which images show the same part: several exposures or views of one part must not stand on both sides of a split."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from utils.errors import UsageError


def parts_of(source: str | None, names: Sequence[str], setting: str = "dataset.train.parts") -> dict[str, str]:
    """The part that each image shows, by file name.

    Args:
        source: a CSV file (first column: file name, with or without its folders; second: part; between commas,
            semicolons or tabs; a first line that names no image is a heading), or a regular expression that is searched
            for in file names. Its groups, or else the whole match, name the part. None: nothing is known.
        names: file names as in the image lists.
        setting: what error messages call the source.

    Returns:
        Parts by file name. An image that the source does not name is missing: a part of its own.

    Raises:
        UsageError: the file is missing or not such a table, the expression is none, or none of the images is named.

    Example:
        >>> parts_of(r"kos\\d+", ["train/good/kos01_Part0.jpg", "train/good/kos01_Part1.jpg"])
        {'train/good/kos01_Part0.jpg': 'kos01', 'train/good/kos01_Part1.jpg': 'kos01'}
    """
    if source is None:
        return {}
    try:
        found = _from_table(Path(source), names) if source.lower().endswith(".csv") else _from_names(source, names)
        if names and not found:
            raise ValueError(f"{source} names the part of none of the images, e.g. {names[0]}")
    except ValueError as error:
        raise UsageError(f"{setting}: {error}") from None
    return found


def _from_names(pattern: str, names: Sequence[str]) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern} is neither a .csv file nor a regular expression ({error})") from None
    matches = {name: expression.search(name) for name in names}
    return {
        name: " ".join(group or "" for group in match.groups() or [match[0]])
        for name, match in matches.items()
        if match is not None
    }


def _from_table(path: Path, names: Sequence[str]) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        # German spreadsheets write semicolons.
        delimiter = next((mark for mark in ",;\t" if mark in text.partition("\n")[0]), ",")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not readable as a table ({error})") from None
    listed = set(names)
    images = {*listed, *(PurePosixPath(name).name for name in names)}
    heading = int(bool(rows) and str(_path_in(rows[0])) not in images)
    short = [number for number, row in enumerate(rows, 1) if len(row) < 2 and number > heading]
    if short:
        raise ValueError(f"{path}, line {short[0]}: has no second column, which names the part")
    table: dict[str, str | None] = {}
    for row in rows[heading:]:
        full, part = _path_in(row), row[1]
        table[str(full)] = part.strip()
        if str(full) in listed:
            continue  # It is that image; one of the same name in another folder is not meant.
        # A bare name stands for the image too, unless files of several parts have it.
        same = table.get(full.name, part.strip()) == part.strip()
        table[full.name] = part.strip() if same else None
    looked_up = {name: table.get(name, table.get(PurePosixPath(name).name)) for name in names}
    return {name: part for name, part in looked_up.items() if part is not None}


def _path_in(row: Sequence[str]) -> PurePosixPath:
    """The file that a line of the table names."""
    return PurePosixPath(row[0].strip().replace("\\", "/"))
