"""Make image lists (and, for images of your own, settings) from a folder or an archive of images.

    python prepare_data.py --dataset MVTec-AD --root ~/mvtec_anomaly_detection.tar.xz    (or MPDD, BTAD, VisA, DTD)
    python prepare_data.py --dataset MyParts  --root ~/images --preview
    python prepare_data.py --dataset MyParts  --preview                        (new preview, e.g. after sample.py)
    python prepare_data.py --dataset MyParts  --root ~/images --good A B --defects C --masks M   (folders of any name)

Any other name is a data set of your own. Its images may be sorted into train/good, test/<defect type> and
ground_truth/<defect type>; into good and bad, OK and NG, or words of other languages, without a split; or all be good.
The words are looked for inside the names of folders, and of files if the folders say nothing. The folder holds one
class, or a folder per class. If it is not clear which images are good, --good and --defects name their folders.
Writes data/<dataset>/samples/*.json, data/<dataset>/findings.txt, and for data sets of your own
experiments/<dataset>/*.yaml. Exit code 1 means that some images cannot be read; the lists leave them out.
"""

import argparse
from pathlib import Path

from datasets.catalog import CATALOG, TEXTURES
from datasets.folders import MEGAPIXELS, list_images
from models.structures import NORMALIZATIONS, STRUCTURES, structure_of
from preparation.archives import SUFFIXES
from preparation.presets import preset_names
from utils import arguments

OFFICIAL = (*CATALOG, *TEXTURES)
TEST_FRACTION = 0.2


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(OFFICIAL)}, or a name for your own")
    parser.add_argument("--root", type=Path, help=f"folder of the images, or an archive ({' '.join(SUFFIXES)})")
    parser.add_argument("--copy", action="store_true", help="copy the images to data/<dataset>/ instead of linking")
    links_help = "take images that links in the folder lead to outside of it"
    parser.add_argument("--follow-links", action="store_true", help=links_help)
    parser.add_argument("--overwrite", action="store_true", help="replace lists and copies that differ")
    parser.add_argument("--preview", action="store_true", help="write sheets of masks, foregrounds and anomalies")
    set_help = "override a setting of realnet.yaml in the preview"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    parser.add_argument(
        "--max-megapixels", type=int, default=MEGAPIXELS, help=f"refuse images above this size ({MEGAPIXELS})"
    )
    own = parser.add_argument_group("for data sets of your own")
    # extend: --good A --good B is as good as --good A B.
    folders = {"type": Path, "nargs": "+", "metavar": "DIR", "default": [], "action": "extend"}
    own.add_argument("--good", **folders, help="folders of good images, in --root; the images are one class")
    own.add_argument(
        "--defects", **folders, help="folders of defective images: each a defect type, or a folder of those"
    )
    own.add_argument("--masks", **folders, help="folders of masks, with the images' names, with or without _mask")
    own.add_argument(
        "--test-fraction", type=float, help=f"share of good images to test on, if not split (default {TEST_FRACTION})"
    )
    parts_help = "which images show the same part: a CSV file (file, part), or a pattern for file names, e.g. part\\d+"
    own.add_argument("--parts", metavar="FILE|PATTERN", help=parts_help)
    own.add_argument("--seed", type=int, default=0, help="seed of that split (default 0)")
    own.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="default: the area of 256x256 pixels, in the images' aspect ratio",
    )
    presets = ("auto", *preset_names())
    preset_help = "settings to begin with: auto takes standard if there is a GPU, else quick (experiments/presets/)"
    own.add_argument("--preset", choices=presets, default="auto", help=preset_help)
    own.add_argument("--backbone", metavar="NAME", help=f"instead of the preset's: {', '.join(STRUCTURES)}")
    own.add_argument("--weights", metavar="FILE", help="the backbone's weights (default: pretrain/, else a download)")
    normalization_help = "of the images, as the weights expect it: imagenet, or half (mean and deviation 0.5)"
    own.add_argument("--normalization", choices=tuple(NORMALIZATIONS), default="imagenet", help=normalization_help)
    diffusion_help = "size of the diffusion model: auto goes by the GPU's memory (docs/synthesis.md)"
    own.add_argument("--diffusion", choices=("auto", "small", "medium", "paper"), default="auto", help=diffusion_help)
    own.add_argument("--foreground", default="none", help="value of the setting dataset.foreground (default none)")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import os
import re
import sys

import torch
import yaml

from datasets.images import allow_megapixels
from datasets.lists import UNIFIED, Sample, first_outside, list_text, listed_classes
from datasets.parts import parts_of
from datasets.sources import WITH_TEXTURES
from datasets.splits import Fingerprint, split_good
from preparation import diffusion_presets, findings, placing, settings_files
from preparation.classes import UNSPLIT, DatasetOnDisk
from preparation.duplicates import report_leaks, report_repeats
from preparation.inspection import inspect, report_bits
from preparation.layouts import Chosen, recognize, report_masks
from preparation.names import TEST, TRAIN
from preparation.next_commands import next_commands
from preparation.preview import preview_sheet
from preparation.roles import roles_table
from preparation.textures import recognize_textures
from utils import cli
from utils.config import load_config
from utils.counts import counted
from utils.errors import UsageError
from utils.files import remove_parts, write_text
from utils.lock import folder_lock
from utils.log import log, log_to_terminal
from utils.pictures import write_image

TEXTURES_DIR = "data/DTD/images"  # as in the presets


def main() -> None:
    args = parse_args()
    check_arguments(args)
    log_to_terminal()
    allow_megapixels(args.max_megapixels)
    unreadable = False
    if args.root is not None:
        with folder_lock(Path("data") / args.dataset):
            # What a killed run had unpacked so far.
            remove_parts(Path("data") / args.dataset)
            unreadable = prepare_textures(args) if args.dataset in TEXTURES else prepare(args)
    if args.preview:
        write_previews(args.dataset, args.set)
    if args.root is not None and args.dataset not in TEXTURES:
        log.info("\n%s", next_commands(args.dataset, folder_of_lists(args.dataset), args.preview))
    if unreadable:
        sys.exit(1)


def check_arguments(args: argparse.Namespace) -> None:
    name, own = args.dataset, args.dataset not in OFFICIAL
    if name.lower() == "demo" and (name != "demo" or args.root is not None):
        raise UsageError(f"--dataset {name}: is the built-in data set; choose another name")
    for known in OFFICIAL:
        if own and name.lower() in (known.lower(), CATALOG[known].type if known in CATALOG else ""):
            raise UsageError(f"--dataset {name}: did you mean {known}?")
    if not re.fullmatch(r"[^\W\d_][\w.-]*", name) or yaml.safe_load(name) != name:
        raise UsageError(f"--dataset {name}: a name starts with a letter and holds letters, digits, '_', '-' and '.'")
    if (args.defects or args.masks) and not args.good:
        raise UsageError("--good is missing: --defects and --masks go with the folders of good images")
    if args.root is None and args.good:
        args.root = common_folder([*args.good, *args.defects, *args.masks])
    if args.root is None and not args.preview:
        raise UsageError("--root is missing: pass the folder or archive of the images")
    if args.set and not args.preview:
        raise UsageError("--set: overrides settings of the preview; pass --preview, too, or edit the YAML files")
    if args.preview and name in TEXTURES:
        raise UsageError(f"--preview: {name} has no lists to preview")
    if not own and any(
        (
            *(args.test_fraction is not None, args.input_size, args.foreground != "none", args.good, args.parts),
            *(args.preset != "auto", args.diffusion != "auto", args.backbone, args.weights),
            args.normalization != "imagenet",
        )
    ):
        options = "--test-fraction, --input-size, --foreground, --good, --parts, presets and the backbone's options"
        raise UsageError(f"{options}: not for {name}, which has its own settings")
    if args.test_fraction is not None and not 0 <= args.test_fraction < 1:
        raise UsageError(f"--test-fraction {args.test_fraction}: has to lie in 0 .. 1")
    if args.max_megapixels < 1:
        raise UsageError(f"--max-megapixels {args.max_megapixels}: at least 1")
    if args.input_size and min(args.input_size) < 32:
        raise UsageError(f"--input-size {' '.join(map(str, args.input_size))}: at least 32 pixels a side")
    if args.backbone:
        structure_of(args.backbone)
    if args.weights and not Path(args.weights).is_file():
        raise UsageError(f"--weights {args.weights}: there is no such file")
    args.foreground = settings_files.foreground_value(args.foreground, name)


def common_folder(folders: list[Path]) -> Path:
    """The folder that holds all of the chosen folders, or the only one of them."""
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise UsageError(f"{missing}: there is no such folder; the folders of --good are relative to --root, if given")
    try:
        root = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    except ValueError:
        # On Windows, they may lie on several drives.
        root = Path(os.path.abspath(folders[0])).parents[-1]
    if root == root.parent:
        raise UsageError("--good and --defects: the folders have no folder in common; move them into one")
    return root


# ---- the images ------------------------------------------------------------------------------------------------------


def prepare_textures(args: argparse.Namespace) -> bool:
    """Put a collection of textures into data/<dataset>/; returns whether some are unreadable."""
    target = Path("data") / args.dataset / TEXTURES[args.dataset].type
    with placing.opened(args.root, target) as folder:
        root, names, differences = recognize_textures(folder, args.dataset)
        _, readable, unreadable = inspect(root, [Sample(name, 0, args.dataset) for name in names])
        placing.place(args.root, root, target, [sample.filename for sample in readable], args.copy, args.overwrite)
    folders = counted(len({Path(name).parts[0] for name in names}), "folder")
    log.info("%s: %s in %s", args.dataset, counted(len(readable), "texture"), folders)
    bad = findings.report(differences + unreadable, findings_file(args.dataset))
    log.info("Next: the settings of data sets that are prepared from now on take anomalies from them; others with")
    log.info('  --set "dataset.train.anomaly_types=%s"', WITH_TEXTURES)
    return bad


def prepare(args: argparse.Namespace) -> bool:
    """Write the lists and settings of a data set; returns whether some images are unreadable."""
    own = args.dataset not in CATALOG
    target = Path("data") / args.dataset / (settings_files.IMAGES if own else CATALOG[args.dataset].type)
    with placing.opened(args.root, target) as folder:
        chosen = Chosen(args.good, args.defects, args.masks) if args.good else None
        data = recognize(folder, args.dataset, chosen)
        log.info("%s: %s", args.root, data.layout)
        if own:
            log.info("%s", "\n".join(roles_table(data)))
            if len({sample.clsname for sample in data.all()}) > 1 and not any(sample.label for sample in data.all()):
                log.info("each folder was taken as a class of good parts; if one holds defects, see --good, --defects")
        infos, readable, unreadable = inspect(data.root, data.all())
        fingerprints = {name: info.fingerprint for name, info in infos.items()}
        parts = parts_of(args.parts, [sample.filename for sample in readable], "--parts")
        train, test = divide(data, readable, fingerprints, parts, args.test_fraction, args.seed)
        if not train:
            raise UsageError(f"{args.root}: no readable image of a good part to train on")
        problems = [
            *data.findings,
            *unreadable,
            *report_masks(test),
            *report_bits(readable, infos),
            *findings.report_too_few(train),
            *report_repeats(train, fingerprints, parts),
            *findings.report_unnamed(train + test, parts),
            *report_leaks(train, test, fingerprints, parts),
        ]
        lists = list_texts(folder_of_lists(args.dataset), train, test)
        check_existing(lists, args.overwrite)
        names = [name for sample in train + test for name in (sample.filename, sample.maskname) if name]
        linked = None if args.copy else first_outside(data.root, names)
        if linked is not None and not args.follow_links:
            how = "pass --copy to have copies, or --follow-links if that is meant"
            raise UsageError(f"{args.root}: {linked} is reached by a link that leads out of this folder; {how}")
        placing.place(args.root, data.root, target, names, args.copy, args.overwrite)
    for path, text in lists.items():
        write_text(path, text)
    print_counts(train, test)
    if own:
        sizes = [info.size for info in infos.values()]
        size = tuple(args.input_size or settings_files.input_size(sizes))
        grey = all(infos[sample.filename].grey for sample in train)
        write_settings(args, len({sample.clsname for sample in train}), size, grey, len(train))
        if not args.input_size and (told := settings_files.resizing(sizes, size)):
            log.info("  %s", told)
    log_stale_lists(args.dataset, {sample.clsname for sample in train})
    return findings.report(problems, findings_file(args.dataset))


def folder_of_lists(dataset: str) -> Path:
    return Path("data") / dataset / "samples"


def findings_file(dataset: str) -> Path:
    return Path("data") / dataset / "findings.txt"


def log_stale_lists(dataset: str, classes: set[str]) -> None:
    folder = folder_of_lists(dataset)
    for name in sorted(set(listed_classes(str(folder / "train_{}.json"))) - classes):
        log.info("%s/train_%s.json belongs to a class that no longer exists; delete it", folder, name)


def divide(
    data: DatasetOnDisk,
    readable: list[Sample],
    fingerprints: dict[str, Fingerprint],
    parts: dict[str, str],
    fraction: float | None,
    seed: int,
) -> tuple[list[Sample], list[Sample]]:
    """Training and test samples: split as the folders are, or by a seeded split of each class's good images."""
    by_name = {sample.filename: sample for sample in readable}
    # Use the samples that inspection returned, because it may have removed their masks.
    train, test, unsplit = (
        [by_name[s.filename] for s in data.samples[split] if s.filename in by_name] for split in (TRAIN, TEST, UNSPLIT)
    )
    if fraction is not None and test:
        raise UsageError(f"--test-fraction: the folders of {data.root} already say what is trained and tested on")
    if fraction is not None:
        # An explicit --test-fraction also splits the images in the training folders.
        train, unsplit = [], unsplit + train
    share = TEST_FRACTION if fraction is None else fraction
    for name in sorted({sample.clsname for sample in unsplit}):
        good = [sample for sample in unsplit if sample.clsname == name and sample.label == 0]
        good_train, good_test = split_good(good, fingerprints, share, seed, parts=parts) if good else ([], [])
        train += good_train
        test += good_test + [sample for sample in unsplit if sample.clsname == name and sample.label]
    return train, test


# ---- output ----------------------------------------------------------------------------------------------------------


def list_texts(folder: Path, train: list[Sample], test: list[Sample]) -> dict[Path, str]:
    """The image lists by path: of each class, and of all classes. Without test images, a test list is empty."""
    texts = {}
    for split, samples in (("train", train), ("test", test)):
        for name in sorted({sample.clsname for sample in train}):
            class_samples = [sample for sample in samples if sample.clsname == name]
            texts[folder / f"{split}_{name}.json"] = list_text(class_samples)
        texts[folder / f"{split}_{UNIFIED}.json"] = list_text(samples)
    return texts


def write_settings(args: argparse.Namespace, classes: int, size: tuple[int, int], grey: bool, images: int) -> None:
    """Write the YAML files for a data set of the user's own; existing files are kept, and what differs is said."""
    folder, kept = Path("experiments") / args.dataset, {}
    reader = {"max_megapixels": args.max_megapixels} if args.max_megapixels != MEGAPIXELS else {}
    reader |= {"follow_links": True} if args.follow_links else {}
    preset, why = chosen_preset(args.preset)
    diffusion, why_diffusion = diffusion_presets.chosen(args.diffusion)
    networks = settings_files.Networks(preset, args.backbone, args.weights, args.normalization, diffusion)
    textures = bool(list_images(TEXTURES_DIR))
    told = settings_files.Told(args.foreground, args.parts, reader, textures, grey, images)
    texts = settings_files.settings_texts(args.dataset, classes, size, told, networks)
    for name, text in texts.items():
        if not (folder / name).is_file():
            write_text(folder / name, text)
        elif (folder / name).read_bytes() != text.encode():
            kept[name] = text
    if len(kept) < len(texts):
        log.info("%s/*.yaml: %s, input size %dx%d (height x width)", folder, counted(classes, "class"), *size)
    if "realnet.yaml" not in kept:
        log.info("  realnet.yaml: preset %s%s; --preset and --backbone choose others", preset, why)
        if not textures and preset != "paper":
            text = "  training anomalies are made of the good images; textures in %s would add a kind (data/README.md)"
            log.info(text, TEXTURES_DIR)
    if "diffusion.yaml" not in kept:
        log.info("  diffusion.yaml, sample.yaml: %s%s; --diffusion chooses another size", diffusion, why_diffusion)
    drawn = settings_files.diffusion_size(size)
    if drawn != size:
        text = "  the diffusion model draws %dx%d, because its sides have to be multiples of %d"
        log.info(text, *drawn, settings_files.STEP)
    for name, text in kept.items():
        changes = settings_files.kept_values(folder / name, text)
        what = f": it has {'; '.join(changes[:4])}{'; ...' * (len(changes) > 4)}" if changes else ""
        log.info("%s is kept as it is%s (delete it to have it written anew)", folder / name, what)


def chosen_preset(wanted: str) -> tuple[str, str]:
    """The preset, and why it is that one, in words."""
    if wanted != "auto":
        return wanted, ""
    if torch.cuda.is_available():
        return "standard", " (there is a GPU)"
    return "quick", " (there is no GPU)"


def check_existing(texts: dict[Path, str], overwrite: bool) -> None:
    """Refuse to overwrite lists with other contents."""
    if overwrite:
        return
    different = [path for path, text in texts.items() if path.is_file() and path.read_bytes() != text.encode()]
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise UsageError(f"{different[0]}{more} already exists and differs; move it away, or pass --overwrite")


def print_counts(train: list[Sample], test: list[Sample]) -> None:
    width = max(len(sample.clsname) for sample in train)
    log.info("%s  train  test: good  defective  with mask", "class".ljust(width))
    for name in sorted({sample.clsname for sample in train}):
        test_samples = [sample for sample in test if sample.clsname == name]
        good, masks = sum(s.label == 0 for s in test_samples), sum(s.maskname is not None for s in test_samples)
        count = sum(s.clsname == name for s in train)
        log.info("%s  %5d  %10d  %9d  %9d", name.ljust(width), count, good, len(test_samples) - good, masks)


def write_previews(dataset: str, overrides: list[str]) -> None:
    """Write data/<dataset>/preview/<class>.png for every class that has a list."""
    path = Path("experiments") / dataset / "realnet.yaml"
    if not path.is_file():
        raise UsageError(f"{path} does not exist; pass --root to write it")
    config = load_config(path, overrides)
    classes = listed_classes(config.dataset.train.meta_file)
    if not classes:
        raise UsageError(f"{config.dataset.train.meta_file}: there are no such lists; pass --root to write them")
    for name in classes:
        sheet = Path("data") / dataset / "preview" / f"{name}.png"
        write_image(sheet, preview_sheet(config.dataset, name, config.random_seed))
        log.info("%s: preview in %s", name, sheet)


if __name__ == "__main__":
    cli.run(main)
