"""Says what became of a data set's folders, and reports the images that nothing took."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from datasets.lists import Sample
from datasets.pair_folders import PREVIEW, RECORD
from preparation.classes import UNSPLIT, DatasetOnDisk
from preparation.findings import SURPLUS
from preparation.folders import Reader, is_mask_folder
from preparation.masks import masks_among
from preparation.names import BAD, GOOD, TEST, TRAIN, read_name
from utils.choices import YOLO
from utils.counts import counted

ROWS = 40


def roles_table(data: DatasetOnDisk) -> list[str]:
    """Lines that say for each folder how many images it gave, and as what: good, a defect type, or masks."""
    rows: Counter[tuple[str, str]] = Counter()
    masked: Counter[tuple[str, str]] = Counter()
    masks: Counter[str] = Counter()
    several = len({sample.clsname for sample in data.all()}) > 1
    for split, samples in data.samples.items():
        for sample in samples:
            role = _role(split, sample)
            row = _folder(sample.filename), f"class {sample.clsname}: {role}" if several else role
            rows[row] += 1
            if sample.maskname:
                masked[row] += 1
                masks[_folder(sample.maskname)] += 1
    kinds = Counter(folder for folder, _ in rows)
    named = {_folder(s.filename) for s in data.all() if read_name(PurePosixPath(s.filename).stem).kind in (GOOD, BAD)}
    lines = []
    for (folder, role), count in sorted(rows.items()):
        by_what = "by the files' names" if folder in named else "by their masks"
        by_name = f", {by_what}" if kinds[folder] > 1 else ""
        with_mask = f", {masked[folder, role]} with a mask" if masked[folder, role] else ""
        lines.append((folder, count, f"{role}{by_name}{with_mask}"))
    lines += [(folder, count, "masks") for folder, count in sorted(masks.items()) if folder not in kinds]
    width = max(len(folder) for folder, *_ in [*lines[:ROWS], ("folder",)])
    table = [f"{'folder'.ljust(width)}  images  taken as"]
    table += [f"{folder.ljust(width)}  {count:6d}  {role}" for folder, count, role in lines[:ROWS]]
    return table + [f"(and {counted(len(lines) - ROWS, 'more folder')})"] * (len(lines) > ROWS)


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _role(split: str, sample: Sample) -> str:
    if sample.label:
        return "defective" if _folder(sample.filename) == "." else f"defect type {sample.defect_type}"
    return {TRAIN: "good, for training", TEST: "good, for testing", UNSPLIT: "good, for training and testing"}[split]


def report_unused(reader: Reader, samples: Iterable[Sample], folders: Sequence[Path]) -> None:
    """Report the images and masks in the folders that no list takes and no finding tells of."""
    taken = {name for sample in samples for name in (sample.filename, sample.maskname) if name}
    walker = Reader(reader.root)
    unused: dict[Path, list[Path]] = defaultdict(list)
    for folder in folders:
        for path in walker.images(folder, masks=True):
            told = path in reader.told or any(parent in reader.told for parent in path.parents)
            if reader.name(path) not in taken and not told and not _repeats_pairs(path, reader.root):
                unused[path.parent].append(path)
    for folder, paths in unused.items():
        names = [read_name(part) for part in folder.relative_to(reader.root).parts]
        good, bad = (any(name.kind == kind for name in names) for kind in (GOOD, BAD))
        above = [folder, *folder.parents]
        in_masks = any(is_mask_folder(path) for path in above[: above.index(reader.root)])
        masks = paths if in_masks else sorted(masks_among(paths))
        images = [path for path in paths if path not in masks]
        if masks and good:
            reader.report(SURPLUS, folder, f"{counted(len(masks), 'mask')} of good images, which need none")
        else:
            for path in masks:
                reader.report(SURPLUS, path, "is a mask without a defective image of that name")
        if images:
            reason = ": defective ones, without a folder of good images beside them" if bad else ""
            where, what = (images[0], "an image") if len(images) == 1 else (folder, counted(len(images), "image"))
            reader.report(SURPLUS, where, f"{what} that nothing uses{reason}")


def _repeats_pairs(path: Path, root: Path) -> bool:
    """Whether synthesize.py shows its pairs again by this file: the sheet, or their further names for YOLO."""
    above = path.relative_to(root).parents
    return any(
        path.relative_to(root / folder).parts[0] in (PREVIEW, YOLO) and (root / folder / RECORD).is_file()
        for folder in above
    )
