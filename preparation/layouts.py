"""Recognises data sets on disk: a benchmark, or the user's own images in one of several layouts."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.catalog import CATALOG
from datasets.folders import is_date
from datasets.lists import Sample
from preparation.classes import ASK, DatasetOnDisk, read_chosen, read_class, refuse_unclear
from preparation.findings import NO_MASK, SURPLUS, Finding
from preparation.folders import Reader, has_images, is_class, is_mask_folder
from preparation.names import BAD, TEST, TRAIN, read_name
from preparation.official import DEPTH, official
from preparation.roles import report_unused
from utils.errors import UsageError
from utils.names import name_problem

OWN_LAYOUTS = (
    "train/good with test/<defect> (and ground_truth/<defect>); good with bad (or ok with ko); images of good parts "
    "only; or one such folder per class"
)


@dataclass(frozen=True)
class Chosen:
    """Folders that the user names instead of leaving it to their names.

    Args:
        good, defects, masks: relative to the folder of the images, or to the current one.
    """

    good: Sequence[Path] = ()
    defects: Sequence[Path] = ()
    masks: Sequence[Path] = ()


def recognize(folder: Path, dataset: str, chosen: Chosen | None = None) -> DatasetOnDisk:
    """Recognise the data set in a folder.

    Args:
        folder: the folder that the user passed; the data set may lie a few levels deeper.
        dataset: name of a benchmark, or any other name for the user's own images.
        chosen: which folders hold what, for the user's own images.

    Raises:
        UsageError: no such data set is found, it is not clear which images are good, or a class has a reserved name.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    if dataset in CATALOG:
        data = official(folder, dataset, CATALOG[dataset])
    else:
        data = _chosen(folder, dataset, chosen) if chosen else _own(folder, dataset)
    for name in {sample.clsname for sample in data.all()}:
        problem = name_problem(name)
        if problem:
            raise UsageError(f"{folder}: a class cannot be called {name[:80]!r}, which {problem}; rename that folder")
    return data


def report_masks(samples: list[Sample]) -> list[Finding]:
    """Findings for defective images without a mask: one per image, or one per folder or class with several."""
    findings = []
    for name in sorted({sample.clsname for sample in samples}):
        defective = [sample for sample in samples if sample.clsname == name and sample.label]
        lacking = [sample for sample in defective if sample.maskname is None]
        if lacking and len(lacking) == len(defective):
            several = f"none of the {len(lacking)} defective images has a mask"
            text = several if len(lacking) > 1 else "its only defective image has no mask"
            findings.append(Finding(NO_MASK, name, f"{text}: pixel metrics will be absent"))
        else:
            findings += _without_masks(defective, lacking)
    return findings


def _without_masks(defective: list[Sample], lacking: list[Sample]) -> list[Finding]:
    def folder(sample: Sample) -> str:
        return PurePosixPath(sample.filename).parent.as_posix()

    totals, findings = Counter(map(folder, defective)), []
    for name, count in Counter(map(folder, lacking)).items():
        bare = [sample.filename for sample in lacking if folder(sample) == name]
        if count == totals[name] > 1:
            findings.append(Finding(NO_MASK, name, f"none of its {count} images has a mask"))
        elif count > 2:
            first = ", ".join(PurePosixPath(file).name for file in bare[:3])
            findings.append(Finding(NO_MASK, name, f"{count} of its {totals[name]} images have no mask: {first}, ..."))
        else:
            findings += [Finding(NO_MASK, file, "has no mask") for file in bare]
    return findings


# ---- by the names of folders and files -------------------------------------------------------------------------------


def _own(folder: Path, dataset: str) -> DatasetOnDisk:
    root, classes, mask_folders = _class_folders(folder, dataset)
    reader = Reader(root)
    data = DatasetOnDisk(root, "", findings=reader.findings)
    for name, path in classes:
        # The root's mask folders may have a level for the class.
        of_class = [masks / path.name if (masks / path.name).is_dir() else masks for masks in mask_folders]
        for split, samples in read_class(reader, path, name, of_class).items():
            data.samples[split] += samples
    if not any(sample.label == 0 for sample in data.all()):
        raise UsageError(f"{folder}: no images of good parts found; expected {OWN_LAYOUTS}; or {ASK}")
    if has_images(root) and not any(path == root for _, path in classes):
        for path in reader.images(root, nested=False):
            reader.report(SURPLUS, path, "is not in the folder of a class")
    report_unused(reader, data.all(), [root])
    splits = sorted({_split_in_words(data, name) for name, _ in classes})
    data.layout = f"{_contents(data)}, {' and '.join(filter(None, splits))}"
    return data


def _contents(data: DatasetOnDisk) -> str:
    only_good = all(sample.label == 0 for sample in data.all())
    return "good images only" if only_good else "good and defective images"


def _split_in_words(data: DatasetOnDisk, name: str) -> str:
    """Whether the folders of a class divide it into training and test images; "" without images."""
    of_class = {split: [s for s in samples if s.clsname == name] for split, samples in data.samples.items()}
    if not any(of_class.values()):
        return ""
    return "with a split" if of_class[TRAIN] and of_class[TEST] else "without a split"


def _class_folders(folder: Path, dataset: str) -> tuple[Path, list[tuple[str, Path]], list[Path]]:
    """The folder that file names are relative to, each class's name and folder, and mask folders outside of these.

    Without class folders, or with dates as their names, it is one class. The folder is the user's, or the only one in
    it, and so on.
    """
    reader, root, mask_folders = Reader(folder), folder, []
    for _ in range(DEPTH):
        if is_class(folder):
            return root, [(dataset, folder)], mask_folders
        subfolders = [path for path in reader.subfolders(folder) if not is_mask_folder(path)]
        _refuse_without_good(folder, subfolders)
        if has_images(folder) and not any(is_class(path) for path in subfolders):
            _refuse_bad_name(folder)
            return root, [(dataset, folder)], mask_folders
        masks = [path for path in reader.subfolders(folder) if is_mask_folder(path)]
        classes = [path for path in subfolders if is_class(path) or has_images(path)]
        if classes:
            # A single folder called images, say, is no name for a class.
            one = all(is_date(path.name) for path in classes) or (
                len(classes) == 1 and not read_name(classes[0].name).core
            )
            return root, [(dataset if one else path.name, path) for path in classes], mask_folders + masks
        if len(subfolders) != 1:
            break
        mask_folders += masks
        folder = subfolders[0]
        root = root if mask_folders else folder
    raise UsageError(f"{folder}: no images found; expected {OWN_LAYOUTS}")


def _refuse_without_good(folder: Path, subfolders: Sequence[Path]) -> None:
    """Refuse subfolders that are kinds of images by their names, but none of them is good by its name."""
    bad = [path for path in subfolders if read_name(path.name).kind == BAD and not is_class(path)]
    if bad:
        raise UsageError(f"{bad[0]}: has no folder of good images beside it; name that folder `good`, or {ASK}")
    refuse_unclear(folder, subfolders)


def _refuse_bad_name(folder: Path) -> None:
    """Refuse a single folder of images that is called, say, `bad`."""
    name = Path(os.path.abspath(folder)).name
    if read_name(name).kind == BAD:
        raise UsageError(
            f"{folder}: is called {name}, so its images look defective; pass the folder above it, or --good {folder} "
            "if they are good"
        )


# ---- by the user's choice --------------------------------------------------------------------------------------------


def _chosen(folder: Path, dataset: str, chosen: Chosen) -> DatasetOnDisk:
    reader = Reader(folder)
    paths = {
        option: [_inside(folder, path, option) for path in paths]
        for option, paths in (("--good", chosen.good), ("--defects", chosen.defects), ("--masks", chosen.masks))
    }
    options: dict[Path, str] = {}
    for option, chosen_paths in paths.items():
        for path in chosen_paths:
            if options.setdefault(path, option) != option:
                raise UsageError(f"{option} {path}: is also named by {options[path]}")
    data = DatasetOnDisk(folder, "", findings=reader.findings)
    data.samples = read_chosen(reader, dataset, *paths.values())
    if not any(sample.label == 0 for sample in data.all()):
        raise UsageError(f"--good {' '.join(map(str, chosen.good))}: holds no images")
    report_unused(reader, data.all(), [folder])
    data.layout = f"{_contents(data)}, as chosen, {_split_in_words(data, dataset)}"
    return data


def _inside(folder: Path, path: Path, option: str) -> Path:
    """The path below the folder of the images: as it is, or relative to that folder."""
    for candidate in (folder / path, path):
        try:
            inside = Path(os.path.relpath(candidate, folder))
        except ValueError:
            # Another drive on Windows.
            continue
        if candidate.is_dir() and ".." not in inside.parts:
            return folder / inside
    if not path.is_dir():
        raise UsageError(f"{option} {path}: there is no such folder, here or in {folder}")
    raise UsageError(f"{option} {path}: lies outside of --root {folder}; pass a --root that holds both")
