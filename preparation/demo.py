"""The built-in data set: crops of three photographs that scikit-image ships, with drawn defects.

    python -m preparation.demo

Training images come from the left part of each photograph and test images from the right, so none overlap.
Defects are drawn differently from the training anomalies and have exact masks. The seed determines all images.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from skimage import data as photographs

from datasets.lists import UNIFIED, Sample, write_list
from utils.cli import run
from utils.pictures import write_image

CLASSES = ("brick", "grass", "gravel")
# Other photographs that come with scikit-image, cut into textures for the anomaly type dtd.
TEXTURES = ("astronaut", "camera", "cat", "coffee", "coins", "hubble_deep_field", "moon", "page", "rocket", "text")
TEXTURES_EACH = 6
# Source of each class's foreign patches: brick stands out from grass and gravel, gravel from brick.
FOREIGN = {"brick": "gravel", "grass": "brick", "gravel": "brick"}
SIZE = 128
TRAIN_COUNT, GOOD_COUNT, DEFECT_COUNT = 120, 30, 10
SPLIT_COLUMN = 336  # of 512; training crops lie left of it, test crops right of it


def draw_scratch(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A thin curved dark line with a lit edge. Returns (image, mask), like the other draw_ functions."""
    del other
    middle = rng.uniform(40, SIZE - 40, 2)
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.02, 0.02)
    steps = int(rng.integers(60, 110))
    angles = angle + bend * np.arange(steps)
    path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    points = middle + path - path[steps // 2]
    width = int(rng.integers(4, 7))
    line, lit = np.zeros_like(image), np.zeros_like(image)
    for target, shift in ((line, 0.0), (lit, width * 0.8)):
        cv2.polylines(target, [np.round(points + shift).astype(np.int32)], False, 1, width)
    result = image.astype(np.float32)
    result[lit > 0] = result[lit > 0] * 0.15 + 0.85 * 245
    result[line > 0] = result[line > 0] * 0.1 + 0.9 * 12
    return result, line | lit


def draw_stain(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A translucent dark or bright blot with a soft edge."""
    del other
    y, x = np.mgrid[:SIZE, :SIZE]
    cy, cx = rng.uniform(32, SIZE - 32, 2)
    theta = np.arctan2(y - cy, x - cx)
    radius = rng.uniform(18, 28) * (1 + sum(rng.uniform(-0.15, 0.15) * np.cos(k * theta + k) for k in (2, 3, 5)))
    distance = np.hypot(y - cy, x - cx) / radius
    alpha = np.clip((1 - distance) / 0.25, 0, 1) * rng.uniform(0.7, 0.9)
    tone = rng.choice([rng.uniform(5, 40), rng.uniform(215, 250)])
    return image * (1 - alpha) + tone * alpha, (alpha > 0).astype(np.uint8)


def draw_hole(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark hole with a bright rim."""
    del other
    centre = tuple(int(v) for v in rng.integers(20, SIZE - 20, 2))
    axes = tuple(int(v) for v in rng.integers(9, 16, 2))
    angle = float(rng.uniform(0, 180))
    rim, hole = np.zeros_like(image), np.zeros_like(image)
    cv2.ellipse(rim, centre, (axes[0] + 4, axes[1] + 4), angle, 0, 360, 1, -1)
    cv2.ellipse(hole, centre, axes, angle, 0, 360, 1, -1)
    result = image.astype(np.float32)
    result[rim > 0] = result[rim > 0] * 0.4 + 0.6 * 220
    result[hole > 0] = result[hole > 0] * 0.1 + 12
    return result, rim


def draw_patch(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A polygon cut from another photograph and made brighter or darker."""
    corners = int(rng.integers(5, 8))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(18, 32, corners)
    centre = rng.uniform(34, SIZE - 34, 2)
    polygon = np.round(centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]).astype(np.int32)
    mask = np.zeros_like(image)
    cv2.fillPoly(mask, [polygon], 1)
    light = rng.choice([-1, 1]) * rng.uniform(60, 90)
    return np.where(mask > 0, other + light, image).astype(np.float32), mask


DEFECTS: dict[str, Callable] = {
    "scratch": draw_scratch,
    "stain": draw_stain,
    "hole": draw_hole,
    "patch": draw_patch,
}


def crop(photograph: np.ndarray, rng: np.random.Generator, first: int, last: int) -> np.ndarray:
    """A random SIZE x SIZE crop between two columns."""
    top = int(rng.integers(0, photograph.shape[0] - SIZE + 1))
    left = int(rng.integers(first, last - SIZE + 1))
    return photograph[top : top + SIZE, left : left + SIZE].copy()


def make_class(root: Path, name: str, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Write the images and masks of one class; return its training and test lists."""
    rng = np.random.default_rng([seed, CLASSES.index(name)])
    photograph = getattr(photographs, name)()
    width = photograph.shape[1]
    foreign = getattr(photographs, FOREIGN[name])()
    train, test = [], []
    for i in range(TRAIN_COUNT):
        filename = f"{name}/train/good/{i:03d}.png"
        write_image(root / filename, crop(photograph, rng, 0, SPLIT_COLUMN))
        train.append(Sample(filename, 0, name))
    for i in range(GOOD_COUNT):
        filename = f"{name}/test/good/{i:03d}.png"
        write_image(root / filename, crop(photograph, rng, SPLIT_COLUMN, width))
        test.append(Sample(filename, 0, name))
    for defect_type, draw in DEFECTS.items():
        for i in range(DEFECT_COUNT):
            image = crop(photograph, rng, SPLIT_COLUMN, width)
            other = crop(foreign, rng, 0, width)
            defective, mask = draw(image, other, rng)
            filename, maskname = (
                f"{name}/test/{defect_type}/{i:03d}.png",
                f"{name}/ground_truth/{defect_type}/{i:03d}_mask.png",
            )
            write_image(root / filename, np.clip(np.round(defective), 0, 255).astype(np.uint8))
            write_image(root / maskname, mask * np.uint8(255))
            test.append(Sample(filename, 1, name, maskname))
    return train, test


def make_textures(folder: Path, seed: int) -> None:
    """Write square crops of the other photographs."""
    rng = np.random.default_rng([seed, len(CLASSES)])
    for name in TEXTURES:
        photograph = getattr(photographs, name)()
        height, width = photograph.shape[:2]
        for i in range(TEXTURES_EACH):
            side = int(rng.integers(96, min(height, width) + 1))
            top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
            write_image(folder / f"{name}_{i}.png", photograph[top : top + side, left : left + side])


def make_demo(root: Path, seed: int = 0) -> None:
    """Write the data set: root/images/<class>/..., root/textures/ and root/samples/{train,test}_<class>.json."""
    make_textures(root / "textures", seed)
    all_train, all_test = [], []
    for name in CLASSES:
        train, test = make_class(root / "images", name, seed)
        write_list(root / "samples" / f"train_{name}.json", train)
        write_list(root / "samples" / f"test_{name}.json", test)
        all_train += train
        all_test += test
    write_list(root / "samples" / f"train_{UNIFIED}.json", all_train)
    write_list(root / "samples" / f"test_{UNIFIED}.json", all_test)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--root", default="data/demo", help="where to write (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    make_demo(Path(args.root), args.seed)
    print(f"{args.root}: {len(CLASSES)} classes ({', '.join(CLASSES)})", file=sys.stdout)


if __name__ == "__main__":
    run(main)
