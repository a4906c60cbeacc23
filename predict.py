"""Score images with a trained detector: numbers, verdicts, heat maps and masks.

    python predict.py --checkpoint experiments/MyParts/realnet_checkpoints/bolts --input new_images --output results
    python predict.py --checkpoint model.onnx --input image.png --output results               (or model.pt2)
    ls *.png | python predict.py --checkpoint FILE --input - --output results --threshold 0.4
    python predict.py --checkpoint FILE --input large.png --output results --tile 256 --overlap 64
    python predict.py --checkpoint FILE --input new_images --output results --target-fpr 0.05
    python predict.py --checkpoint FILE --input new_images --output results --continue         (after Ctrl-C)

Writes scores.csv and scores.jsonl (one line per image, as soon as it is done), heatmaps/ and masks/ (at the images' own
size). Verdicts follow the thresholds that evaluation_realnet.py wrote beside the checkpoint, else those of the good
images that training held out (--target-fpr), or --threshold and --pixel-threshold. With thresholds from held-out
images, scores are normalised: 0.5 is the threshold (--raw-scores writes them as the model gives them). Images that
cannot be read or scored are reported on stderr and skipped; the exit code is then 1. Mask folders and earlier results
below the input folder are not scored. Up to 20 images, their scores are also printed. Images are read, scored and drawn
at the same time.
"""

import argparse
from pathlib import Path

from datasets.folders import MEGAPIXELS
from utils import arguments
from utils.choices import FORMATS, NO_PICTURES, PNG


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    model_help = "checkpoint, class folder with a checkpoint, or .onnx or .pt2 file"
    parser.add_argument("--checkpoint", required=True, help=model_help)
    parser.add_argument("--config", help="realnet.yaml, for checkpoints that hold no settings")
    parser.add_argument("--input", required=True, help="image, folder, list of images, or - for paths on stdin")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--class_name", help="use this class's thresholds, if the model serves several")
    fpr_help = "share of good images that may be called anomalous, by held-out good images (default: 0.01)"
    parser.add_argument("--target-fpr", type=float, help=fpr_help)
    parser.add_argument("--threshold", type=float, help="raw image score from which an image is anomalous")
    parser.add_argument("--pixel-threshold", type=float, help="map value from which a pixel is anomalous")
    parser.add_argument("--raw-scores", action="store_true", help="write scores as the model gives them")
    parser.add_argument("--tile", type=int, help="score large images in square tiles with this side, in pixels")
    parser.add_argument("--overlap", type=int, help="pixels that neighbouring tiles share (64, at most tile / 4)")
    parser.add_argument("--batch-size", type=int, help="images or tiles per batch (8; 1 for stdin)")
    limit_help = f"refuse images above this size (default: as in training; {MEGAPIXELS})"
    parser.add_argument("--max-megapixels", type=float, help=limit_help)
    pictures = parser.add_mutually_exclusive_group()
    heat_help = "format of heat maps (png); jpg is written in a sixth of the time; masks are png always"
    pictures.add_argument("--heatmaps", choices=FORMATS, default=PNG, help=heat_help)
    pictures.add_argument("--no-pictures", action="store_true", help="write no heat maps or masks")
    arguments.add_precision(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace existing results in the folder")
    existing.add_argument(
        "--continue", dest="resume", action="store_true", help="score what is not in scores.jsonl yet"
    )
    arguments.add_device(parser)
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import math
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets.build import preprocessing_of
from datasets.images import allow_megapixels, count_pages, pixels_of
from evaluation.detector import NOT_FINITE, Detection, Detector, Tiles, as_one_process, checkpoint_path, tiles_of
from evaluation.inputs import HEAT_MAPS, MASKS, SCORES, Input, find_inputs
from evaluation.prediction_files import TABLE, Pictures, Results, rounded
from evaluation.thresholds import Thresholds
from utils import cli
from utils.errors import RunError, UsageError
from utils.lock import folder_lock
from utils.log import log, log_to_terminal
from utils.names import shown
from utils.prefetch import PIXELS_AHEAD, groups, prefetch

FEW_IMAGES = 20  # whose scores are printed too
PIXELS_DRAWN = 32_000_000  # of images that are drawn, or wait for it


@dataclass(frozen=True)
class ReadInput:
    """An input with its image (H,W,3) uint8, or None and the reason why it cannot be read."""

    source: Input
    image: np.ndarray | None
    problem: str = ""
    pages: int = 1


@dataclass(frozen=True)
class Scored:
    """An image with its detection, or with the reason why there is none; then its pictures, and their name."""

    read: ReadInput
    detection: Detection | None = None
    problem: str = ""
    name: str = ""
    pictures: Pictures | None = None

    @property
    def source(self) -> Input:
        return self.read.source


def main() -> None:
    as_one_process()
    args = parse_args()
    check_arguments(args)
    batch = args.batch_size or (1 if args.input == "-" else 8)
    tiles = tiles_of(args.tile, args.overlap, batch)
    log_to_terminal()
    signal.signal(signal.SIGTERM, interrupt)
    detector = Detector.load(args.checkpoint, args.config, args.device, args.precision)
    detector = detector.with_thresholds(choose_thresholds(detector.thresholds, tiles, args))
    preprocessing = preprocessing_of(detector.config.dataset)
    reader = detector.config.dataset.image_reader.kwargs
    allow_megapixels(args.max_megapixels or reader.max_megapixels)
    inputs = find_inputs(args.input, reader.image_dir, sys.stdin, args.output, reader.follow_links)

    def read(source: Input) -> ReadInput:
        try:
            return ReadInput(source, preprocessing.read_full(source.path), pages=count_pages(source.path))
        except UsageError as error:
            return ReadInput(source, None, str(error))
        # Whatever one image raises must not end the run.
        except Exception as error:
            return ReadInput(source, None, f"{source.path}: {type(error).__name__}: {error}")

    options = {"overwrite": args.overwrite, "resume": args.resume}
    options |= {"heat_maps": NO_PICTURES if args.no_pictures else args.heatmaps, "masks": not args.no_pictures}
    # Paths on stdin may arrive one by one. Working ahead would delay the results of earlier ones.
    ahead = 0 if args.input == "-" else 2 * batch
    run = run_of(args, tiles, detector.thresholds)
    with folder_lock(args.output), Results(args.output, detector.thresholds, run, **options) as results:
        left = (source for source in inputs.images if source.name not in results.done)
        images = prefetch(read, left, ahead, lambda source: pixels_of(source.path))
        count = None if inputs.count is None else max(0, inputs.count - len(results.done))
        if results.done:
            others = "all are done" if count == 0 else "the others follow"
            log.info("%d images were scored before; %s", len(results.done), others)
        try:
            scored = score(detector, images, tiles, batch, ahead)
            unreadable, failed = write(scored, results, count, ahead)
        except KeyboardInterrupt:
            log.info("stopped after %d images; the same command with --continue scores the others", results.count)
            raise
    for problem in inputs.problems:
        report("unreadable", problem)
    unreadable += len(inputs.problems)
    verdicts = f", {results.anomalous} anomalous" if detector.thresholds.image is not None else ""
    scored = f", {failed} not scored" if failed else ""
    table = args.output / TABLE
    log.info("%s: %d images%s, %d unreadable%s", table, results.count, verdicts, unreadable, scored)
    if unreadable or failed:
        sys.exit(1)


def interrupt(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C, so that what is scored so far is whole."""
    raise KeyboardInterrupt


def check_arguments(args: argparse.Namespace) -> None:
    for option, value in (("--threshold", args.threshold), ("--pixel-threshold", args.pixel_threshold)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{option} {value}: has to be a finite number")
    if args.target_fpr is not None and not 0 < args.target_fpr < 1:
        raise UsageError(f"--target-fpr {args.target_fpr}: has to lie between 0 and 1, e.g. 0.01 for 1 %")
    if args.target_fpr is not None and args.threshold is not None:
        raise UsageError("--target-fpr chooses the threshold that --threshold gives; pass one of them")
    if args.max_megapixels is not None and not (math.isfinite(args.max_megapixels) and args.max_megapixels > 0):
        raise UsageError(f"--max-megapixels {args.max_megapixels:g}: has to be a number above 0")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: at least 1")
    existing = [path for path in (args.output / TABLE, args.output / SCORES) if path.exists()]
    foreign = [path for path in (args.output / HEAT_MAPS, args.output / MASKS) if path.exists() and not existing]
    if foreign:
        raise UsageError(f"{foreign[0]} exists, but is no result of predict.py; choose another --output")
    if existing and not (args.overwrite or args.resume):
        advice = "choose another --output, or pass --overwrite, or --continue after an interrupted run"
        raise UsageError(f"{existing[0]} already exists; {advice}")


def choose_thresholds(evaluated: Thresholds | None, tiles: Tiles | None, args: argparse.Namespace) -> Thresholds:
    """The thresholds of the model, overridden by those of the command line; without a scale if scores stay raw."""
    thresholds = evaluated
    if thresholds is None:
        thresholds = Thresholds(None, None, "")
        if args.threshold is None and args.target_fpr is None:
            text = "no thresholds beside %s: scores without verdicts (evaluate it, or pass --threshold)"
            log.info(text, args.checkpoint)
    if args.target_fpr is not None:
        thresholds = thresholds.at(args.target_fpr)
    if args.class_name:
        thresholds = thresholds.of_class(args.class_name)
    if tiles:
        thresholds = tiled_thresholds(thresholds, tiles, args)
    if args.threshold is None:
        thresholds.check_precision(args.precision, args.checkpoint)
    elif thresholds.precision != args.precision:
        thresholds = replace(thresholds, image=None, pixel=None)
    thresholds = replace(thresholds, precision=args.precision)
    if args.raw_scores or args.threshold is not None:
        thresholds = replace(thresholds, scale=None)
    changes = {"image": args.threshold, "pixel": args.pixel_threshold}
    thresholds = replace(thresholds, **{name: value for name, value in changes.items() if value is not None})
    if args.threshold is None and thresholds.image is not None:
        log.info("threshold %.6g: %s", thresholds.image, thresholds.rule)
    return thresholds


def tiled_thresholds(thresholds: Thresholds, tiles: Tiles, args: argparse.Namespace) -> Thresholds:
    """The thresholds for these tiles; if there are none, those for whole images, with a warning."""
    tiled = thresholds.tiled.get(tiles.name)
    if tiled is not None:
        return tiled
    if args.threshold is None and thresholds.image is not None:
        text = "warning: the threshold %.6g was chosen on whole images, and tiles score differently; choose one for "
        advice = "tiles with evaluation_realnet.py --tile %d --overlap %d, or pass --threshold (docs/benchmarks.md)"
        log.warning(text + advice, thresholds.image, tiles.size, tiles.overlap)
    return thresholds


def run_of(args: argparse.Namespace, tiles: Tiles | None, thresholds: Thresholds) -> dict[str, Any]:
    """What decides the lines of the results: --continue refuses to go on with something else."""
    model = checkpoint_path(args.checkpoint)
    return {
        "checkpoint": str(model.resolve()),
        "checkpoint_time": datetime.fromtimestamp(model.stat().st_mtime).isoformat(timespec="seconds"),
        "input": args.input if args.input == "-" else str(Path(args.input).resolve()),
        "tile": args.tile,
        "overlap": tiles.overlap if tiles else None,
        "threshold": rounded(thresholds.image),
        "pixel_threshold": rounded(thresholds.pixel),
        "raw_scores": thresholds.scale is None,
        "precision": args.precision,
    }


def report(kind: str, problem: str) -> None:
    """Name an image without a result on stderr."""
    tqdm.write(f"{kind}: {shown(problem)}", file=sys.stderr)


# ---- the steps after reading, each in threads of its own -------------------------------------------------------------


def score(
    detector: Detector, images: Iterator[ReadInput], tiles: Tiles | None, batch: int, ahead: int
) -> Generator[Scored, None, None]:
    """Score images batch by batch."""
    # Tiles are batches of their own, so that one large image is held at a time.
    batches = groups(images, 1 if tiles else batch, image_pixels, PIXELS_AHEAD)
    waiting = detector.at_once + 1 if ahead else 0
    for scored in prefetch(
        lambda group: score_batch(detector, group, tiles),
        batches,
        waiting,
        lambda group: sum(map(image_pixels, group)),
        threads=detector.at_once,
    ):
        yield from scored


def score_batch(detector: Detector, group: list[ReadInput], tiles: Tiles | None) -> list[Scored]:
    """The results of images, in their order."""
    detections = iter(detect(detector, [item.image for item in group if item.image is not None], tiles))
    scored = []
    for item in group:
        found = None if item.image is None else next(detections)
        if isinstance(found, Detection):
            scored.append(Scored(item, found) if found.finite else Scored(item, problem=NOT_FINITE))
        else:
            scored.append(Scored(item, problem=found or item.problem))
    return scored


def image_pixels(item: ReadInput) -> int:
    return 0 if item.image is None else item.image.shape[0] * item.image.shape[1]


def detect(detector: Detector, images: list[np.ndarray], tiles: Tiles | None) -> list[Detection | str]:
    """The result of each image, or the reason why there is none."""
    if not images:
        return []
    try:
        return list(detector.detect(images, tiles))
    # Memory may be too small for the batch or for one image.
    except Exception as error:
        if len(images) == 1:
            return [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
    return [result for image in images for result in detect(detector, [image], tiles)]


def write(scored: Generator[Scored, None, None], results: Results, count: int | None, ahead: int) -> tuple[int, int]:
    """Draw images and write the results in order; returns how many could not be read, and not be scored."""
    unreadable = failed = 0
    paged: list[str] = []
    bar = tqdm(total=count, desc="images", leave=False, disable=None)
    named = (item if item.problem else replace(item, name=results.name(item.source)) for item in scored)
    drawn = prefetch(
        lambda item: draw(results, item), named, ahead, lambda item: image_pixels(item.read), PIXELS_DRAWN, drain=True
    )
    # Closed before the folder's lock is released: what threads are still writing is then whole, and no more is scored.
    with closing(scored), closing(drawn):
        for item in drawn:
            bar.update()
            source, problem = item.source, item.problem or add(results, item)
            if item.read.image is None:
                report("unreadable", problem)
                unreadable += 1
            elif problem:
                report("not scored", f"{source.path}: {problem}")
                failed += 1
            else:
                detection = item.detection
                if count is None or count <= FEW_IMAGES:
                    verdict = {None: "", True: "  anomalous", False: "  normal"}[detection.is_anomalous]
                    log.info("%.4f%s  %s", results.thresholds.normalised(detection.score), verdict, source.name)
                if item.read.pages > 1:
                    paged.append(f"{source.name} ({item.read.pages})")
    bar.close()
    if paged:
        names = ", ".join(paged[:3]) + (", ..." if len(paged) > 3 else "")
        log.info("images with several pages, of which the first was scored: %d, %s", len(paged), names)
    return unreadable, failed


def draw(results: Results, item: Scored) -> Scored:
    """Write the pictures of an image that was scored."""
    if item.problem:
        return item
    try:
        return replace(item, pictures=results.draw(item.name, item.read.image, item.detection))
    except (RunError, UsageError):
        # The folder cannot be written to, which holds for all images.
        raise
    except Exception as error:
        return replace(item, problem=f"{type(error).__name__}: {error}".splitlines()[0])


def add(results: Results, item: Scored) -> str:
    """Write the line of an image; returns what is wrong with it, if anything."""
    try:
        results.add(item.source, item.read.image, item.detection, item.pictures)
    except (RunError, UsageError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


if __name__ == "__main__":
    cli.run(main)
