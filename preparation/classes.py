"""Reads the folder of one class, in any layout."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.images import read_mask
from datasets.lists import Sample
from preparation.findings import AMBIGUOUS, MISSING, SURPLUS, UNREADABLE, Finding
from preparation.folders import Reader, has_images, is_class, is_good_folder, is_mask_folder
from preparation.masks import MaskIndex, without_masks
from preparation.names import BAD, GOOD, TEST, TRAIN, UNCLEAR, are_zero_and_one, read_name
from utils.counts import counted
from utils.errors import UsageError

UNSPLIT = "unsplit"
Samples = dict[str, list[Sample]]
ASK = "pass --good DIR... --defects DIR..."


def no_samples() -> Samples:
    """Empty lists, by TRAIN, TEST and UNSPLIT."""
    return {TRAIN: [], TEST: [], UNSPLIT: []}


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
    samples: Samples = field(default_factory=no_samples)
    findings: list[Finding] = field(default_factory=list)

    def all(self) -> list[Sample]:
        return [sample for samples in self.samples.values() for sample in samples]


def read_class(reader: Reader, folder: Path, clsname: str, mask_folders: Sequence[Path] = ()) -> Samples:
    """The samples of a class folder in any layout.

    Args:
        mask_folders: folders of masks outside the class folder.

    Raises:
        UsageError: it is not clear which images are good.
    """
    subfolders = reader.subfolders(folder)
    masks = MaskIndex(reader)
    for path in (*mask_folders, *filter(is_mask_folder, subfolders)):
        masks.add_folder(path)
    subfolders = [path for path in subfolders if not is_mask_folder(path)]
    split = {kind: [path for path in subfolders if _split_folder(path) == kind] for kind in (TRAIN, TEST)}
    samples = no_samples()
    if split[TRAIN] or split[TEST]:
        for path in split[TRAIN]:
            samples[TRAIN] += _train_samples(reader, path, clsname)
        for path in _chosen_tests(split[TEST]):
            masks.add_folders_in(path)
            samples[TEST] += _samples(reader, path, clsname, masks)
        _add_beside_split(reader, folder, clsname, masks, samples)
        if not split[TEST] and not samples[TEST]:
            reader.report(MISSING, folder / TEST, "no such folder, so there is nothing to evaluate on")
    elif any(map(is_good_folder, subfolders)):
        _refuse_several_products(folder, subfolders)
        for sample in _samples(reader, folder, clsname, masks):
            samples[_split_of(folder, reader.root / sample.filename, sample.label)].append(sample)
        if not samples[TRAIN]:
            _split_anew(samples)
    else:
        samples = _labelled_by_file_names(reader, folder, clsname, masks)
    return samples


def _split_folder(path: Path) -> str | None:
    name = read_name(path.name)
    return name.split if name.is_split else None


def _chosen_tests(folders: list[Path]) -> list[Path]:
    """Test folders. If there are some called test, the validation folders are left to be reported as unused."""
    tests = [path for path in folders if not path.name.lower().startswith("val")]
    return tests or folders


def _train_samples(reader: Reader, folder: Path, clsname: str) -> list[Sample]:
    """Good images of a train folder: those directly in it, and those in subfolders called good, or just images.

    Without a name that says good, the masks in the folder decide, if there are some.
    """
    good, unknown, masks = [], [], MaskIndex(reader)
    masks.add_folders_in(folder)
    subfolders = [path for path in reader.subfolders(folder) if not is_mask_folder(path)]
    for subfolder in subfolders:
        name = read_name(subfolder.name)
        images = reader.images(subfolder)
        if name.kind == GOOD:
            good += images
        elif _says_nothing(subfolder):
            good += _good_by_masks(reader, images, subfolder, clsname, masks)
        elif images:
            unknown.append(subfolder)
            text = counted(len(images), "image that is not good", "images that are not good")
            reader.report(SURPLUS, subfolder, f"{text}; training uses good ones only")
    if has_images(folder):
        direct = reader.images(folder, nested=False)
        bad = [path for path in direct if read_name(path.stem).kind == BAD]
        for path in bad:
            reader.report(SURPLUS, path, "is defective by its name; training uses good images only")
        good += _good_by_masks(reader, [path for path in direct if path not in bad], folder, clsname, masks)
    if unknown and not good:
        names = ", ".join(path.name for path in unknown)
        raise UsageError(f"{folder}: not clear which folder holds good images ({names}); call it `good`, or {ASK}")
    return [Sample(reader.name(path), 0, clsname) for path in without_masks(reader, good)]


def _samples(reader: Reader, folder: Path, clsname: str, masks: MaskIndex) -> list[Sample]:
    """Images of a folder with one subfolder per defect type; those called good (or ok, normal) hold good images."""
    subfolders = [path for path in reader.subfolders(folder) if not is_mask_folder(path)]
    refuse_unclear(folder, subfolders)
    samples = []
    for subfolder in subfolders:
        if is_class(subfolder) and not read_name(subfolder.name).kind:
            reader.report(SURPLUS, subfolder, "is a class of its own beside folders of good and defective images")
            reader.told.update(reader.images(subfolder, masks=True))
            continue
        images = reader.images(subfolder)
        if is_good_folder(subfolder):
            samples += [Sample(reader.name(path), 0, clsname) for path in without_masks(reader, images)]
            continue
        masks.add_folders_in(subfolder, of_defect=True)
        if _says_nothing(subfolder):
            labelled = _by_masks(reader, images, subfolder, clsname, masks)
            if labelled is None and images:
                one, many = "image; nothing says whether it is good", "images; nothing says whether they are good"
                reader.report(SURPLUS, subfolder, counted(len(images), one, many))
            samples += labelled or []
            continue
        samples += _defective(reader, masks.split_off(images, subfolder), subfolder, clsname, masks)
    if has_images(folder):
        samples += _direct_samples(reader, folder, clsname, masks)
    return samples


def _direct_samples(reader: Reader, folder: Path, clsname: str, masks: MaskIndex) -> list[Sample]:
    """Images beside the folders of good and defective ones, if their names or masks say which they are."""
    images = masks.split_off(reader.images(folder, nested=False), folder)
    kinds = {path: read_name(path.stem).kind for path in images}
    others = [path for path in images if kinds[path] not in (GOOD, BAD)]
    labelled = _by_masks(reader, others, folder, clsname, masks)
    for path in others if labelled is None else ():
        reader.report(SURPLUS, path, "is not in a folder that says whether it is good")
    good = [Sample(reader.name(path), 0, clsname) for path in images if kinds[path] == GOOD]
    bad = [path for path in images if kinds[path] == BAD]
    return good + _defective(reader, bad, folder, clsname, masks) + (labelled or [])


def _add_beside_split(reader: Reader, folder: Path, clsname: str, masks: MaskIndex, samples: Samples) -> None:
    """Add folders of good or defective images beside train or test, where these hold none of that kind."""
    beside = [path for path in reader.subfolders(folder) if not is_mask_folder(path) and not _split_folder(path)]
    trained, tested = bool(samples[TRAIN]), any(sample.label for sample in samples[TEST])
    for path in beside:
        name = read_name(path.name)
        split = name.split or (TEST if name.kind == BAD else TRAIN)
        if name.kind == GOOD and (split == TEST or not trained):
            good = without_masks(reader, reader.images(path))
            samples[split] += [Sample(reader.name(image), 0, clsname) for image in good]
        elif name.kind == BAD and split == TEST and not tested:
            samples[TEST] += _defective(reader, masks.split_off(reader.images(path), path), path, clsname, masks)
    if not samples[TRAIN]:
        # A test folder alone is split like folders without a split.
        _split_anew(samples)


def _split_anew(samples: Samples) -> None:
    """Leave it to the later split which of the good images are for training."""
    for split in (TRAIN, TEST):
        samples[UNSPLIT] += samples[split]
        samples[split] = []


def _split_of(folder: Path, image: Path, label: int) -> str:
    """The split that a folder between the class folder and an image names, as in good/train or train_good."""
    parts = image.relative_to(folder).parts[:-1]
    splits = [read_name(part).split for part in parts if not read_name(part).rest]
    split = next(filter(None, splits), UNSPLIT)
    return TEST if label and split == TRAIN else split


def _labelled_by_file_names(reader: Reader, folder: Path, clsname: str, masks: MaskIndex) -> Samples:
    """Images of a folder without kinds: good and defective by their names (bad_0.png) or masks; else all good."""
    samples, images = no_samples(), reader.images(folder)
    if not images:
        return samples
    _refuse_bad_folders(folder, images)
    names = {path: read_name(path.stem) for path in images}
    of_kind = {kind: [path for path in images if names[path].kind == kind] for kind in (GOOD, BAD, UNCLEAR)}
    words = {names[path].core.strip("0123456789 ") for path in of_kind[UNCLEAR]}
    # A single word for some of the images, as in true.png, says nothing.
    unclear = of_kind[UNCLEAR] if len(words) > 1 or len(of_kind[UNCLEAR]) == len(images) else []
    if unclear or (of_kind[BAD] and not of_kind[GOOD]):
        shown = [(unclear or of_kind[BAD])[0].name, (unclear or images)[-1].name]
        raise UsageError(
            f"{folder}: not clear from the file names which images are good ({', '.join(dict.fromkeys(shown))}); "
            f"move good and defective ones into folders called good and bad, or {ASK}"
        )
    labelled = None if of_kind[GOOD] or of_kind[BAD] else _by_masks(reader, images, folder, clsname, masks)
    if labelled is not None:
        if all(sample.label for sample in labelled):
            masks_of = f"the masks of its {counted(len(labelled), 'image')}"
            raise UsageError(
                f"{folder}: {masks_of} all mark something, so none is good; add images of good parts, or, if these are "
                f"masks of parts instead of defects, {ASK}"
            )
        samples[UNSPLIT] = labelled
        return samples
    if not of_kind[BAD]:
        samples[TRAIN] = [Sample(reader.name(path), 0, clsname) for path in without_masks(reader, images)]
        return samples
    kept = masks.split_off(images, folder)
    for path in kept:
        if names[path].kind not in (GOOD, BAD):
            reader.report(SURPLUS, path, "its name does not say whether it is good, as others do")
    samples[UNSPLIT] = [Sample(reader.name(path), 0, clsname) for path in kept if names[path].kind == GOOD]
    bad = [path for path in kept if names[path].kind == BAD]
    samples[UNSPLIT] += _defective(reader, bad, folder, clsname, masks)
    return samples


def _says_nothing(folder: Path) -> bool:
    """Whether a folder is called, say, `images`."""
    name = read_name(folder.name)
    return not (name.kind or name.core or name.rest)


def _by_masks(reader: Reader, images: list[Path], folder: Path, clsname: str, masks: MaskIndex) -> list[Sample] | None:
    """Images whose names say nothing: defective if their mask marks something, else good. None if no mask does."""
    kept, marked, empty = masks.split_off(images, folder), [], []
    for path in kept:
        mask = masks.of(path, folder)
        if mask is None:
            continue
        try:
            (marked if read_mask(mask).any() else empty).append((path, mask))
        except UsageError as error:
            reason = str(error).removeprefix(str(mask)).strip()
            reader.report(UNREADABLE, mask, f"mask {reason}; it would say whether {path.name} is good")
            reader.told.add(path)
    if not marked:
        return None
    bad = [path for path, _ in marked]
    # Those that are told of have a mask that cannot be used.
    good = [path for path in kept if path not in bad and path not in reader.told]
    reader.told.update(mask for _, mask in empty)
    return [Sample(reader.name(p), 0, clsname) for p in good] + _defective(reader, bad, folder, clsname, masks)


def _good_by_masks(reader: Reader, images: list[Path], folder: Path, clsname: str, masks: MaskIndex) -> list[Path]:
    """Images to train on without those whose masks mark something, which are reported."""
    labelled = _by_masks(reader, images, folder, clsname, masks)
    if labelled is None:
        return images
    for sample in labelled:
        if sample.label:
            reader.report(
                SURPLUS, reader.root / sample.filename, "its mask marks a defect; training uses good images only"
            )
            reader.told.update([reader.root / sample.maskname] if sample.maskname else [])
    return [reader.root / sample.filename for sample in labelled if not sample.label]


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
            reader.told.add(mask)
            mask = None
        samples.append(Sample(reader.name(path), 1, clsname, reader.name(mask) if mask else None))
    return samples


# ---- what is not clear -----------------------------------------------------------------------------------------------


def refuse_unclear(folder: Path, subfolders: Sequence[Path]) -> None:
    """Refuse siblings such as positive and negative, or 0 and 1."""
    names = [path.name for path in subfolders if not is_class(path)]
    unclear = [name for name in names if read_name(name).kind == UNCLEAR]
    if unclear or are_zero_and_one(names):
        shown = ", ".join(unclear or names)
        raise UsageError(f"{folder}: not clear which folder holds good images ({shown}); {ASK}")


def _refuse_bad_folders(folder: Path, images: Sequence[Path]) -> None:
    """Refuse images in a folder called, say, `bad`, where no folder is called good."""
    for above in {path.parent for path in images}:
        if any(read_name(part).kind == BAD for part in above.relative_to(folder).parts):
            raise UsageError(f"{above}: has no folder of good images beside it; name that folder `good`, or {ASK}")


def _refuse_several_products(folder: Path, subfolders: Sequence[Path]) -> None:
    """Refuse good folders of several products, and a good folder with a longer name beside folders of unknown kind."""
    names = {path.name: read_name(path.name) for path in subfolders}
    good = {name: read for name, read in names.items() if read.kind == GOOD and is_good_folder(folder / name)}
    bad = {name: read for name, read in names.items() if read.kind == BAD}
    products = {read.rest for read in good.values()}
    if len(products) > 1 and all(products) and (not bad or products & {read.rest for read in bad.values()}):
        shown = ", ".join(good)
        raise UsageError(
            f"{folder}: {shown} may be several classes; sort each into a folder with good and bad inside, or {ASK}"
        )
    others = [name for name, read in names.items() if read.kind is None and not read.is_split]
    if others and not bad and all(read.rest for read in good.values()):
        raise UsageError(
            f"{folder}: not clear whether {', '.join(others)} {'are defects' if len(others) > 1 else 'is a defect'} of "
            f"{next(iter(good))}, or other classes; {ASK}, or sort each class into a folder with good inside"
        )


# ---- folders that the user chose -------------------------------------------------------------------------------------


def read_chosen(
    reader: Reader, clsname: str, good: Sequence[Path], defects: Sequence[Path], mask_folders: Sequence[Path]
) -> Samples:
    """The samples of one class in folders that the user names.

    Args:
        good: folders of good images. If all lie in folders called train or test, that is the split.
        defects: each is the folder of a defect type, or holds a folder per defect type.
        mask_folders: folders of masks; masks beside images and in folders called `masks` are found, too.
    """
    samples, masks, others = no_samples(), MaskIndex(reader), {*good, *defects, *mask_folders}
    # One that is chosen itself, as good or for masks, is no defect type of the folder above it.
    found = [folder for parent in defects for folder in _defect_folders(reader, parent)]
    defect_folders = [folder for folder in dict.fromkeys(found) if folder in defects or folder not in others]
    for path in mask_folders:
        masks.add_folder(path, defect_folders=defect_folders)
    for folder in good:
        for image in without_masks(reader, _own_images(reader, folder, others)):
            split = _split_of(reader.root, image, 0)
            samples[split].append(Sample(reader.name(image), 0, clsname))
    for folder in defect_folders:
        masks.add_folders_in(folder, of_defect=True)
        images = masks.split_off(_own_images(reader, folder, others), folder)
        samples[TEST] += _defective(reader, images, folder, clsname, masks)
    if samples[UNSPLIT] or not samples[TRAIN]:
        _split_anew(samples)
    return samples


def _defect_folders(reader: Reader, parent: Path) -> list[Path]:
    """The folder itself if it holds images, else the folders of defect types in it."""
    subfolders = [path for path in reader.subfolders(parent) if not is_mask_folder(path)]
    return [parent] if has_images(parent) or not subfolders else subfolders


def _own_images(reader: Reader, folder: Path, others: set[Path]) -> list[Path]:
    """Images in a folder, except those in folders below it that were chosen too."""
    return [
        path
        for path in reader.images(folder)
        if not any(above in others and folder in above.parents for above in path.parents)
    ]
