"""Finds a 12-pixel defect in the tiles of a 1280x1024 image, but not in the image resized to the input size.

    python benchmarks/tiled.py --work tiled

Generates images of brushed metal (generated images have no seams at any size), trains a detector on 128x128 images
with the demo's settings, and scores large images with and without a defect, whole and in tiles. A large image has over
a hundred tiles, and one anomalous tile makes it anomalous, so the threshold allows no false alarm on 240 good images.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preparation.demo import make_textures
from utils.pictures import contact_sheet, write_image

SIDE, TRAIN, GOOD, BAD = 128, 160, 240, 30
LARGE = (1024, 1280)
DIAMETER, CENTRE = 12, (803, 611)
TILE, OVERLAP = 128, 32


def brushed_metal(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) uint8: fine horizontal streaks on an even grey with slow shading."""
    fine = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), sigmaX=9, sigmaY=0.6)
    coarse = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), sigmaX=40, sigmaY=3)
    tone = 128 + 22 * fine / fine.std() + 8 * coarse / coarse.std() + rng.normal(0, 3, (height, width))
    return np.clip(tone + rng.uniform(-8, 8), 0, 255).astype(np.uint8)


def pit(image: np.ndarray, centre: tuple[int, int], diameter: float) -> tuple[np.ndarray, np.ndarray]:
    """A dark round pit with a soft edge. Returns image and mask (0 or 255)."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    distance = np.hypot(y - centre[1], x - centre[0])
    alpha = np.clip(diameter / 2 + 0.5 - distance, 0, 1) * 0.85
    return (image * (1 - alpha) + 25 * alpha).astype(np.uint8), (distance <= diameter / 2).astype(np.uint8) * 255


def make_images(work: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(TRAIN):
        write_image(work / f"metal/train/good/{i:03d}.png", brushed_metal(SIDE, SIDE, rng))
    for i in range(GOOD):
        write_image(work / f"metal/test/good/{i:03d}.png", brushed_metal(SIDE, SIDE, rng))
    for i in range(BAD):
        centre = tuple(int(v) for v in rng.integers(16, SIDE - 16, 2))
        image, mask = pit(brushed_metal(SIDE, SIDE, rng), centre, float(rng.uniform(9, 18)))
        write_image(work / f"metal/test/pit/{i:03d}.png", image)
        write_image(work / f"metal/ground_truth/pit/{i:03d}_mask.png", mask)
    large = brushed_metal(*LARGE, rng)
    write_image(work / "large/good.png", large)
    write_image(work / "large/pit.png", pit(large, CENTRE, DIAMETER)[0])


def run(*arguments: str, folder: Path) -> None:
    print("$ python", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], cwd=folder, check=True)


def settings(work: Path) -> list[str]:
    """The arguments that adapt the demo's settings to these images."""
    values = {
        "dataset.train.meta_file": "data/metal/samples/train_{}.json",
        "dataset.test.meta_file": "data/metal/samples/test_{}.json",
        "dataset.image_reader.kwargs.image_dir": "data/metal/images/",
        "dataset.train.dtd_dir": "textures",
        "dataset.train.anomaly_types": "{normal: 0.4, dtd: 0.6}",
        "trainer.max_epoch": "20",
        **{f"saver.{name}_dir": f"{work.resolve()}/{name}/" for name in ("checkpoints", "log", "vis", "results")},
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def row_of(folder: Path, name: str) -> dict[str, str]:
    with open(folder / "scores.csv", newline="") as file:
        return next(row for row in csv.DictReader(file) if row["file"] == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("tiled"), help="folder for everything (default: tiled)")
    work = parser.parse_args().work
    make_images(work)
    make_textures(work / "textures", 0)
    run("prepare_data.py", "--dataset", "metal", "--root", "metal", folder=work)
    detector = ["--config", str(ROOT / "experiments/demo/realnet.yaml"), "--class_name", "metal", *settings(work)]
    run("train_realnet.py", *detector, "--overwrite", folder=work)
    run("evaluation_realnet.py", *detector, "--no-pictures", "--target-fpr", "0", folder=work)
    predict = ["predict.py", "--checkpoint", "checkpoints/metal", "--input", "large", "--overwrite"]
    run(*predict, "--output", "whole", folder=work)
    run(*predict, "--output", "tiles", "--tile", str(TILE), "--overlap", str(OVERLAP), folder=work)
    threshold = float(row_of(work / "whole", "pit.png")["threshold"])
    print(f"image threshold {threshold:.4f}")
    for name in ("whole", "tiles"):
        for file in ("good.png", "pit.png"):
            row = row_of(work / name, file)
            print(f"{name}, {file:8}  score {float(row['score']):.4f}  {row['verdict']}")
    write_image(work / "tiled.png", sheet(work))
    print(f"sheet: {work / 'tiled.png'}")


def sheet(work: Path) -> np.ndarray:
    """The large image with the pit marked, and its two heat maps; below, the pit's surroundings."""
    names = {"image": "large", "resized to 128x128": "whole/heatmaps", "tiles of 128, overlap 32": "tiles/heatmaps"}
    images = [cv2.cvtColor(cv2.imread(str(work / folder / "pit.png")), cv2.COLOR_BGR2RGB) for folder in names.values()]
    half = 80
    x, y = CENTRE
    details = [cv2.resize(p[y - half : y + half, x - half : x + half], (320, 320)) for p in images]
    cv2.circle(images[0], CENTRE, 40, (255, 40, 40), 3)
    small = [cv2.resize(p, (320, 256), interpolation=cv2.INTER_AREA) for p in images]
    return contact_sheet([("", small), (f"around the {DIAMETER}-pixel pit", details)], list(names))


if __name__ == "__main__":
    main()
