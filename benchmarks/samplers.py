"""How close the samplers of SDAS come to the training images, for few evaluations of the network.

    python -m preparation.demo
    python train_diffusion.py --dataset demo
    python benchmarks/samplers.py --dataset demo --images 120 --weights squeezenet1_1.pth

The trained model of experiments/<dataset>/sample.yaml draws the same images (same seeds, without guidance) with each
sampler. They are compared with the training images by the kernel distance (KID; Bińkowski et al., ICLR 2018, arXiv
1801.01401): the unbiased squared MMD with the kernel (a.b / d + 1)^3 between features of a fixed network, averaged over
positions, whose mean square over the training images is made 1. Its error is the jackknife's over the drawn images.
Good test images give the yardstick. Seconds are of one CPU core, in this process. At 32x32 pixels and with a network of
a million parameters, `--images 60 --steps 5 8 10 20` takes three minutes of a core. --sheet writes some of the images.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.build import build_sdas_dataset
from datasets.catalog import known_classes
from models.backbones import Backbone
from models.sdas import SpacedDiffusion
from models.sdas.sampler import Sampler, set_up_sampler
from models.sdas.trained import class_list, load_networks
from utils import cli, distributed
from utils.config import load_config
from utils.pictures import contact_sheet, to_uint8, write_image

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


def kernel_distance(drawn: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """KID of features (N,C) and (M,C), and its standard error over the drawn images."""
    drawn, real = drawn.double(), real.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(drawn), len(real)
    within, across, other = kernel(drawn, drawn), kernel(drawn, real).mean(dim=1), kernel(real, real)
    within.fill_diagonal_(0)
    constant = (other.sum() - other.trace()) / (m * (m - 1))
    value = within.sum() / (n * (n - 1)) - 2 * across.mean() + constant
    without = (within.sum() - 2 * within.sum(dim=1)) / ((n - 1) * (n - 2))
    without = without - 2 * (across.sum() - across) / (n - 1) + constant
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float(value), float(error)


def features_of(backbone: Backbone, images: np.ndarray, grey: bool) -> torch.Tensor:
    """(N,H,W,3) uint8 -> (N,C), averaged over positions."""
    if grey:
        images = images.mean(axis=3, keepdims=True).round().astype(np.uint8).repeat(3, axis=3)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    parts = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        batch = F.interpolate(batch, (SIDE, SIDE), mode="bilinear", align_corners=False)
        (feature,) = backbone.maps((batch - mean) / std).values()
        parts.append(feature.mean(dim=(2, 3)))
    return torch.cat(parts)


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
    backbone = Backbone(args.backbone, [args.layer], args.weights)
    size = [config.dataset.H, config.dataset.W]
    data = load_config(
        f"experiments/{args.dataset}/diffusion.yaml", [f"dataset.input_size={size}"], "diffusion"
    ).dataset
    real = {}
    for split in ("train", "test"):
        images = build_sdas_dataset(data, split, classes, 0)
        batch = np.stack([images[0, i]["image"].numpy() for i in range(len(images))])
        real[split] = features_of(backbone, to_uint8(batch, (0.5,) * 3, (0.5,) * 3), args.grey)
    # The networks' features differ in size by a factor of 1000, and the kernel is not homogeneous.
    scale = real["train"].square().mean().sqrt()
    real = {split: features / scale for split, features in real.items()}
    print(f"KID against {len(real['train'])} training images of {size}; {args.images} images of each sampler")
    print(f"{'sampler':14} {'s':>4} {'evaluations':>11} {'KID':>8} {'error':>6} {'s/image':>8}")
    report("test images", "", "", kernel_distance(real["test"], real["train"]), "")
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
                    distance = kernel_distance(features_of(backbone, images, args.grey) / scale, real["train"])
                    report(name, f"{s:g}", steps, distance, f"{seconds:.3f}")
                    chosen = images[:: max(1, len(images) // SHEET_IMAGES)][:SHEET_IMAGES]
                    sheet.append((f"{name}, s = {s:g}, {steps}", list(chosen)))
    if args.sheet:
        write_image(args.sheet, contact_sheet(sheet))


def report(name: str, s: str, steps: int | str, distance: tuple[float, float], seconds: str) -> None:
    value, error = distance
    print(f"{name:14} {s:>4} {steps:>11} {value:8.3f} {error:6.3f} {seconds:>8}", flush=True)


if __name__ == "__main__":
    cli.run(main)
