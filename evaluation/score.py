"""Anomaly maps of a whole test set, shared over ranks and gathered once."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from utils import distributed
from utils.distributed import Run, autocast
from utils.errors import UsageError
from utils.log import progress


@dataclass(frozen=True)
class GatheredMaps:
    """In the order of the test list.

    Args:
        scores: (N,H,W) float32 anomaly maps in [0, 1].
        masks: (N,H,W) bool ground truth, all False where it is not known.
        images_per_second: of the forward pass, all ranks together.
    """

    scores: np.ndarray
    masks: np.ndarray
    images_per_second: float


@torch.no_grad()
def score_test_set(model: nn.Module, loader: Iterable[dict], run: Run, precision: str = "off") -> GatheredMaps | None:
    """Anomaly maps and masks of the test set on rank 0; None on the other ranks.

    Batches have to be the same for any number of ranks (loaders.SharedBatches): then so are the maps, to the last bit.
    """
    was_training = model.training
    model.eval()
    indices, scores, masks, seconds = [], [], [], []
    for batch in progress(loader, run, "test pictures"):
        images = batch["image"].to(run.device, non_blocking=True)
        start = time.perf_counter()
        with autocast(run.device, precision):
            outputs = model({"image": images})
        # The copy waits for the device.
        scores.append(outputs["anomaly_score"][:, 0].float().cpu().numpy())
        seconds.append((time.perf_counter() - start) / len(images))
        indices.append(batch["index"].numpy())
        masks.append(batch["mask"].numpy().astype(bool))
    model.train(was_training)
    # The median batch: the first one warms up.
    rate = 1 / float(np.median(seconds)) if seconds else 0.0
    parts = distributed.gather((indices, scores, masks, rate))
    if parts is None:
        return None
    order = np.argsort(np.concatenate([i for part in parts for i in part[0]]))
    return GatheredMaps(
        np.concatenate([s for part in parts for s in part[1]])[order],
        np.concatenate([m for part in parts for m in part[2]])[order],
        sum(part[3] for part in parts),
    )


def avgpool_size(evaluator: dict[str, Any]) -> tuple[int, int]:
    """The window of the image score, from a realnet.yaml's `evaluator` section."""
    for entry in evaluator["metrics"].get("auc") or []:
        if entry.get("name") == "image":
            window = (entry.get("kwargs") or {}).get("avgpool_size", [16, 16])
            if len(window) != 2 or min(window) < 1:
                raise UsageError(f"evaluator.metrics.auc: avgpool_size {window} is not [height, width]")
            return int(window[0]), int(window[1])
    return 16, 16
