"""Write pairs of an image with a synthetic anomaly and its mask: training's own anomalies, as files.

    python synthesize.py --dataset MVTec-AD --class_name bottle --count 1000 --output pairs
    python synthesize.py --dataset MVTec-AD --class_name all --types sdas=0.5,dtd=0.5 --format coco --output pairs
    python synthesize.py --dataset MyParts --types cutpaste,self,noise --size native --format yolo --output pairs
    python synthesize.py --dataset MVTec-AD --class_name bottle --source edit --depth 0.2 0.6 --output pairs
    torchrun --nproc_per_node=4 synthesize.py --dataset MVTec-AD --class_name all --output pairs

Settings: experiments/<dataset>/realnet.yaml. Writes, per class, <output>/<class>/test/<type>/<number>.png with
ground_truth/<type>/<number>_mask.png, the good images to train/good/ and test/good/, pairs.csv and preview.png; the
output is a data set that prepare_data.py reads. Pair i depends on the settings, the seed and i only. Existing pairs are
not drawn again: the same command goes on where it was stopped, or adds pairs with a larger --count.
--source edit draws anomalies on good images by the diffusion model of the sample.yaml beside realnet.yaml. More in
docs/synthesis.md.
"""

import argparse

from utils import arguments
from utils.choices import COCO, EDIT, MVTEC, PAIR_FORMATS

SOURCES = ("blend", EDIT)
DEPTH, STRENGTH = (0.2, 0.6), (0.1, 0.3)  # defaults of --source edit
NATIVE, INPUT = SIZES = ("native", "input")
MOST = 1_000_000  # pairs of a class, whose numbers have six digits


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--count", type=int, default=1000, help="pairs of each class (default 1000)")
    parser.add_argument("--output", required=True, help="folder that gets a folder for each class")
    types_help = "anomaly types with their shares: sdas=0.5,dtd=0.5, or sdas,dtd (dataset.train.anomaly_types)"
    parser.add_argument("--types", help=types_help)
    source_help = "blend sources into good images, as training does, or edit them by the diffusion model (blend)"
    parser.add_argument("--source", choices=SOURCES, default="blend", help=source_help)
    depth_help = "edit: range of the depth, the share of the timesteps that images are noised to (0.2 0.6)"
    parser.add_argument("--depth", nargs=2, type=float, metavar=("LOW", "HIGH"), help=depth_help)
    strength_help = "edit: range of the strength s (0.1 0.3)"
    parser.add_argument("--strength", nargs=2, type=float, metavar=("LOW", "HIGH"), help=strength_help)
    parser.add_argument(
        "--format", choices=PAIR_FORMATS, default=MVTEC, help="also write annotations.json, or the folder yolo/ (mvtec)"
    )
    size_help = "the good images' own size, or dataset.input_size as in training (native)"
    parser.add_argument("--size", choices=SIZES, default=NATIVE, help=size_help)
    parser.add_argument("--seed", type=int, help="seed of the draws, instead of random_seed")
    parser.add_argument("--overwrite", action="store_true", help="delete existing pairs and draw them again")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from easydict import EasyDict

from datasets.build import (
    build_realnet_test_set,
    build_realnet_train_set,
    check_realnet_data,
    hold_out,
    training_images,
)
from datasets.good_images import good_places, place_good
from datasets.lists import UNIFIED, ImageList, chosen_classes, class_names
from datasets.pair_folders import PairFolder
from datasets.pair_types import chosen_types
from datasets.pairs import Pair, TrainingPairs
from datasets.realnet import RealNetTrainSet
from preparation.edit_pairs import Editing, set_up_editing
from utils import cli, distributed
from utils.config import collect_errors, load_config, plain
from utils.counts import counted
from utils.distributed import Run, usable_cores
from utils.errors import RunError, Stopped, UsageError
from utils.lock import folder_lock
from utils.log import log, log_to_terminal, progress_bar
from utils.prefetch import prefetch
from utils.run_record import identity_of
from utils.signals import StopRequest, signal_name, stop_requests

# Settings of dataset.train that the record of a folder need not hold: it has the images themselves, by their names.
NOT_RECORDED = ("meta_file", "sdas_dir", "dtd_dir", "edit_dir", "anomaly_types", "validation_fraction", "parts")


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set, "realnet")
    apply_arguments(config, args)
    classes = check(config, path, args.class_name)
    # Pairs are made in threads; within each, more threads would only get in each other's way.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with distributed.session(args.device, identity_of(config, classes=classes)) as run, stop_requests(run) as stop:
        log_to_terminal(logging.INFO if run.is_main else logging.ERROR)
        editing = None
        if args.source == EDIT:
            editing = set_up_editing(path.with_name("sample.yaml"), args.dataset, args.strength, args.depth, run)
        for class_name in classes:
            synthesize(config, class_name, args, editing, run, stop)
        log.info("Next: python prepare_data.py --dataset NAME --root %s --preview", args.output)


# ---- arguments and checks --------------------------------------------------------------------------------------------


def apply_arguments(config: EasyDict, args: argparse.Namespace) -> None:
    """Apply the command line to the settings, and check what can be checked without the data."""
    if not 1 <= args.count <= MOST:
        raise UsageError(f"--count {args.count}: at least 1, at most {MOST}")
    if args.seed is not None and args.seed < 0:
        raise UsageError(f"--seed {args.seed}: at least 0")
    if args.seed is None:
        args.seed = config.random_seed
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file; name a folder")
    if args.source == EDIT:
        check_edit(args)
        # Nothing is blended; this type opens no folder.
        config.dataset.train.anomaly_types = {"noise": 1.0}
        return
    for option in ("depth", "strength"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option}: belongs to --source edit")
    config.dataset.train.anomaly_types = chosen_types(args.types, config.dataset.train.anomaly_types)


def check_edit(args: argparse.Namespace) -> None:
    """Check the options of --source edit, and set their defaults."""
    if args.types is not None:
        raise UsageError("--types: belongs to --source blend; an edit has the type edit")
    args.depth, args.strength = args.depth or DEPTH, args.strength or STRENGTH
    for option, most in (("depth", 1), ("strength", 100)):
        low, high = getattr(args, option)
        if not 0 <= low <= high <= most:
            text = f"is not a range with 0 <= low <= high <= {most}"
            raise UsageError(f"--{option} {low:g} {high:g}: {text}")


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the data's settings before anything is drawn; returns the classes."""
    classes: list[str] = []

    def choose_classes() -> None:
        classes.extend(chosen_classes(class_name, config.dataset.train.meta_file))

    def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "--class_name", choose_classes
        for name in classes:
            yield "dataset", lambda name=name: check_realnet_data(config.dataset, name)

    collect_errors(path, checks())
    return classes


# ---- a class ---------------------------------------------------------------------------------------------------------


def synthesize(
    config: EasyDict, class_name: str, args: argparse.Namespace, editing: Editing | None, run: Run, stop: StopRequest
) -> None:
    """Write the pairs of a training list: of a class, or of each class of a list of all classes."""
    held_out = hold_out(config.dataset, class_name, config.random_seed, run, stop)
    train_set = build_realnet_train_set(config.dataset, class_name, args.seed, held_out)
    others = good_test_images(config, class_name, held_out)
    unified = class_name == UNIFIED
    for name in class_names(train_set.samples) if unified else [class_name]:
        indices = train_set.images.of_class(name) if unified else list(range(len(train_set)))
        tested = ImageList([s for s in others.samples if not unified or s.clsname == name], others.image_dir)
        if editing is None:
            make, types = TrainingPairs(train_set, indices, args.size == NATIVE), config.dataset.train.anomaly_types
        else:
            make, types = editing.pairs(train_set, indices, args.size == NATIVE, name, stop.heed), {EDIT: 1.0}
        folder = PairFolder(Path(args.output) / name, list(types), args.seed)
        record = record_of(config, args, train_set, indices, tested)
        record |= {"types": dict(types), "edit": editing.record if editing else None}
        with folder_lock(folder.path, run):
            began = time.monotonic()
            existing = begin(folder, record, make, args.overwrite)
            # Twice as many threads as cores: about half of their time, they wait for the disk.
            threads = 2 * min(config.dataset.workers, max(1, usable_cores() // run.world_size))
            draw_pairs(folder, make, existing, args.count, threads, run, stop)
            goods = good_places(train_set.images, indices, folder.path / "train/good")
            goods += good_places(tested, range(len(tested)), folder.path / "test/good")
            put = partial(place_good, train_set.preprocessing, args.size == NATIVE)
            place_all(put, goods, threads, run, stop)
            distributed.barrier()
            distributed.on_main(partial(finish, folder, args, threads, run, stop, existing, began))


def good_test_images(config: EasyDict, class_name: str, held_out: list[str]) -> ImageList:
    """Good images of which there are no pairs: those that training leaves out, else those of the test list."""
    if held_out:
        images, chosen = training_images(config.dataset, class_name), set(held_out)
        return ImageList([sample for sample in images.samples if sample.filename in chosen], images.image_dir)
    images = build_realnet_test_set(config.dataset, class_name).images
    return ImageList([sample for sample in images.samples if sample.label == 0], images.image_dir)


def record_of(
    config: EasyDict, args: argparse.Namespace, train_set: RealNetTrainSet, indices: list[int], tested: ImageList
) -> dict[str, Any]:
    """What the files of a folder depend on, but for the contents of the images."""
    data = plain(config.dataset)
    train = {name: value for name, value in data["train"].items() if name not in NOT_RECORDED}
    reader = {name: data["image_reader"]["kwargs"][name] for name in ("color_mode", "bits")}
    used = ImageList([train_set.samples[index] for index in indices], train_set.images.image_dir)
    return {
        "seed": args.seed,
        "size": args.size,
        "input_size": data["input_size"],
        "type": data["type"],
        "foreground": data["foreground"],
        **reader,
        "train": train,
        "good": used.summary(),
        "test_good": tested.summary(),
        "sources": train_set.synthesis.summaries({sample.clsname for sample in used.samples}),
    }


def begin(
    folder: PairFolder, record: dict[str, Any], make: Callable[[int], Pair], overwrite: bool
) -> dict[int, dict[str, str]]:
    """Check the folder and make it ready; returns the lines of the pairs that it holds."""
    distributed.on_main(lambda: folder.check(record, overwrite))
    if overwrite:
        # What cannot be drawn fails here, before anything is deleted.
        make(0)
        distributed.barrier()
    distributed.on_main(lambda: folder.begin(record, overwrite))
    existing = folder.rows()
    # No rank may write before every rank has listed the folder.
    distributed.barrier()
    return existing


def draw_pairs(
    folder: PairFolder,
    make: Callable[[int], Pair],
    existing: dict[int, dict[str, str]],
    count: int,
    threads: int,
    run: Run,
    stop: StopRequest,
) -> None:
    """Draw and write this rank's share of the missing ones of the pairs 0 .. count - 1.

    Raises:
        Stopped: a signal stopped the run after a pair; the same command continues from there.
    """
    missing = [number for number in range(count) if number not in existing][run.rank :: run.world_size]
    rows = prefetch(lambda number: folder.write(number, make(number)), missing, ahead=2 * threads, threads=threads)
    try:
        # Closed, so that no thread writes any more when the folder's lock is released.
        with closing(rows):
            for row in progress_bar(rows, run, folder.path.name, len(missing), stop):
                folder.note(row, run.rank)
    except Stopped as stopped:
        log.info("%s: stopped; the same command without --overwrite goes on", signal_name(stopped.signal))
        raise


def place_all(
    put: Callable[[tuple[Path, Path]], None],
    places: list[tuple[Path, Path]],
    threads: int,
    run: Run,
    stop: StopRequest,
) -> None:
    """Put this rank's share of the good images where they belong; those that are there stay."""
    mine = places[run.rank :: run.world_size]
    done = prefetch(put, mine, ahead=2 * threads, threads=threads)
    with closing(done):
        for _ in progress_bar(done, run, "good images", len(mine), stop):
            pass


def finish(
    folder: PairFolder,
    args: argparse.Namespace,
    threads: int,
    run: Run,
    stop: StopRequest,
    existing: dict[int, dict[str, str]],
    began: float,
) -> None:
    """Write the table, the sheet and the format that was asked for, and say what there is."""
    rows = folder.rows()
    lost = set(range(args.count)) - set(rows)
    if lost:
        pairs = counted(len(lost), "pair has", "pairs have")
        raise RunError(f"{folder.path}: {pairs} vanished, e.g. number {min(lost)}; run it once more")
    # Files that an earlier command has written have to name the new pairs, too.
    for form in sorted({args.format, *folder.formats()} - {MVTEC}):
        with closing(prefetch(folder.mask, rows.values(), ahead=2 * threads, threads=threads)) as masks:
            bar = progress_bar(masks, run, form, len(rows), stop)
            (folder.write_coco if form == COCO else folder.write_yolo)(rows, bar)
    folder.finish(rows)
    types = ", ".join(f"{name} {count}" for name, count in Counter(row["type"] for row in rows.values()).most_common())
    kept = f"; {len(existing)} of them existed already (--overwrite draws them again)" if existing else ""
    seconds = time.monotonic() - began
    pairs = counted(len(rows), "pair")
    log.info("%s: %s (%s) in %s, %.1f s%s", folder.path.name, pairs, types, folder.path, seconds, kept)


if __name__ == "__main__":
    cli.run(main)
