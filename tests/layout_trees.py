"""Generated data sets in each official layout: small random images with the real file names."""

import csv
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.catalog import CATALOG

TRAIN, GOOD, BAD = 3, 2, 2


def image_file(path: Path, seed: object, size: tuple[int, int] = (40, 48), **options: object) -> Path:
    """Write a random image whose content follows from the seed."""
    rng = np.random.default_rng(zlib.crc32(str(seed).encode()))
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def mask(path: Path, size: tuple[int, int] = (40, 48), value: int = 255) -> Path:
    values = np.zeros(size, np.uint8)
    values[10:20, 10:20] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def mvtec_class(folder: Path, defect_types: Iterable[str] = ("crack", "cut"), suffix: str = ".png") -> None:
    """C/train/good, C/test/D, C/ground_truth/D/S_mask.png."""
    for i in range(TRAIN):
        image_file(folder / f"train/good/{i:03d}{suffix}", (folder, "train", i))
    for i in range(GOOD):
        image_file(folder / f"test/good/{i:03d}{suffix}", (folder, "good", i))
    for defect_type in defect_types:
        for i in range(BAD):
            image_file(folder / f"test/{defect_type}/{i:03d}{suffix}", (folder, defect_type, i))
            mask(folder / f"ground_truth/{defect_type}/{i:03d}_mask.png")


def ok_ko_class(folder: Path, suffix: str = ".png", mask_suffix: str = ".png") -> None:
    """C/train/ok, C/test/{ok,ko}, C/ground_truth/ko/S."""
    for i in range(TRAIN):
        image_file(folder / f"train/ok/{i:04d}{suffix}", (folder, "train", i))
    for i in range(GOOD):
        image_file(folder / f"test/ok/{i:04d}{suffix}", (folder, "ok", i))
    for i in range(BAD):
        image_file(folder / f"test/ko/{i:04d}{suffix}", (folder, "ko", i))
        mask(folder / f"ground_truth/ko/{i:04d}{mask_suffix}")


def visa_official(root: Path) -> None:
    """C/Data/Images/{Normal,Anomaly}, C/Data/Masks/Anomaly and split_csv/1cls.csv; masks hold class numbers."""
    lines = [["object", "split", "label", "image", "mask"]]
    for name in CATALOG["VisA"].classes:
        for i in range(TRAIN + GOOD):
            image = f"{name}/Data/Images/Normal/{i:04d}.JPG"
            image_file(root / image, image)
            lines.append([name, "train" if i < TRAIN else "test", "normal", image, ""])
        for i in range(BAD):
            image, truth = f"{name}/Data/Images/Anomaly/{i:03d}.JPG", f"{name}/Data/Masks/Anomaly/{i:03d}.png"
            image_file(root / image, image)
            mask(root / truth, value=3)
            lines.append([name, "test", "anomaly", image, truth])
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)


def dtd(root: Path, folders: int = 3, each: int = 2) -> None:
    """images/<texture>/<texture>_<number>.jpg beside labels."""
    for f in range(folders):
        for i in range(each):
            image_file(root / f"images/texture{f}/texture{f}_{i:04d}.jpg", (f, i))
    (root / "labels").mkdir()
    (root / "labels/train1.txt").write_text("texture0/texture0_0000.jpg\n")


def official(dataset: str, root: Path) -> None:
    """Write a benchmark in its official layout; "VisA reshaped" is VisA in the reference program's layout."""
    if dataset == "VisA":
        visa_official(root)
    elif dataset == "DTD":
        dtd(root)
    elif dataset == "VisA reshaped":
        for name in CATALOG["VisA"].classes:
            ok_ko_class(root / name, ".JPG")
    elif dataset == "BTAD":
        for name, suffix, mask_suffix in (("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")):
            ok_ko_class(root / name, suffix, mask_suffix)
    else:
        for name in CATALOG[dataset].classes:
            mvtec_class(root / name)
        (root / "license.txt").write_text("CC BY-NC-SA 4.0")
