"""Image lists: one JSON object per line.

python -m datasets.lists experiments/MVTec-AD/realnet.yaml        prints the classes of a data set
"""

import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from datasets.folders import is_date
from utils import cli
from utils.config import load_config
from utils.errors import UsageError
from utils.files import write_text
from utils.names import name_problem

UNIFIED = "uni"
SPLIT_FOLDERS = ("train", "training", "test", "testing")


@dataclass(frozen=True)
class Sample:
    """One line of an image list.

    Args:
        filename: relative to the image folder, forward slashes.
        label: 0 good, 1 defective.
        clsname: class name.
        maskname: mask of a defective image, or None.

    Example:
        >>> sample = Sample("bottle/test/crack/003.png", 1, "bottle", "bottle/ground_truth/crack/003_mask.png")
        >>> sample.defect_type, sample.mask_known
        ('crack', True)
    """

    filename: str
    label: int
    clsname: str
    maskname: str | None = None

    @property
    def mask_known(self) -> bool:
        """Whether the mask is known. A good image has an empty mask; a defective image needs a mask file."""
        return self.label == 0 or self.maskname is not None

    @property
    def defect_type(self) -> str:
        """The first folder below that of the split, else the folder of the image: "good" or the defect type.

        Without such a folder, "good" or "defective". Folders that are called by dates do not count.
        """
        folders = list(PurePosixPath(self.filename).parts[:-1])
        split = next((i for i, name in enumerate(folders) if name.lower() in SPLIT_FOLDERS), None)
        if split is not None:
            folders = folders[split + 1 :][:1]
        while folders and is_date(folders[-1]):
            folders.pop()
        return folders[-1] if folders else ("defective" if self.label else "good")


def gives_metrics(samples: Sequence[Sample]) -> bool:
    """Whether a test list has what an AUROC needs: defective images, and good ones or masks beside them.

    Example:
        >>> good, bad = Sample("test/good/1.png", 0, "bolts"), Sample("test/bent/1.png", 1, "bolts")
        >>> gives_metrics([good, bad]), gives_metrics([good]), gives_metrics([bad])
        (True, False, False)
        >>> gives_metrics([Sample("test/bent/1.png", 1, "bolts", "masks/1.png")])
        True
    """
    defective = [sample for sample in samples if sample.label]
    return bool(defective) and (len(defective) < len(samples) or any(sample.mask_known for sample in defective))


def read_list(
    path: str | Path, image_dir: str | Path, may_be_empty: bool = False, follow_links: bool = False
) -> list[Sample]:
    """Read and check an image list.

    Args:
        follow_links: whether links below image_dir may lead out of it.

    Raises:
        UsageError: the list is missing or (unless may_be_empty) empty, or a line is not JSON, lacks a key, repeats an
            image, or names a file that is missing or outside image_dir. The message names the line.
    """
    path, root = Path(path), Path(image_dir)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; write it with prepare_data.py, or see data/README.md")
    samples: list[Sample] = []
    lines_of: dict[str, int] = {}
    try:
        # Not splitlines(), which also splits at characters that a name may contain.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            sample = _parse(line, f"{path}, line {number}", root)
            if sample.filename in lines_of:
                earlier = lines_of[sample.filename]
                raise UsageError(f"{path}, line {number}: {sample.filename} is already in line {earlier}")
            lines_of[sample.filename] = number
            samples.append(sample)
    if not follow_links:
        outside = first_outside(root, [name for s in samples for name in (s.filename, s.maskname) if name])
        if outside is not None:
            advice = "set dataset.image_reader.kwargs.follow_links: True if that is meant"
            raise UsageError(f"{path}: {outside} is reached by a link that leads out of {root}; {advice}")
    if not samples and not may_be_empty:
        raise UsageError(f"{path}: holds no image")
    return samples


def _parse(line: str, where: str, root: Path) -> Sample:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        reason += "; write / or \\\\ between folders" * ("escape" in reason)
        raise UsageError(f"{where}: not a JSON object ({reason})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
        raise UsageError(f"{where}: has to be a JSON object with a filename")
    filename, label = _clean(entry["filename"], root), entry.get("label")
    if label not in (0, 1):
        raise UsageError(f"{where}: label is {label!r}, not 0 or 1")
    parts = PurePosixPath(filename).parts
    clsname = entry.get("clsname") or (parts[-4] if len(parts) >= 4 else None)
    if clsname is None:
        raise UsageError(f"{where}: has no clsname, and {filename} is not of the form class/split/type/name")
    problem = name_problem(str(clsname))
    if problem:
        raise UsageError(f"{where}: clsname {str(clsname)[:80]!r} {problem}")
    maskname = _clean(entry.get("maskname"), root) if label else None
    for key, name in (("filename", filename), ("maskname", maskname)):
        if name is not None:
            _check_file(key, name, where, root)
    return Sample(filename, int(label), str(clsname), maskname)


def _clean(name: object, root: Path) -> object:
    """A name from a list as it is spelt everywhere: without "./" and "//", and with slashes."""
    return with_slashes(PurePosixPath(name).as_posix(), root) if isinstance(name, str) and name else name


def with_slashes(name: str, root: Path) -> str:
    """A name from a list that was written on Windows; elsewhere, a backslash may be part of a file's name."""
    if "\\" not in name or ".." in name.split("\\"):
        return name
    try:
        kept = os.sep == "/" and (root / name).is_file()
        return name if kept else name.replace("\\", "/")
    except (OSError, ValueError):
        return name


def lies_outside(name: str) -> bool:
    """Whether a relative path from a list leads out of its folder; both slashes count, as Windows accepts either."""
    parts = name.replace("\\", "/").split("/")
    return PurePosixPath(name).is_absolute() or ".." in parts or bool(PureWindowsPath(name).drive)


def first_outside(root: Path, names: Iterable[str]) -> str | None:
    """The first of these files below a folder that a link leads out of it; the folder itself may be a link."""
    real_root, inside = os.path.realpath(root), {}
    for name in names:
        path = root / name
        folder = path.parent
        if folder not in inside:
            inside[folder] = _is_below(os.path.realpath(folder), real_root)
        if not inside[folder] or (path.is_symlink() and not _is_below(os.path.realpath(path), real_root)):
            return name
    return None


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _check_file(key: str, name: object, where: str, root: Path) -> None:
    if not isinstance(name, str):
        raise UsageError(f"{where}: {key} is {name!r}, not a string")
    if lies_outside(name):
        raise UsageError(f"{where}: {name} lies outside {root}")
    try:
        exists, folder = (root / name).is_file(), (root / name).is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {name[:80]!r} is not a file name ({error})") from None
    if folder:
        raise UsageError(f"{where}: {name} under image_dir {root} is a folder, not an image")
    if not exists:
        raise UsageError(f"{where}: {name} does not exist under image_dir {root}{_moved(root / name)}")


def _moved(path: Path) -> str:
    """If a folder above a missing file is a link whose target is gone: that, and what to do."""
    for above in path.parents:
        if above.is_symlink() and not above.exists():
            target = os.readlink(above)
            return f": {above} is a link to {target}, which is gone; run prepare_data.py with --root and its new place"
    return ""


@dataclass(frozen=True)
class ImageList:
    """An image list and its image folder.

    Args:
        samples: the lines of the list.
        image_dir: folder that their file names are relative to.
    """

    samples: list[Sample]
    image_dir: Path

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.image_dir / self.samples[index].filename

    def summary(self) -> str:
        """The number of images and a hash of their names, by which a changed list is noticed."""
        names = "\n".join(sample.filename for sample in self.samples)
        return f"{len(self)} images, {hashlib.sha256(names.encode('utf-8', 'backslashreplace')).hexdigest()[:12]}"

    def of_class(self, clsname: str) -> list[int]:
        """Indices of the images of a class."""
        return [i for i, sample in enumerate(self.samples) if sample.clsname == clsname]


def list_text(samples: list[Sample]) -> str:
    """Format an image list as text."""
    lines = []
    for sample in samples:
        entry = {
            "filename": sample.filename,
            "label": sample.label,
            "label_name": "defective" if sample.label else "good",
            "clsname": sample.clsname,
        }
        if sample.maskname:
            entry["maskname"] = sample.maskname
        lines.append(json.dumps(entry, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def write_list(path: str | Path, samples: list[Sample]) -> None:
    """Write an image list atomically."""
    write_text(path, list_text(samples))


def listed_classes(meta_file: str) -> list[str]:
    """Sorted classes whose list exists, except `uni`; meta_file has {} in place of the class."""
    folder, pattern = Path(meta_file).parent, Path(meta_file).name
    before, placeholder, after = pattern.partition("{}")
    if not placeholder:
        return []
    names = (path.name for path in folder.glob(f"{before}*{after}"))
    return sorted({name[len(before) : len(name) - len(after)] for name in names} - {UNIFIED})


def chosen_classes(wanted: str | None, meta_file: str) -> list[str]:
    """The classes that --class_name asks for.

    Args:
        wanted: one class, several separated by commas, "all", or None.
        meta_file: path of the image lists with {} for the class; without {}, one model serves all classes.

    Raises:
        UsageError: no class is named, or a named class has no list of its own.
    """
    if "{}" not in meta_file:
        if wanted not in (None, "all", UNIFIED):
            text = f"one model serves all classes of the list {meta_file}, which has no {{}} for a class"
            raise UsageError(f"--class_name {wanted}: {text}; leave it out, or choose settings with a list per class")
        return [UNIFIED]
    known = listed_classes(meta_file)
    if not wanted and len(known) == 1:
        return known
    if not wanted:
        raise UsageError(f"--class_name is missing: one of {', '.join(known) or meta_file}, several, or all")
    if wanted == "all":
        if not known:
            how = "write it with prepare_data.py (the demo's: python -m preparation.demo), see data/README.md"
            raise UsageError(f"--class_name all: there is no list {meta_file}; {how}")
        return known
    # An umlaut may be one character or two, which look the same.
    spelt = {unicodedata.normalize("NFC", name): name for name in known}
    typed = [name.strip() for name in wanted.split(",")]
    chosen = [spelt.get(unicodedata.normalize("NFC", name), name) for name in typed]
    for name in chosen:
        if name == UNIFIED:
            hint = "the model for all classes has settings of its own, --config experiments/NAME/realnet_unified.yaml"
            raise UsageError(f"--class_name {name}: is the list of all classes; {hint}")
        if name not in known:
            path = meta_file.replace("{}", name)
            raise UsageError(f"--class_name {name}: {path} does not exist; known are {', '.join(known) or 'none'}")
    return chosen


def class_names(samples: list[Sample]) -> list[str]:
    """Class names of a list, sorted: this order gives the class numbers."""
    return sorted({sample.clsname for sample in samples})


def main() -> None:
    """Print the classes in the image lists of a settings file, one per line."""
    if len(sys.argv) != 2:
        raise UsageError("usage: python -m datasets.lists SETTINGS.yaml")
    config = load_config(sys.argv[1])
    path = config.dataset.train.meta_file
    reader = config.dataset.image_reader.kwargs
    classes = listed_classes(path) or class_names(read_list(path, reader.image_dir, follow_links=reader.follow_links))
    print("\n".join(classes))


if __name__ == "__main__":
    cli.run(main)
