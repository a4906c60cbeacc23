"""How close the samplers of SDAS come to the training images, for few evaluations of the network.

    python -m preparation.demo
    python train_diffusion.py --dataset demo
    python benchmarks/samplers.py --dataset demo --images 120 --weights squeezenet1_1.pth

The trained model of experiments/<dataset>/sample.yaml draws the same images (same seeds, without guidance) with each
sampler. They are compared with the training images by the kernel distance (KID, evaluation/image_quality.py) between
features of a fixed network. Good test images give the yardstick. Seconds are of one CPU core, in this process. At 32x32
pixels and with a network of a million parameters, `--images 60 --steps 5 8 10 20` takes three minutes of a core.
--sheet writes some of the images.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.build import build_sdas_dataset
from datasets.catalog import known_classes
from datasets.images import Preprocessing
from evaluation.image_features import Extractor, Features, Source, pictures_of
from evaluation.image_quality import KernelDistance, comparable, kernel_distance
from models.sdas import SpacedDiffusion
from models.sdas.sampler import Sampler, set_up_sampler
from models.sdas.trained import class_list, load_networks
from utils import cli, distributed
from utils.config import load_config
from utils.pictures import contact_sheet, write_image

# Those without noise of their own are compared at s = 0 only.
SAMPLERS = {"ancestral": "ddim", "dpmpp_2m_sde": "logsnr", "ddim": "ddim", "dpmpp_2m": "logsnr"}
DETERMINISTIC = ("ddim", "dpmpp_2m")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 128  # pixels that the fixed network sees
BATCH = 20
SHEET_IMAGES = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo")
    parser.add_argument(
        "--images", type=int, default=120, help="images of each sampler, over all classes (default 120)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 20, 50], help="evaluations to compare")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.2], help="strengths s to compare")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--backbone", default="squeezenet1_1", help="torchvision's network for the features")
    parser.add_argument("--layer", default="features.12", help="its layer")
    parser.add_argument("--weights", default="auto", help="its weights: a file, or auto for pretrain/ or the download")
    parser.add_argument("--grey", action="store_true", help="compare grey values only, for grey photographs")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write a sheet of the first images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of sample.yaml")
    return parser.parse_args()


def draw(sampler: Sampler, classes: Sequence[str], count: int, s: float) -> tuple[np.ndarray, float]:
    """About `count` images (N,H,W,3) uint8, as many of each class, and the CPU seconds of each."""
    begin, parts = time.process_time(), []
    each = -(-count // len(classes))
    for number, name in enumerate(classes):
        for start in range(0, each, BATCH):
            parts.append(sampler.draw(name, number, range(start, min(start + BATCH, each)), s, s))
    images = np.concatenate(parts)
    return images, (time.process_time() - begin) / len(images)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    config = load_config(f"experiments/{args.dataset}/sample.yaml", args.set, "sample")
    config.classifier = None
    networks = load_networks(config)
    classes = class_list(config, networks, known_classes(args.dataset))
    seen = Preprocessing((SIDE, SIDE), MEAN, STD, "GRAY" if args.grey else "RGB")
    extractor = Extractor(Source(args.backbone, args.weights, [args.layer], seen), torch.device("cpu"))
    size = [config.dataset.H, config.dataset.W]
    data = load_config(
        f"experiments/{args.dataset}/diffusion.yaml", [f"dataset.input_size={size}"], "diffusion"
    ).dataset
    real = {}
    for split in ("train", "test"):
        images = build_sdas_dataset(data, split, classes, 0)
        real[split] = extractor(pictures_of(images, range(len(images))))
    reference = comparable(real["train"], real["train"])

    def distance(features: Features) -> KernelDistance:
        return kernel_distance(comparable(features, real["train"]), reference)

    print(f"KID against {len(reference)} training images of {size}; {args.images} images of each sampler")
    print(f"{'sampler':14} {'s':>4} {'evaluations':>11} {'KID':>8} {'error':>6} {'s/image':>8}")
    report("test images", "", "", distance(real["test"]), "")
    sheet = []
    with distributed.session("cpu", None) as run, torch.inference_mode():
        plain = set_up_sampler(config, run, networks)
        for steps in args.steps:
            for s in args.strengths:
                for name in args.samplers:
                    if s and name in DETERMINISTIC:
                        continue
                    process = {**config.TestSampler, "section_counts": f"{SAMPLERS[name]}{steps}"}
                    sampler = replace(plain, process=SpacedDiffusion(**process), sampler=name)
                    images, seconds = draw(sampler, classes, args.images, s)
                    report(name, f"{s:g}", steps, distance(extractor(images)), f"{seconds:.3f}")
                    chosen = images[:: max(1, len(images) // SHEET_IMAGES)][:SHEET_IMAGES]
                    sheet.append((f"{name}, s = {s:g}, {steps}", list(chosen)))
    if args.sheet:
        write_image(args.sheet, contact_sheet(sheet))


def report(name: str, s: str, steps: int | str, distance: KernelDistance, seconds: str) -> None:
    print(f"{name:14} {s:>4} {steps:>11} {distance.value:8.3f} {distance.error:6.3f} {seconds:>8}", flush=True)


if __name__ == "__main__":
    cli.run(main)
