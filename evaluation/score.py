"""Score a whole test set: all ranks compute anomaly maps, and rank 0 gathers them once."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets.images import read_size
from datasets.lists import Sample
from datasets.realnet import RealNetTestSet
from evaluation.metrics import Ranking, image_scores, pixel_ranking
from evaluation.tiling import resize_map
from utils import distributed
from utils.distributed import Run
from utils.errors import UsageError
from utils.log import progress_bar
from utils.precision import FP32, autocast
from utils.signals import StopRequest


@dataclass(frozen=True)
class ScoredImages:
    """A test set with its anomaly maps, scores and masks, in the order of the test list.

    Args:
        samples: the lines of the list: names, labels, classes, defect types.
        maps: (N,H,W) float32 anomaly maps in [0, 1]; at the images' own sizes, (N,) object of maps (H,W).
        scores: (N,) image scores.
        masks: bool ground truth in the shape of the maps, all False if unknown.
        images: the images to show, (H,W,3) uint8 by index.
        images_per_second: speed of the forward pass, all ranks together.
    """

    samples: list[Sample]
    maps: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    images: dict[int, np.ndarray] = field(default_factory=dict)
    images_per_second: float = 0.0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool: whether an image is defective."""
        return np.array([sample.label for sample in self.samples], dtype=bool)

    @property
    def mask_known(self) -> np.ndarray:
        """(N,) bool: whether the ground truth of an image is known."""
        return np.array([sample.mask_known for sample in self.samples], dtype=bool)

    @property
    def defect_types(self) -> np.ndarray:
        """(N,) names."""
        return np.array([sample.defect_type for sample in self.samples])

    @property
    def classes(self) -> np.ndarray:
        """(N,) names."""
        return np.array([sample.clsname for sample in self.samples])

    @property
    def finite(self) -> bool:
        """Whether all values of the anomaly maps are finite."""
        return all(np.isfinite(values).all() for values in self.maps)

    def subset(self, chosen: np.ndarray) -> "ScoredImages":
        """Some of the images, chosen by their indices or by a mask (N,)."""
        indices = np.arange(len(self))[chosen]
        return replace(
            self,
            samples=[self.samples[i] for i in indices],
            maps=self.maps[indices],
            scores=self.scores[indices],
            masks=self.masks[indices],
            images={k: self.images[int(i)] for k, i in enumerate(indices) if int(i) in self.images},
        )

    def rankings(self) -> tuple[Ranking, Ranking | None]:
        """Rankings of the images, and of the pixels of images with a known mask (None if no defect has a mask)."""
        image, known = Ranking.of(self.scores, self.labels), self.mask_known
        if not any(mask.any() for mask in self.masks[known]):
            return image, None
        return image, pixel_ranking(self.maps[known], self.masks[known])


@torch.no_grad()
def predict_maps(
    model: nn.Module,
    test_set: RealNetTestSet,
    loader: Iterable[dict],
    run: Run,
    window: tuple[int, int],
    precision: str = FP32,
    show: Collection[int] = (),
    stop: StopRequest | None = None,
) -> ScoredImages | None:
    """Score a test set: the result on rank 0, None on the other ranks.

    Args:
        loader: batches of the test set. If they are the same for any number of ranks (loaders.SharedBatches), the maps
            are too, bit for bit.
        window: (height, width) of the pooling that gives image scores.
        precision: of the forward passes (utils.precision.FORWARD_PRECISIONS).
        show: indices of the images to keep for pictures, so that they need not be decoded again.
        stop: ends the scoring between two batches when a signal has arrived.
    """
    was_training = model.training
    model.eval()
    preprocessing, show = test_set.preprocessing, set(show)
    indices, maps, masks, images, seconds = [], [], [], {}, []
    for batch in progress_bar(loader, run, "test images", stop=stop):
        for i, index in enumerate(batch["index"].tolist()):
            if index in show:
                tensor = batch["image"][i : i + 1].numpy()
                images[index] = preprocessing.pictures(tensor)[0]
        inputs = batch["image"].to(run.device, non_blocking=True)
        start = time.perf_counter()
        with autocast(run.device, precision):
            outputs = model({"image": inputs})
        # The copy waits for the device, so the time below includes the whole forward pass.
        maps.append(outputs["anomaly_score"][:, 0].float().cpu().numpy())
        seconds.append((time.perf_counter() - start) / len(inputs))
        indices.append(batch["index"].numpy())
        masks.append(batch["mask"].numpy().astype(bool))
    model.train(was_training)
    # The median, because the first batch is slow.
    rate = 1 / float(np.median(seconds)) if seconds else 0.0
    parts = distributed.gather((indices, maps, masks, images, rate))
    if parts is None:
        return None
    order = np.argsort(np.concatenate([array for part in parts for array in part[0]]))
    all_maps = np.concatenate([array for part in parts for array in part[1]])[order]
    all_masks = np.concatenate([array for part in parts for array in part[2]])[order]
    all_images = {index: image for part in parts for index, image in part[3].items()}
    scores = image_scores(all_maps, window)
    return ScoredImages(test_set.samples, all_maps, scores, all_masks, all_images, sum(part[4] for part in parts))


def at_own_sizes(scored: ScoredImages, test_set: RealNetTestSet, run: Run, stop: StopRequest | None) -> ScoredImages:
    """The same images with maps and masks at their own sizes: the maps that predict.py gives, and masks as drawn.

    Args:
        scored: all images of the test set.
        stop: ends the reading between two masks when a signal has arrived.
    """
    maps, masks = np.empty(len(scored), object), np.empty(len(scored), object)
    for index in progress_bar(range(len(scored)), run, "masks at full size", stop=stop):
        size = read_size(test_set.images.path(index))
        maps[index], masks[index] = resize_map(scored.maps[index], size), test_set.mask(index, size).astype(bool)
    return replace(scored, maps=maps, masks=masks)


def at_input_size(scored: ScoredImages, test_set: RealNetTestSet) -> ScoredImages:
    """The same images with maps and masks at the model's input size, for pictures."""
    size = test_set.preprocessing.size
    maps = np.stack([resize_map(values, size) for values in scored.maps])
    masks = np.stack([test_set.mask(index).astype(bool) for index in range(len(scored))])
    return replace(scored, maps=maps, masks=masks)


def pooling_window(evaluator: dict[str, Any]) -> tuple[int, int]:
    """The (height, width) of the image score's pooling window, from a realnet.yaml's `evaluator` section."""
    for entry in evaluator["metrics"].get("auc") or []:
        if entry.get("name") == "image":
            window = (entry.get("kwargs") or {}).get("avgpool_size", [16, 16])
            if len(window) != 2 or min(window) < 1:
                raise UsageError(f"evaluator.metrics.auc: avgpool_size {window} is not [height, width]")
            return int(window[0]), int(window[1])
    return 16, 16
