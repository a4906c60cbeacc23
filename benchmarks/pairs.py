"""Do pairs on disk teach what training's own samples teach? A small segmentation network, trained from either.

    python synthesize.py --dataset parts --class_name bolts --size input --count 800 --output /tmp/pairs
    python prepare_data.py --dataset parts_pairs --root /tmp/pairs
    python benchmarks/pairs.py --dataset parts --class_name bolts --pairs parts_pairs

The network is the frozen backbone of experiments/<dataset>/realnet.yaml and two convolutions. It is trained on the
anomalous samples that train_realnet.py would draw, and on the pairs as prepare_data.py lists them, for as many steps,
and tested on the data set's test list.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.patchcore import patches_of
from datasets.build import build_realnet_test_set, build_realnet_train_set, choose_held_out
from datasets.realnet import RealNetTestSet
from evaluation.score import ScoredImages
from models.backbones import Backbone, FeatureStatistics
from utils import cli
from utils.config import load_config

BATCH = 8
WIDTH = 64  # channels between the two convolutions
RATE = 1e-3
Batch = tuple[torch.Tensor, torch.Tensor]  # images (N,3,H,W) and masks (N,H,W)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--class_name", required=True)
    parser.add_argument("--pairs", required=True, metavar="DATASET", help="what prepare_data.py called the pairs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of realnet.yaml")
    return parser.parse_args()


class Segmenter(nn.Module):
    """Two convolutions on frozen features; logits of a pixel being anomalous, (N,H,W)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        channels = sum(backbone.channels.values())
        self.head = nn.Sequential(nn.Conv2d(channels, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, 1, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # inference_mode would forbid them in the graph of the head.
        features = patches_of(self.backbone, images).permute(0, 3, 1, 2).clone()
        return F.interpolate(self.head(features), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def drawn_batches(config: EasyDict, name: str, seed: int) -> Iterator[Batch]:
    """Anomalous samples of training, in the order in which synthesize.py numbers them."""
    train_set = build_realnet_train_set(config, name, seed, choose_held_out(config, name, seed)).anomalous_only()
    number = 0
    while True:
        items = [train_set[divmod(number + i, len(train_set))] for i in range(BATCH)]
        number += BATCH
        yield torch.stack([item["image"] for item in items]), torch.stack([item["mask"][0] for item in items])


def listed_batches(pairs: RealNetTestSet, seed: int) -> Iterator[Batch]:
    """Anomalous images of a test list, in random order."""
    rng = np.random.default_rng(seed)
    anomalous = [i for i, sample in enumerate(pairs.samples) if sample.label]
    while True:
        items = [pairs[int(i)] for i in rng.choice(anomalous, BATCH, replace=False)]
        yield torch.stack([item["image"] for item in items]), torch.stack([item["mask"] for item in items]).float()


def trained(backbone: Backbone, batches: Iterator[Batch], steps: int, seed: int) -> Segmenter:
    torch.manual_seed(seed)
    network = Segmenter(backbone)
    optimizer = torch.optim.Adam(network.head.parameters(), lr=RATE)
    for _, (images, masks) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(images), masks).backward()
        optimizer.step()
    return network


@torch.inference_mode()
def tested(network: Segmenter, test_set: RealNetTestSet) -> str:
    """Image and pixel AUROC in percent; the score of an image is the largest value of its map."""
    maps, masks = [], []
    for start in range(0, len(test_set), BATCH):
        items = [test_set[i] for i in range(start, min(start + BATCH, len(test_set)))]
        maps.append(network(torch.stack([item["image"] for item in items])).sigmoid().numpy())
        masks += [item["mask"].numpy().astype(bool) for item in items]
    values = np.concatenate(maps)
    image, pixel = ScoredImages(test_set.samples, values, values.max(axis=(1, 2)), np.stack(masks)).rankings()
    return f"{100 * image.auroc():11.2f} {100 * pixel.auroc() if pixel else float('nan'):11.2f}"


def main() -> None:
    args = parse_args()
    config = load_config(f"experiments/{args.dataset}/realnet.yaml", args.set, "realnet")
    kwargs = next(part.kwargs for part in config.net if part.name == "backbone")
    layers = list(dict.fromkeys(layer.idx for block in config.structure for layer in block.layers))
    backbone = Backbone(kwargs.backbone, layers, kwargs.get("weights", "auto"), kwargs.get("standardize"))
    size, name = config.dataset.input_size, args.class_name
    listed = load_config(f"experiments/{args.pairs}/realnet.yaml", [f"dataset.input_size={size}"], "realnet").dataset
    for key in ("pixel_mean", "pixel_std"):
        listed[key] = config.dataset[key]
    pairs, test_set = build_realnet_test_set(listed, name), build_realnet_test_set(config.dataset, name)
    if backbone.standardize:
        statistics, batches = FeatureStatistics(), drawn_batches(config.dataset, name, 0)
        for _ in range(BATCH):
            statistics.add(backbone.maps(next(batches)[0]))
        backbone.set_standardization(*statistics.result())
    print(f"{'trained from':14} {'seed':>4} {'image AUROC':>11} {'pixel AUROC':>11} {'seconds':>7}")
    for seed in args.seeds:
        sources = {"the loader": drawn_batches(config.dataset, name, seed), args.pairs: listed_batches(pairs, seed)}
        for source, batches in sources.items():
            begin = time.perf_counter()
            figures = tested(trained(backbone, batches, args.steps, seed), test_set)
            print(f"{source:14} {seed:4} {figures} {time.perf_counter() - begin:7.0f}", flush=True)


if __name__ == "__main__":
    cli.run(main)
