"""Cost of a training sample, relative to only decoding and normalising the same files in the same run.

    python benchmarks/data.py
    python benchmarks/data.py --size 192 320 --source 1024

Unit: decode one SDAS image of the input size and turn two images into normalised tensors. A cached sample with an
SDAS anomaly may cost 2.5 units; an uncached one, that plus decoding and resizing its source image.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.catalog import ForegroundRule
from datasets.images import Augmentation, Preprocessing, read_image
from datasets.lists import ImageList, Sample
from datasets.local_anomalies import LOCAL
from datasets.realnet import CachedImages, RealNetTrainSet
from datasets.synthesis import Synthesis
from preparation.demo import CLASSES, TEXTURES

GOOD_IMAGES, SDAS_IMAGES, ROUNDS, PER_ROUND = 12, 48, 15, 48
LIMIT = 2.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOREGROUND = {"channel": "gray", "threshold": "otsu", "close": 6, "open": 6}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="input size")
    parser.add_argument("--source", type=int, default=900, help="side of the good images on disk")
    return parser.parse_args()


def make_images(folder: Path, size: tuple[int, int], source: int) -> list[Sample]:
    """Photographs as good images (PNG), SDAS images (JPEG as sample.py writes them) and textures."""
    rng = np.random.default_rng(0)
    for name in ("good", "sdas", "dtd"):
        (folder / name).mkdir()
    samples = []
    for i in range(GOOD_IMAGES):
        photograph = Image.fromarray(getattr(photographs, CLASSES[i % len(CLASSES)])()).convert("RGB")
        grain = rng.normal(0, 6, (source, source, 3))
        noisy = np.asarray(photograph.resize((source, source))) + grain
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"good/{i}.png")
        samples.append(Sample(f"good/{i}.png", 0, "photograph"))
    for i in range(SDAS_IMAGES):
        photograph = Image.fromarray(getattr(photographs, CLASSES[i % len(CLASSES)])()).convert("RGB")
        left, top = rng.integers(0, photograph.width - 256), rng.integers(0, photograph.height - 256)
        crop = photograph.crop((left, top, left + 256, top + 256)).resize(size[::-1])
        crop.save(folder / f"sdas/rank0_{i}.jpg", quality=95)
    for name in TEXTURES:
        Image.fromarray(getattr(photographs, name)()).convert("RGB").resize((480, 480)).save(folder / f"dtd/{name}.jpg")
    return samples


def make_set(
    folder: Path, samples: list[Sample], preprocessing: Preprocessing, anomaly_type: str, cache_mb: int
) -> RealNetTrainSet:
    synthesis = Synthesis({anomaly_type: 1.0}, sdas_dir=str(folder / "sdas"), dtd_dir=str(folder / "dtd"))
    rules = {"photograph": ForegroundRule(**FOREGROUND)}
    cached = CachedImages(ImageList(samples, folder), rules, preprocessing, cache_mb)
    return RealNetTrainSet(cached, synthesis, Augmentation(), 0)


def seconds(task: Callable[[int], object], start: int) -> float:
    """Mean time of a call of the task, over PER_ROUND calls."""
    begin = time.perf_counter()
    for i in range(start, start + PER_ROUND):
        task(i)
    return (time.perf_counter() - begin) / PER_ROUND


def main() -> None:
    args = parse_args()
    # Limit threads as in a loader worker.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    size = tuple(args.size)
    preprocessing = Preprocessing(size, MEAN, STD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = make_images(folder, size, args.source)
        ready = [read_image(folder / sample.filename, size) for sample in samples]

        def unit(i: int) -> None:
            preprocessing.tensor(read_image(folder / f"sdas/rank0_{i % SDAS_IMAGES}.jpg"))
            preprocessing.tensor(ready[i % GOOD_IMAGES])

        def decode(i: int) -> None:
            read_image(folder / samples[i % GOOD_IMAGES].filename, size)

        tasks: dict[str, Callable[[int], object]] = {"unit": unit, "decode": decode}
        for anomaly_type in ("normal", "sdas", "dtd", *LOCAL):
            for cache_mb in (64, 0):
                dataset = make_set(folder, samples, preprocessing, anomaly_type, cache_mb)
                tasks[f"{anomaly_type} {'cached' if cache_mb else 'uncached'}"] = lambda i, d=dataset: d[
                    i // GOOD_IMAGES, i % GOOD_IMAGES
                ]
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for round_number in range(ROUNDS + 1):
            for name, task in tasks.items():
                elapsed = seconds(task, round_number * PER_ROUND)
                # The first round only fills caches.
                if round_number:
                    times[name].append(elapsed)
    report({name: statistics.median(values) for name, values in times.items()}, size, args.source)


def report(cost: dict[str, float], size: tuple[int, int], source: int) -> None:
    unit, decode = cost["unit"], cost["decode"]
    print(f"input {size[0]}x{size[1]}, good images {source}x{source} PNG; medians of {ROUNDS} rounds")
    print(f"unit (decode an SDAS image, normalise two): {1e3 * unit:.2f} ms; decode and resize a source: ", end="")
    print(f"{1e3 * decode:.2f} ms = {decode / unit:.2f} units\n")
    print(f"{'sample':18} {'samples/s':>9} {'units':>6}  limit")
    for name, value in cost.items():
        if name in ("unit", "decode"):
            continue
        limit = (LIMIT + (decode / unit if "uncached" in name else 0)) if name.startswith("sdas") else None
        verdict = "" if limit is None else f"{limit:.2f} {'met' if value / unit <= limit else 'MISSED'}"
        print(f"{name:18} {1 / value:9.0f} {value / unit:6.2f}  {verdict}")


if __name__ == "__main__":
    main()
