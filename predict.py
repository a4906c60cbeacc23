"""Score images with a trained detector: numbers, verdicts, heat maps and masks.

    python predict.py --checkpoint experiments/MyParts/realnet_checkpoints/bolts --input new_images --output results
    python predict.py --checkpoint model.onnx --input image.png --output results
    ls *.png | python predict.py --checkpoint FILE --input - --output results --threshold 0.4
    python predict.py --checkpoint FILE --input large.png --output results --tile 256 --overlap 64

Writes scores.csv and scores.jsonl (one line per image, as soon as it is done), heatmaps/ and masks/ (at the images' own
size). Verdicts follow the thresholds that evaluation_realnet.py wrote beside the checkpoint, or --threshold and
--pixel-threshold. Images that cannot be read are reported on stderr and skipped; the exit code is then 1.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.images import read_image
from evaluation.detector import Detection, Detector, Tiles
from evaluation.inputs import Input, ResultNames, find_inputs, prefetch
from evaluation.thresholds import Thresholds
from utils import cli
from utils.errors import UsageError
from utils.log import log, log_to_terminal
from utils.pictures import heat_overlay, write_image

COLUMNS = ("file", "score", "verdict", "threshold", "anomalous_share", "width", "height")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, class folder with a checkpoint, or .onnx file")
    parser.add_argument("--config", help="realnet.yaml, for checkpoints that hold no settings")
    parser.add_argument("--input", required=True, help="image, folder, list of images, or - for paths on stdin")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--class_name", help="use this class's thresholds, if the model serves several")
    parser.add_argument("--threshold", type=float, help="image score from which an image is anomalous")
    parser.add_argument("--pixel-threshold", type=float, help="map value from which a pixel is anomalous")
    parser.add_argument("--tile", type=int, help="score large images in square tiles with this side, in pixels")
    parser.add_argument("--overlap", type=int, default=64, help="pixels that neighbouring tiles share (64)")
    parser.add_argument("--batch-size", type=int, help="images or tiles per batch (8; 1 for stdin)")
    parser.add_argument("--no-pictures", action="store_true", help="write no heat maps or masks")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results in the folder")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: a GPU if there is one")
    return parser.parse_args()


@dataclass(frozen=True)
class ReadInput:
    """An input with its image (H,W,3) uint8, or None and the reason why it cannot be read."""

    source: Input
    image: np.ndarray | None
    problem: str = ""


def main() -> None:
    args = parse_args()
    check_arguments(args)
    log_to_terminal()
    detector = Detector.load(args.checkpoint, args.config, args.device)
    detector = detector.with_thresholds(choose_thresholds(detector.thresholds, args))
    reader = detector.config.dataset.image_reader.kwargs
    inputs, count = find_inputs(args.input, reader.image_dir, sys.stdin)
    batch = args.batch_size or (1 if args.input == "-" else 8)
    tiles = Tiles(args.tile, args.overlap, batch) if args.tile else None

    def read(source: Input) -> ReadInput:
        try:
            return ReadInput(source, read_image(source.path, color_mode=reader.color_mode))
        except UsageError as error:
            return ReadInput(source, None, str(error))

    # Paths on stdin may arrive one by one. Reading ahead would delay the results of earlier ones.
    images = map(read, inputs) if args.input == "-" else prefetch(read, inputs, 2 * batch)
    with Results(args.output, detector.thresholds, args.overwrite, not args.no_pictures) as results:
        unreadable = score(detector, images, tiles, batch, count, results)
    verdicts = f", {results.anomalous} anomalous" if detector.thresholds.image is not None else ""
    log.info("%s: %d images%s, %d unreadable", args.output / "scores.csv", results.count, verdicts, unreadable)
    if unreadable:
        sys.exit(1)


def check_arguments(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: at least 1")
    if args.tile is not None and args.tile < 16:
        raise UsageError(f"--tile {args.tile}: at least 16 pixels")
    if args.tile is not None and not 0 <= args.overlap < args.tile:
        raise UsageError(f"--overlap {args.overlap}: has to lie in 0 .. {args.tile - 1}, below --tile")
    existing = args.output / "scores.csv"
    if existing.exists() and not args.overwrite:
        raise UsageError(f"{existing} already exists; choose another --output, or pass --overwrite")


def choose_thresholds(evaluated: Thresholds | None, args: argparse.Namespace) -> Thresholds:
    """The thresholds of the evaluation, overridden by those of the command line."""
    thresholds = evaluated
    if thresholds is None:
        thresholds = Thresholds(None, None, "")
        if args.threshold is None:
            text = "no thresholds beside %s: scores without verdicts (evaluate it, or pass --threshold)"
            log.info(text, args.checkpoint)
    if args.class_name:
        thresholds = thresholds.of_class(args.class_name)
    changes = {"image": args.threshold, "pixel": args.pixel_threshold}
    return replace(thresholds, **{name: value for name, value in changes.items() if value is not None})


def score(
    detector: Detector,
    images: Iterator[ReadInput],
    tiles: Tiles | None,
    batch: int,
    count: int | None,
    results: "Results",
) -> int:
    """Score images batch by batch and write the results; returns how many images could not be read."""
    unreadable = 0
    bar = tqdm(total=count, desc="images", leave=False, disable=None)
    while group := list(islice(images, batch)):
        for item in group:
            if item.image is None:
                print(f"unreadable: {item.problem}", file=sys.stderr)
        readable = [item for item in group if item.image is not None]
        if readable:
            detections = detector.detect([item.image for item in readable], tiles)
            for item, detection in zip(readable, detections, strict=True):
                results.add(item.source, item.image, detection)
        unreadable += len(group) - len(readable)
        bar.update(len(group))
    bar.close()
    return unreadable


class Results:
    """Writes the result files; each line is flushed as soon as its image is done."""

    def __init__(self, folder: Path, thresholds: Thresholds, overwrite: bool, pictures: bool) -> None:
        self.folder, self.thresholds, self.pictures = folder, thresholds, pictures
        self.mode = "w" if overwrite else "x"
        self.names = ResultNames()
        self.count, self.anomalous = 0, 0

    def __enter__(self) -> "Results":
        self.stack = ExitStack()
        with cli.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = [self.folder / name for name in ("scores.csv", "scores.jsonl")]
            files = [self.stack.enter_context(path.open(self.mode, encoding="utf-8", newline="")) for path in paths]
        self.csv_file, self.json_file = files
        self.writer = csv.DictWriter(self.csv_file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stack.close()

    def add(self, source: Input, image: np.ndarray, detection: Detection) -> None:
        """Write everything about one image."""
        mask, anomalous = detection.mask, detection.is_anomalous
        row = {
            "file": source.name,
            "score": round(detection.score, 6),
            "verdict": None if anomalous is None else ("anomalous" if anomalous else "normal"),
            "threshold": self.thresholds.image,
            "anomalous_share": None if mask is None else round(float(mask.mean()), 6),
            "width": image.shape[1],
            "height": image.shape[0],
        }
        self.count += 1
        self.anomalous += bool(anomalous)
        if self.pictures:
            self.draw(source, image, detection)
        with cli.writing(self.folder):
            self.writer.writerow(row)
            self.json_file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.csv_file.flush()
            self.json_file.flush()

    def draw(self, source: Input, image: np.ndarray, detection: Detection) -> None:
        """Write the heat map over the image, and the mask of the pixels that reach the pixel threshold."""
        name, thresholds = self.names.of(source.name), self.thresholds
        heat = heat_overlay(image, detection.map, thresholds.low, thresholds.high, thresholds.pixel)
        write_image(self.folder / "heatmaps" / f"{name}.png", heat)
        if detection.mask is not None:
            write_image(self.folder / "masks" / f"{name}.png", detection.mask.astype(np.uint8) * 255)


if __name__ == "__main__":
    cli.run(main)
