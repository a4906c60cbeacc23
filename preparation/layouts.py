"""Recognises data sets on disk: the benchmarks' official folders, and the user's own in several layouts."""

import csv
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets.catalog import CATALOG, DatasetInfo
from datasets.lists import UNIFIED, Sample
from preparation.findings import AMBIGUOUS, MISSING, NO_MASK, SURPLUS, UNREADABLE, Finding
from preparation.folders import Reader, has_images, is_mask_folder
from preparation.masks import MaskIndex
from utils.errors import UsageError

TRAIN, TEST, UNSPLIT = "train", "test", "unsplit"
GOOD = ("good", "ok", "okay", "normal", "pass", "passed", "良品", "正常", "合格")
BAD = ("bad", "ko", "ng", "nok", "defect", "defects", "defective", "anomaly", "anomalous", "abnormal", "fail", "failed")
TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("test", "testing")
SPLIT_FILE = "split_csv/1cls.csv"
DEPTH = 3
OWN_LAYOUTS = (
    "train/good with test/<defect> (and ground_truth/<defect>); good with bad (or ok with ko); images of good parts "
    "only; or one such folder per class"
)


@dataclass
class DatasetOnDisk:
    """A data set found on disk.

    Args:
        root: the folder that the samples' file names are relative to.
        layout: the recognised layout, in words.
        samples: by TRAIN, TEST, or UNSPLIT if the folders assign them to neither.
        findings: what is missing, surplus or without a mask.
    """

    root: Path
    layout: str
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {TRAIN: [], TEST: [], UNSPLIT: []})
    findings: list[Finding] = field(default_factory=list)

    def all(self) -> list[Sample]:
        return [sample for samples in self.samples.values() for sample in samples]


def recognize(folder: Path, dataset: str) -> DatasetOnDisk:
    """Recognise the data set in a folder.

    Args:
        folder: the folder that the user passed; the data set may lie a few levels deeper.
        dataset: name of a benchmark, or any other name for the user's own images.

    Raises:
        UsageError: no such data set is found, or a class has a reserved name.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    data = _official(folder, dataset, CATALOG[dataset]) if dataset in CATALOG else _own(folder, dataset)
    for name in {sample.clsname for sample in data.all()}:
        if name in (UNIFIED, "all") or "," in name or "{" in name:
            raise UsageError(f"{folder}: a class cannot be called {name!r}; rename that folder")
    return data


# ---- one class -------------------------------------------------------------------------------------------------------


def _read_class(reader: Reader, folder: Path, clsname: str) -> dict[str, list[Sample]]:
    """The samples of a class folder in any layout, by TRAIN, TEST and UNSPLIT."""
    subfolders = reader.subfolders(folder)
    masks = MaskIndex(reader)
    for path in filter(is_mask_folder, subfolders):
        masks.add_folder(path)
    train, test = _named(subfolders, TRAIN_FOLDERS), _named(subfolders, TEST_FOLDERS)
    samples: dict[str, list[Sample]] = {TRAIN: [], TEST: [], UNSPLIT: []}
    if train:
        samples[TRAIN] = _train_samples(reader, train, clsname)
        if test:
            samples[TEST] = _samples(reader, test, clsname, masks)
        else:
            reader.report(MISSING, folder / TEST, "no such folder, so there is nothing to evaluate on")
    elif _named(subfolders, GOOD):
        samples[UNSPLIT] = _samples(reader, folder, clsname, masks)
    else:
        samples[TRAIN] = [Sample(reader.name(path), 0, clsname) for path in reader.images(folder)]
    masks.report_unused(but=GOOD)
    return samples


def _named(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    return next((folder for folder in folders if folder.name.lower() in names), None)


def _train_samples(reader: Reader, folder: Path, clsname: str) -> list[Sample]:
    """Good images of a train folder: those directly in it and in its subfolder `good`."""
    good = []
    for subfolder in reader.subfolders(folder):
        images = [] if is_mask_folder(subfolder) else reader.images(subfolder)
        if subfolder.name.lower() in GOOD:
            good += images
        elif images:
            reader.report(SURPLUS, subfolder, f"{len(images)} images that are not good; training uses good ones only")
    good += reader.images(folder, nested=False) if has_images(folder) else []
    return [Sample(reader.name(path), 0, clsname) for path in good]


def _samples(reader: Reader, folder: Path, clsname: str, masks: MaskIndex) -> list[Sample]:
    """Images of a folder with one subfolder per defect type; `good` (or ok, normal) holds the good images."""
    samples = []
    for subfolder in reader.subfolders(folder):
        if is_mask_folder(subfolder):
            continue
        images = reader.images(subfolder)
        if subfolder.name.lower() in GOOD:
            samples += [Sample(reader.name(path), 0, clsname) for path in images]
            continue
        for path in filter(is_mask_folder, reader.subfolders(subfolder)):
            masks.add_folder(path, subfolder.name)
        samples += _defective(reader, masks.split_off(images, subfolder), subfolder, clsname, masks)
    if has_images(folder):
        for path in reader.images(folder, nested=False):
            reader.report(SURPLUS, path, "is not in a folder that says whether it is good")
    return samples


def _defective(reader: Reader, images: list[Path], folder: Path, clsname: str, masks: MaskIndex) -> list[Sample]:
    same_name = defaultdict(list)
    for path in images:
        same_name[path.parent, path.stem.lower()].append(path)
    samples = []
    for path in images:
        namesakes = same_name[path.parent, path.stem.lower()]
        mask = masks.of(path, folder)
        if mask is not None and len(namesakes) > 1:
            names = " and ".join(image.name for image in namesakes)
            reader.report(AMBIGUOUS, path, f"{names} would share the mask {reader.name(mask)}; none uses it")
            mask = None
        samples.append(Sample(reader.name(path), 1, clsname, reader.name(mask) if mask else None))
    return samples


def report_masks(samples: list[Sample]) -> list[Finding]:
    """Findings for defective images without a mask: one per image, or one per class if no image of it has one."""
    findings = []
    for name in sorted({sample.clsname for sample in samples}):
        defective = [sample for sample in samples if sample.clsname == name and sample.label]
        lacking = [sample for sample in defective if sample.maskname is None]
        if lacking and len(lacking) == len(defective):
            text = f"none of the {len(lacking)} defective images has a mask: pixel metrics will be absent"
            findings.append(Finding(NO_MASK, name, text))
        else:
            findings += [Finding(NO_MASK, sample.filename, "has no mask") for sample in lacking]
    return findings


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def _official(folder: Path, dataset: str, info: DatasetInfo) -> DatasetOnDisk:
    root = _deepest_match(folder, info)
    if root is None:
        hint = f"; it looks like the single class {folder.name}: pass the folder above it" if _is_class(folder) else ""
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
            for split, samples in _read_class(reader, root / name, name).items():
                data.samples[split] += samples
        undecided = sorted({sample.clsname for sample in data.samples[UNSPLIT]})
        if undecided:
            raise UsageError(f"{root}: {', '.join(undecided)} has no train folder; expected {info.layout}")
    _compare(data, info)
    return data


def _is_class(folder: Path) -> bool:
    names = {path.name.lower() for path in Reader(folder).subfolders(folder)}
    return bool(names & {*TRAIN_FOLDERS, *GOOD})


def _deepest_match(folder: Path, info: DatasetInfo) -> Path | None:
    """The folder that holds the most classes: this one, or one a few levels below."""
    best, most, level = None, 0, [folder]
    for _ in range(DEPTH):
        for path in level:
            folders = [path / name for name in info.classes if (path / name).is_dir()]
            count = sum(_is_class(sub) or (sub / "Data").is_dir() for sub in folders)
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
        return f"has {len(line)} columns instead of 5"
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
                reader.report(MISSING if have < want else SURPLUS, name, f"{have} {split} images (published: {want})")
    for folder in reader.subfolders(data.root):
        if folder.name not in info.classes and _is_class(folder):
            reader.report(SURPLUS, folder, "is not a class of the data set")


# ---- the user's own images -------------------------------------------------------------------------------------------


def _own(folder: Path, dataset: str) -> DatasetOnDisk:
    root, classes = _class_folders(folder, dataset)
    reader = Reader(root)
    data = DatasetOnDisk(root, "", findings=reader.findings)
    for name, path in classes.items():
        for split, samples in _read_class(reader, path, name).items():
            data.samples[split] += samples
    if not any(sample.label == 0 for sample in data.samples[TRAIN] + data.samples[UNSPLIT]):
        raise UsageError(f"{folder}: no images of good parts found; expected {OWN_LAYOUTS}")
    if has_images(root) and root not in classes.values():
        for path in reader.images(root, nested=False):
            reader.report(SURPLUS, path, "is not in the folder of a class")
    splits = sorted({"with a split" if _has_split(reader, path) else "without a split" for path in classes.values()})
    only_good = all(sample.label == 0 for sample in data.all())
    data.layout = ("good images only" if only_good else "good and defective images") + ", " + " and ".join(splits)
    return data


def _has_split(reader: Reader, folder: Path) -> bool:
    return _named(reader.subfolders(folder), TRAIN_FOLDERS) is not None


def _class_folders(folder: Path, dataset: str) -> tuple[Path, dict[str, Path]]:
    """The folder that file names are relative to, and each class's folder. Without class folders, it is one class."""
    reader = Reader(folder)
    for _ in range(DEPTH):
        if _is_class(folder):
            return folder, {dataset: folder}
        subfolders = [path for path in reader.subfolders(folder) if not is_mask_folder(path)]
        if has_images(folder) and not any(_is_class(path) for path in subfolders):
            return folder, {dataset: folder}
        classes = [path for path in subfolders if _is_class(path) or has_images(path)]
        bad = next((path for path in classes if path.name.lower() in BAD), None)
        if bad is not None:
            raise UsageError(f"{bad}: has no folder of good images beside it; name that folder `good`")
        if classes:
            return folder, {path.name: path for path in classes}
        if len(subfolders) != 1:
            break
        folder = subfolders[0]
    raise UsageError(f"{folder}: no images found; expected {OWN_LAYOUTS}")
