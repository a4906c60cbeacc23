"""Score pictures with a trained detector: numbers, verdicts, heat maps and masks.

    python predict.py --checkpoint experiments/MyParts/realnet_checkpoints/bolts --input new_pictures --output results
    python predict.py --checkpoint model.onnx --input picture.png --output results
    ls *.png | python predict.py --checkpoint FILE --input - --output results --threshold 0.4
    python predict.py --checkpoint FILE --input large.png --output results --tile 256 --overlap 64

Writes scores.csv and scores.jsonl (a line per picture as soon as it is done), heatmaps/ and masks/ (at the pictures'
own size). Verdicts follow the thresholds that evaluation_realnet.py wrote beside the checkpoint, or --threshold and
--pixel-threshold. Pictures that cannot be read are named on stderr and skipped; the exit code is then 1.
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
import torch
from tqdm import tqdm

from datasets.images import read_picture, resize
from datasets.loaders import appearance_of
from datasets.realnet import Appearance
from evaluation.detector import Detector, checkpoint_path, load_detector
from evaluation.inputs import Input, ResultNames, find_inputs, prefetch
from evaluation.metrics import image_scores
from evaluation.score import avgpool_size
from evaluation.thresholds import Thresholds
from evaluation.tiling import resize_map, tiled_map
from utils import cli, distributed
from utils.errors import UsageError
from utils.log import log, log_to_terminal
from utils.pictures import heat_overlay, write_image

COLUMNS = ("file", "score", "verdict", "threshold", "anomalous_share", "width", "height")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, class folder with one, or exported .onnx")
    parser.add_argument("--config", help="realnet.yaml, for checkpoints that hold no settings")
    parser.add_argument("--input", required=True, help="picture, folder, list of pictures, or - for names on stdin")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--threshold", type=float, help="image score from which a picture is anomalous")
    parser.add_argument("--pixel-threshold", type=float, help="map value from which a pixel is anomalous")
    parser.add_argument("--tile", type=int, help="score square tiles of this many pixels, for large pictures")
    parser.add_argument("--overlap", type=int, default=64, help="pixels that neighbouring tiles share (64)")
    parser.add_argument("--batch-size", type=int, help="pictures (or tiles) at once (8; 1 for stdin)")
    parser.add_argument("--no-pictures", action="store_true", help="no heat maps and masks")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in the folder")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: a GPU if there is one")
    return parser.parse_args()


@dataclass(frozen=True)
class Picture:
    """An input with what was read of it: the picture, or why it cannot be read."""

    source: Input
    image: np.ndarray | None
    problem: str = ""


class Predictor:
    """Anomaly maps and image scores, of whole pictures or of tiles."""

    def __init__(self, detector: Detector, tile: int | None, overlap: int, batch: int) -> None:
        self.detector = detector
        self.appearance: Appearance = appearance_of(detector.config.dataset)
        self.window = avgpool_size(detector.config.evaluator)
        self.tile, self.overlap, self.batch = tile, overlap, batch

    def maps(self, images: list[np.ndarray]) -> np.ndarray:
        """(N,h,w) maps at the input size of pictures (H,W,3) uint8 of any size."""
        size = self.appearance.size
        return self.detector.maps(torch.stack([self.appearance.tensor(resize(image, size)) for image in images]))

    def __call__(self, images: list[np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
        """The image score, and the map at the size of the picture, of each."""
        if self.tile is None:
            for image, values in zip(images, self.maps(images), strict=True):
                score = float(image_scores(values[None], self.window)[0])
                yield score, resize_map(values, image.shape[:2])
            return
        # The window covers as much of a tile as it does of a picture.
        window = tuple(
            max(1, round(k * self.tile / side)) for k, side in zip(self.window, self.appearance.size, strict=True)
        )
        for image in images:
            values = tiled_map(image, self.tile, self.overlap, self.batch, self.maps)
            yield float(image_scores(values[None], window)[0]), values


def main() -> None:
    args = parse_args()
    check_arguments(args)
    log_to_terminal()
    with distributed.session(args.device) as run:
        detector = load_detector(checkpoint_path(args.checkpoint), args.config, run.device)
    thresholds = choose_thresholds(detector, args)
    inputs, count = find_inputs(args.input, detector.config.dataset.image_reader.kwargs.image_dir, sys.stdin)
    batch = args.batch_size or (1 if args.input == "-" else 8)
    predictor = Predictor(detector, args.tile, args.overlap, batch)
    color_mode = predictor.appearance.color_mode

    def read(source: Input) -> Picture:
        try:
            return Picture(source, read_picture(source.path, color_mode=color_mode))
        except UsageError as error:
            return Picture(source, None, str(error))

    # Names on stdin may come one by one, and each is to be answered at once.
    pictures = map(read, inputs) if args.input == "-" else prefetch(read, inputs, 2 * batch)
    done, unreadable = 0, 0
    with Results(args.output, thresholds, args.overwrite, not args.no_pictures) as results:
        bar = tqdm(total=count, desc="pictures", leave=False, disable=None)
        while group := list(islice(pictures, batch)):
            readable = [picture for picture in group if picture.image is not None]
            for picture in group:
                if picture.image is None:
                    print(f"unreadable: {picture.problem}", file=sys.stderr)
            if readable:
                for picture, (score, values) in zip(readable, predictor([p.image for p in readable]), strict=True):
                    results.add(picture, score, values)
            done, unreadable = done + len(readable), unreadable + len(group) - len(readable)
            bar.update(len(group))
        bar.close()
    told = f", {results.anomalous} anomalous" if thresholds.image is not None else ""
    log.info("%s: %d pictures%s, %d unreadable", args.output / "scores.csv", done, told, unreadable)
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
        raise UsageError(f"{existing} is there already; name another --output, or pass --overwrite")


def choose_thresholds(detector: Detector, args: argparse.Namespace) -> Thresholds:
    """Those of the command line before those of the evaluation."""
    found = detector.thresholds
    if found is None:
        found = Thresholds(None, None, "")
        if args.threshold is None:
            log.info(
                "no thresholds beside %s: scores without verdicts (evaluate it, or pass --threshold)", args.checkpoint
            )
    changes = {"image": args.threshold, "pixel": args.pixel_threshold}
    return replace(found, **{name: value for name, value in changes.items() if value is not None})


class Results:
    """The files of results; lines appear as soon as their picture is done."""

    def __init__(self, folder: Path, thresholds: Thresholds, overwrite: bool, pictures: bool) -> None:
        self.folder, self.thresholds, self.pictures = folder, thresholds, pictures
        self.mode = "w" if overwrite else "x"
        self.names = ResultNames()
        self.anomalous = 0

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

    def add(self, picture: Picture, score: float, values: np.ndarray) -> None:
        """Write everything about one picture.

        Args:
            values: (H,W) map at the picture's size.
        """
        image, pixel = self.thresholds.image, self.thresholds.pixel
        mask = None if pixel is None else values >= pixel
        verdict = None if image is None else ("anomalous" if score >= image else "normal")
        row = {
            "file": picture.source.name,
            "score": round(score, 6),
            "verdict": verdict,
            "threshold": image,
            "anomalous_share": None if mask is None else round(float(mask.mean()), 6),
            "width": values.shape[1],
            "height": values.shape[0],
        }
        self.anomalous += verdict == "anomalous"
        if self.pictures:
            self.write_pictures(picture, values, mask)
        with cli.writing(self.folder):
            self.writer.writerow(row)
            self.json_file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.csv_file.flush()
            self.json_file.flush()

    def write_pictures(self, picture: Picture, values: np.ndarray, mask: np.ndarray | None) -> None:
        """The heat map over the picture, and the mask of what reaches the pixel threshold."""
        name = self.names.of(picture.source.name)
        low, high, pixel = self.thresholds.low, self.thresholds.high, self.thresholds.pixel
        scaled = (values - low) / (high - low)
        contour = None if pixel is None else (pixel - low) / (high - low)
        write_image(self.folder / "heatmaps" / f"{name}.png", heat_overlay(picture.image, scaled, contour))
        if mask is not None:
            write_image(self.folder / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)


if __name__ == "__main__":
    cli.run(main)
