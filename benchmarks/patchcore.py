"""PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265): nearest neighbours in the features of a realnet.yaml.

    python benchmarks/patchcore.py --dataset parts
    python benchmarks/patchcore.py --dataset parts --class_name bolts --layers features.3 features.6 features.13

Images, input size, normalisation and backbone are those of experiments/<dataset>/realnet.yaml, so that a detector
trained with that file has its yardstick. Nothing is trained: the memory holds patches of good training images, chosen
by greedy coreset selection, and a test patch's score is its distance to the nearest one.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.build import build_realnet_test_set, preprocessing_of
from datasets.images import Preprocessing
from datasets.lists import chosen_classes, read_list
from evaluation.score import ScoredImages
from models.backbones import Backbone, FeatureStatistics
from utils import cli
from utils.config import load_config

PROJECTED = 128  # dimensions in which the coreset is chosen (section 3.2)
NEIGHBOURS = 9  # of a memory patch, for the weight of an image score (section 3.3)
BLUR = 4.0  # sigma of the map, in pixels at 256x256
BATCH = 16
STANDARD = 8  # batches that the standardisation of features is measured on


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--class_name", default="all", help="one class, several separated by commas, or all")
    parser.add_argument("--layers", nargs="+", help="layers to tap; default: those of the structure")
    parser.add_argument("--coreset", type=float, default=0.1, help="share of the patches to keep (default 0.1)")
    parser.add_argument("--patches", type=int, default=50_000, help="random patches to choose from (default 50000)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def patches_of(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """Locally aware patch features (section 3.1): means over 3x3 positions, all layers at the grid of the finest.

    (N,3,H,W) -> (N,h,w,C)
    """
    with torch.inference_mode():
        features = [F.avg_pool2d(feature, 3, stride=1, padding=1) for feature in backbone(images).values()]
    size = max((feature.shape[-2:] for feature in features), key=lambda s: s[0] * s[1])
    same = [F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in features]
    return torch.cat(same, dim=1).permute(0, 2, 3, 1)


def greedy_coreset(patches: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices of patches that cover the others well: each new one is the farthest from those chosen (algorithm 1)."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(patches.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    points = patches @ projection
    chosen = torch.empty(count, dtype=torch.int64)
    nearest = torch.full((len(points),), torch.inf)
    norms, last = (points**2).sum(dim=1), int(torch.randint(len(points), (), generator=generator))
    for i in tqdm(range(count), "coreset", disable=None):
        chosen[i] = last
        nearest = torch.minimum(nearest, norms - 2 * (points @ points[last]) + norms[last])
        last = int(nearest.argmax())
    return chosen


class PatchCore:
    """The memory of patches of good images.

    Args:
        backbone: gives the features.
        memory: (M,C) patches.
    """

    def __init__(self, backbone: Backbone, memory: np.ndarray) -> None:
        self.backbone, self.memory = backbone, memory
        self.nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(memory)

    def __call__(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(N,3,H,W) -> maps (N,H,W), scores (N,)."""
        patches = patches_of(self.backbone, images)
        n, h, w, channels = patches.shape
        flat = patches.reshape(-1, channels).numpy()
        distances, neighbours = self.nearest.kneighbors(flat)
        distances = distances.reshape(n, h * w)
        scores = [
            self._image_score(flat[i * h * w + k], distances[i, k], neighbours[i * h * w + k, 0])
            for i, k in enumerate(distances.argmax(axis=1))
        ]
        maps = torch.from_numpy(distances.reshape(n, 1, h, w)).float()
        maps = F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)
        sigma = BLUR * images.shape[-1] / 256
        side = 2 * max(1, round(4 * sigma)) + 1
        return gaussian_blur(maps, [side, side], [sigma, sigma])[:, 0].numpy(), np.array(scores)

    def _image_score(self, patch: np.ndarray, distance: float, neighbour: int) -> float:
        """The largest distance, weighted by how lonely the nearest memory patch is (eq. 7)."""
        around = self.nearest.kneighbors(self.memory[neighbour][None], NEIGHBOURS, return_distance=False)[0]
        to_them = np.linalg.norm(self.memory[around] - patch, axis=1)
        # Stable form of 1 - exp(distance) / sum exp(to_them).
        return float((1 - np.exp(distance - to_them.max()) / np.exp(to_them - to_them.max()).sum()) * distance)


def read_batch(paths: list[Path], preprocessing: Preprocessing) -> torch.Tensor:
    return torch.stack([preprocessing.tensor(preprocessing.read(path)) for path in paths])


@torch.inference_mode()
def fill_memory(
    backbone: Backbone, paths: list[Path], preprocessing: Preprocessing, args: argparse.Namespace
) -> PatchCore:
    """Choose the memory from patches of good images."""
    if backbone.standardize:
        statistics = FeatureStatistics()
        for start in range(0, min(len(paths), STANDARD * BATCH), BATCH):
            statistics.add(backbone.maps(read_batch(paths[start : start + BATCH], preprocessing)))
        backbone.set_standardization(*statistics.result())
    rng = np.random.default_rng(args.seed)
    share = -(-args.patches // len(paths))
    kept = []
    for start in tqdm(range(0, len(paths), BATCH), "training images", disable=None):
        images = read_batch(paths[start : start + BATCH], preprocessing)
        for patches in patches_of(backbone, images).flatten(1, 2):
            kept.append(patches[rng.permutation(len(patches))[:share]])
    patches = torch.cat(kept)
    chosen = greedy_coreset(patches, max(NEIGHBOURS, round(args.coreset * len(patches))), args.seed)
    return PatchCore(backbone, patches[chosen].numpy())


def main() -> None:
    args = parse_args()
    config = load_config(f"experiments/{args.dataset}/realnet.yaml", args.set, "realnet")
    kwargs = next(part.kwargs for part in config.net if part.name == "backbone")
    layers = args.layers or list(dict.fromkeys(layer.idx for block in config.structure for layer in block.layers))
    classes = chosen_classes(args.class_name, config.dataset.train.meta_file)
    backbone = Backbone(kwargs.backbone, layers, kwargs.get("weights", "auto"), kwargs.get("standardize"))
    preprocessing, reader = preprocessing_of(config.dataset), config.dataset.image_reader.kwargs
    print(f"{'class':20} {'image AUROC':>11} {'pixel AUROC':>11} {'PRO':>6} {'memory':>7} {'seconds':>7}")
    for name in classes:
        begin = time.perf_counter()
        listed = read_list(
            config.dataset.train.meta_file.replace("{}", name), reader.image_dir, follow_links=reader.follow_links
        )
        paths = [Path(reader.image_dir) / sample.filename for sample in listed if sample.label == 0]
        core = fill_memory(backbone, paths, preprocessing, args)
        test_set = build_realnet_test_set(config.dataset, name)
        maps, scores, masks = [], [], []
        for start in tqdm(range(0, len(test_set), BATCH), "test images", disable=None):
            items = [test_set[i] for i in range(start, min(start + BATCH, len(test_set)))]
            batch_maps, batch_scores = core(torch.stack([item["image"] for item in items]))
            maps.append(batch_maps)
            scores.append(batch_scores)
            masks += [item["mask"].numpy().astype(bool) for item in items]
        scored = ScoredImages(test_set.samples, np.concatenate(maps), np.concatenate(scores), np.stack(masks))
        image, pixel = scored.rankings()
        figures = [image.auroc(), pixel and pixel.auroc(), pixel and pixel.pro()]
        texts = ["-" if value is None else f"{100 * value:.2f}" for value in figures]
        seconds = time.perf_counter() - begin
        print(f"{name:20} {texts[0]:>11} {texts[1]:>11} {texts[2]:>6} {len(core.memory):7} {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    cli.run(main)
