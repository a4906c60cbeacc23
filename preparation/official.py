"""Recognises the benchmarks in their official folders."""

import csv
from pathlib import Path, PurePosixPath

from datasets.catalog import DatasetInfo
from datasets.lists import Sample
from preparation.classes import UNSPLIT, DatasetOnDisk, read_class
from preparation.findings import MISSING, SURPLUS, UNREADABLE
from preparation.folders import Reader, is_class
from preparation.names import TEST, TRAIN
from preparation.roles import report_unused
from utils.counts import counted
from utils.errors import UsageError

SPLIT_FILE = "split_csv/1cls.csv"
DEPTH = 3


def official(folder: Path, dataset: str, info: DatasetInfo) -> DatasetOnDisk:
    """Recognise a benchmark in its official folders, in or below a folder.

    Raises:
        UsageError: no class of it is found, or VisA's list of images is missing or unreadable.
    """
    root = _deepest_match(folder, info)
    if root is None:
        hint = f"; it looks like the single class {folder.name}: pass the folder above it" if is_class(folder) else ""
        hint = hint or "; for images of your own, choose another name as --dataset"
        classes = ", ".join(info.classes)
        raise UsageError(f"{folder}: holds none of the classes of {dataset} ({classes}); expected {info.layout}{hint}")
    reader = Reader(root)
    if (root / SPLIT_FILE).is_file():
        data = DatasetOnDisk(root, f"{dataset} with {SPLIT_FILE}", findings=reader.findings)
        _read_split_file(reader, root / SPLIT_FILE, info, data.samples)
    else:
        data = DatasetOnDisk(root, f"{dataset}, folders {info.layout.rpartition('; or ')[2]}", findings=reader.findings)
        for name in filter(lambda name: (root / name).is_dir(), info.classes):
            if (root / name / "Data").is_dir():
                raise UsageError(f"{root}: {SPLIT_FILE} is missing; it lists the training and test images")
            for split, samples in read_class(reader, root / name, name).items():
                data.samples[split] += samples
        undecided = sorted({sample.clsname for sample in data.samples[UNSPLIT]})
        if undecided:
            raise UsageError(f"{root}: {', '.join(undecided)} has no train folder; expected {info.layout}")
    report_unused(reader, data.all(), [root / name for name in info.classes])
    _compare(data, info)
    return data


def _deepest_match(folder: Path, info: DatasetInfo) -> Path | None:
    """The folder that holds the most classes: this one, or one a few levels below."""
    best, most, level = None, 0, [folder]
    for _ in range(DEPTH):
        for path in level:
            folders = [path / name for name in info.classes if (path / name).is_dir()]
            count = sum(is_class(sub) or (sub / "Data").is_dir() for sub in folders)
            if count > most:
                best, most = path, count
        level = [sub for path in level for sub in Reader(folder).subfolders(path)] if best is None else []
    return best


def _read_split_file(reader: Reader, path: Path, info: DatasetInfo, samples: dict[str, list[Sample]]) -> None:
    """Add the samples in VisA's list of images, whose columns are object, split, label, image, mask."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not readable as CSV ({error})") from None
    columns = ["object", "split", "label", "image", "mask"]
    if not lines or [column.strip() for column in lines[0]] != columns:
        raise UsageError(f"{path}, line 1: expected the columns {','.join(columns)}")
    listed: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        where = f"{SPLIT_FILE}, line {number}"
        problem = _line_problem(line, info, listed)
        if problem:
            reader.report(UNREADABLE, where, problem)
            continue
        clsname, split, label, image, mask = (cell.strip() for cell in line)
        listed[image] = number
        if not (reader.root / image).is_file():
            reader.report(MISSING, where, f"{image} does not exist")
            continue
        if mask and not (reader.root / mask).is_file():
            reader.report(MISSING, where, f"{mask} does not exist")
            mask = ""
        samples[split].append(Sample(image, int(label == "anomaly"), clsname, mask or None))
    for name in info.classes:
        folder = reader.root / name / "Data" / "Images"
        for image in reader.images(folder) if folder.is_dir() else []:
            if reader.name(image) not in listed:
                reader.report(SURPLUS, image, f"is not in {SPLIT_FILE}")


def _line_problem(line: list[str], info: DatasetInfo, listed: dict[str, int]) -> str | None:
    """What is wrong with a line of the split file, or None."""
    if len(line) != 5:
        return f"has {counted(len(line), 'column')} instead of 5"
    clsname, split, label, image, mask = (cell.strip() for cell in line)
    if clsname not in info.classes:
        return f"{clsname!r} is not a class of the data set"
    if split not in (TRAIN, TEST) or label not in ("normal", "anomaly"):
        return f"split {split!r} and label {label!r}; expected train or test, and normal or anomaly"
    if split == TRAIN and label == "anomaly":
        return f"{image} is an anomaly, but listed for training"
    for name in filter(None, (image, mask)):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name} lies outside the data set's folder"
    if image in listed:
        return f"{image} is already in line {listed[image]}"
    return None


def _compare(data: DatasetOnDisk, info: DatasetInfo) -> None:
    """Compare classes and counts with the published ones."""
    reader = Reader(data.root, data.findings)
    counts = {name: [0, 0] for name in info.classes}
    for i, split in enumerate((TRAIN, TEST)):
        for sample in data.samples[split]:
            counts[sample.clsname][i] += 1
    for name, expected in info.counts.items():
        if not any(counts[name]):
            reader.report(MISSING, name, "the whole class")
            continue
        for split, have, want in zip(("training", "test"), counts[name], expected, strict=True):
            if have != want:
                images = counted(have, f"{split} image")
                reader.report(MISSING if have < want else SURPLUS, name, f"{images} (published: {want})")
    for folder in reader.subfolders(data.root):
        if folder.name not in info.classes and is_class(folder):
            reader.report(SURPLUS, folder, "is not a class of the data set")
