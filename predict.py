"""Score images with a trained detector: numbers, verdicts, heat maps and masks.

    python predict.py --checkpoint experiments/MyParts/realnet_checkpoints/bolts --input new_images --output results
    python predict.py --checkpoint model.onnx --input image.png --output results               (or model.pt2)
    ls *.png | python predict.py --checkpoint FILE --input - --output results --threshold 0.4
    python predict.py --checkpoint FILE --input large.png --output results --tile 256 --overlap 64
    python predict.py --checkpoint FILE --input new_images --output results --target-fpr 0.05
    python predict.py --checkpoint FILE --input new_images --output results --continue         (after Ctrl-C)
    python predict.py --checkpoint FILE --watch camera --output results --on-anomaly "./notify.sh {}"

Writes scores.csv and scores.jsonl (one line per image, as soon as it is done), heatmaps/ and masks/ (at the images' own
size). Verdicts follow the thresholds that evaluation_realnet.py wrote beside the checkpoint, else those of the good
images that training held out (--target-fpr), or --threshold and --pixel-threshold. With thresholds from held-out
images, scores are normalised: 0.5 is the threshold (--raw-scores writes them as the model gives them). Images that
cannot be read or scored are reported on stderr and skipped; the exit code is then 1. Mask folders and earlier results
below the input folder are not scored. Up to 20 images, their scores are also printed. Images are read, scored and drawn
at the same time.

--watch scores the images that are in a folder, then those that arrive, each once it is complete, until Ctrl-C or
SIGTERM ends it (exit code 0). It goes on with results in --output, so a restart scores no image twice. An image that
cannot be read is named once, and tried again when it changes. --on-anomaly runs a program, not a shell, for each
anomalous image; {} is the image's path, and REALNET_IMAGE, REALNET_SCORE, REALNET_THRESHOLD, REALNET_HEATMAP and
REALNET_MASK are in its environment. See docs/deployment.md.
"""

import argparse
from pathlib import Path

from datasets.folders import MEGAPIXELS
from utils import arguments
from utils.choices import FORMATS, NO_PICTURES, PNG

INTERVAL = 1.0  # seconds between two looks of --watch


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    model_help = "checkpoint, class folder with a checkpoint, or .onnx or .pt2 file"
    parser.add_argument("--checkpoint", required=True, help=model_help)
    parser.add_argument("--config", help="realnet.yaml, for checkpoints that hold no settings")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="image, folder, list of images, or - for paths on stdin")
    source.add_argument("--watch", metavar="FOLDER", type=Path, help="score the images in a folder as they arrive")
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
    interval_help = f"seconds between two looks of --watch ({INTERVAL:g})"
    parser.add_argument("--interval", type=float, metavar="SECONDS", help=interval_help)
    command_help = "with --watch: program to run for each anomalous image; {} is its path"
    parser.add_argument("--on-anomaly", metavar="COMMAND", help=command_help)
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
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from datasets.images import allow_megapixels
from evaluation.anomaly_command import CommandQueue, parse_command
from evaluation.detector import Detector, Tiles, checkpoint_path, tiles_of
from evaluation.inputs import HEAT_MAPS, MASKS, SCORES, check_input, find_inputs
from evaluation.prediction import Predictor, Scored
from evaluation.prediction_files import TABLE, Results, rounded
from evaluation.thresholds import Thresholds
from evaluation.watching import FolderWatch, pause
from utils import cli
from utils.counts import counted
from utils.distributed import Run
from utils.errors import UsageError
from utils.launcher import as_one_process
from utils.lock import folder_lock
from utils.log import log, log_to_terminal
from utils.names import shown
from utils.signals import StopRequest, stop_requests

FEW_IMAGES = 20  # whose scores are printed too
BATCH = 8


def main() -> None:
    as_one_process()
    args = parse_args()
    check_arguments(args)
    log_to_terminal()
    if args.watch:
        with stop_requests(Run(0, 1, torch.device("cpu"))) as stop:
            watch(args, stop)
    else:
        signal.signal(signal.SIGTERM, interrupt)
        predict(args)


def predict(args: argparse.Namespace) -> None:
    """Score the images of --input."""
    # Paths on stdin may arrive one by one.
    predictor = load(args, 1 if args.input == "-" else BATCH, at_once=args.input == "-")
    reader = predictor.detector.config.dataset.image_reader.kwargs
    inputs = find_inputs(args.input, reader.image_dir, sys.stdin, args.output, reader.follow_links)
    tally = Tally(predictor.detector.thresholds)
    with folder_lock(args.output), open_results(args, predictor, resume=args.resume) as results:
        left = (source for source in inputs.images if source.name not in results.done)
        count = None if inputs.count is None else max(0, inputs.count - len(results.done))
        if results.done:
            others = "all are done" if count == 0 else "the others follow"
            log.info("%s scored before; %s", counted(len(results.done), "image was", "images were"), others)
        bar = tqdm(total=count, desc="images", leave=False, disable=None)
        try:
            with closing(predictor.run(left, results)) as done, bar:
                for item in done:
                    bar.update()
                    tally.add(item, printed=count is None or count <= FEW_IMAGES)
        except KeyboardInterrupt:
            scored = counted(results.count, "image")
            log.info("stopped after %s; the same command with --continue scores the others", scored)
            raise
    for problem in inputs.problems:
        report("unreadable", problem)
    tally.unreadable += len(inputs.problems)
    failed = f", {tally.failed} not scored" if tally.failed else ""
    tally.summarise(results, f"{tally.unreadable} unreadable{failed}")
    if tally.unreadable or tally.failed:
        sys.exit(1)


def watch(args: argparse.Namespace, stop: StopRequest) -> None:
    """Score the images of --watch, then those that arrive there, until a signal ends it."""
    command = None if args.on_anomaly is None else parse_command(args.on_anomaly)
    interval = INTERVAL if args.interval is None else args.interval
    predictor = load(args, BATCH)
    thresholds = predictor.detector.thresholds
    if command and thresholds.image is None:
        raise UsageError("--on-anomaly: there is no threshold, so no image is anomalous; evaluate, or pass --threshold")
    tally = Tally(thresholds)
    with (
        folder_lock(args.output),
        open_results(args, predictor, resume=not args.overwrite) as results,
        CommandQueue(command) as commands,
    ):
        folder = FolderWatch(args.watch, args.output, results.done)
        before = counted(len(results.done), "image was", "images were")
        log.info("watching %s (%s scored before); Ctrl-C ends it", args.watch, before)
        while not stop.signal:
            # What is in hand when a signal arrives is still written; the next start finds the others.
            complete = takewhile(lambda source: not stop.signal, folder.look())
            with closing(predictor.run(complete, results)) as done:
                for item in done:
                    if not item.problem or folder.failed(item.source.name):
                        tally.add(item, printed=True)
                    if not item.problem:
                        folder.scored(item.source.name)
                    if item.detection is not None and item.detection.is_anomalous and not item.problem:
                        commands.add(item.source.path, variables_of(item, results))
            pause(interval, stop)
    tally.summarise(results, f"{len(folder.broken)} that could not be scored")


def variables_of(item: Scored, results: Results) -> dict[str, str]:
    """What --on-anomaly finds in its environment beside the image's path; empty for a picture that is not written."""
    pictures = {"HEATMAP": item.pictures.heat_map, "MASK": item.pictures.mask}
    written = {name: str((results.folder / path).resolve()) if path else "" for name, path in pictures.items()}
    numbers = {
        "SCORE": f"{results.thresholds.normalised(item.detection.score):.6f}",
        "THRESHOLD": str(results.threshold),
    }
    return {f"REALNET_{name}": value for name, value in (numbers | written).items()}


@dataclass
class Tally:
    """Says what became of images, and counts those without a score.

    Args:
        thresholds: those of the verdicts; scores are printed as they normalise them.
    """

    thresholds: Thresholds
    unreadable: int = 0
    failed: int = 0
    paged: list[str] = field(default_factory=list)

    def add(self, item: Scored, printed: bool) -> None:
        """Count an image, and name it if it has no score, or if its score is to be printed."""
        if item.read.image is None:
            report("unreadable", item.problem)
            self.unreadable += 1
            return
        if item.problem:
            report("not scored", f"{item.source.path}: {item.problem}")
            self.failed += 1
            return
        if printed:
            verdict = {None: "", True: "  anomalous", False: "  normal"}[item.detection.is_anomalous]
            log.info("%.4f%s  %s", self.thresholds.normalised(item.detection.score), verdict, item.source.name)
        if item.read.pages > 1:
            self.paged.append(f"{item.source.name} ({item.read.pages})")

    def summarise(self, results: Results, without: str) -> None:
        """The last line, and what should be known about images with several pages.

        Args:
            without: how many images have no score.
        """
        if self.paged:
            names = ", ".join(self.paged[:3]) + (", ..." if len(self.paged) > 3 else "")
            log.info("images with several pages, of which the first was scored: %d, %s", len(self.paged), names)
        verdicts = f", {results.anomalous} anomalous" if self.thresholds.image is not None else ""
        scored = counted(results.count, "image")
        log.info("%s: %s%s, %s", results.folder / TABLE, scored, verdicts, without)


def load(args: argparse.Namespace, batch: int, at_once: bool = False) -> Predictor:
    """The detector with its thresholds, and how it is used.

    Args:
        batch: images in one forward pass, unless --batch-size says it.
        at_once: whether each image has its result before the next one is asked for.
    """
    batch = args.batch_size or batch
    tiles = tiles_of(args.tile, args.overlap, batch)
    detector = Detector.load(args.checkpoint, args.config, args.device, args.precision)
    detector = detector.with_thresholds(choose_thresholds(detector.thresholds, tiles, args))
    if args.max_megapixels:
        allow_megapixels(args.max_megapixels)
    return Predictor(detector, tiles, batch, ahead=0 if at_once else 2 * batch)


def open_results(args: argparse.Namespace, predictor: Predictor, resume: bool) -> Results:
    thresholds = predictor.detector.thresholds
    heat_maps = NO_PICTURES if args.no_pictures else args.heatmaps
    run, masks = run_of(args, predictor.tiles, thresholds), not args.no_pictures
    return Results(args.output, thresholds, run, heat_maps, masks, overwrite=args.overwrite, resume=resume)


def report(kind: str, problem: str) -> None:
    """Name an image without a result on stderr."""
    tqdm.write(f"{kind}: {shown(problem)}", file=sys.stderr)


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
    if args.interval is not None and not (math.isfinite(args.interval) and args.interval > 0):
        raise UsageError(f"--interval {args.interval:g}: has to be a number of seconds above 0")
    for option, value in (("--interval", args.interval), ("--on-anomaly", args.on_anomaly)):
        if value is not None and not args.watch:
            raise UsageError(f"{option} needs --watch")
    if args.input is not None:
        check_input(args.input)
    if args.watch and not args.watch.is_dir():
        raise UsageError(f"--watch {args.watch}: is not a folder")
    existing = [path for path in (args.output / TABLE, args.output / SCORES) if path.exists()]
    foreign = [path for path in (args.output / HEAT_MAPS, args.output / MASKS) if path.exists() and not existing]
    if foreign:
        raise UsageError(f"{foreign[0]} exists, but is no result of predict.py; choose another --output")
    if existing and not (args.overwrite or args.resume or args.watch):
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
        advice = "tiles with evaluation_realnet.py --tile %d --overlap %d, or pass --threshold (docs/deployment.md)"
        log.warning(text + advice, thresholds.image, tiles.size, tiles.overlap)
    return replace(thresholds, rule="chosen on whole images")


def run_of(args: argparse.Namespace, tiles: Tiles | None, thresholds: Thresholds) -> dict[str, Any]:
    """What decides the lines of the results: --continue refuses to go on with something else."""
    model = checkpoint_path(args.checkpoint)
    return {
        "checkpoint": str(model.resolve()),
        "checkpoint_time": datetime.fromtimestamp(model.stat().st_mtime).isoformat(timespec="seconds"),
        "input": args.input if args.input == "-" else str((args.watch or Path(args.input)).resolve()),
        "tile": args.tile,
        "overlap": tiles.overlap if tiles else None,
        "threshold": rounded(thresholds.image),
        "pixel_threshold": rounded(thresholds.pixel),
        "raw_scores": thresholds.scale is None,
        "precision": args.precision,
    }


if __name__ == "__main__":
    cli.run(main)
