"""Losses on a model's outputs, built from the YAML's `criterion` list."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from utils.config import call_with_settings
from utils.errors import UsageError


def _targets(outputs: dict) -> torch.Tensor:
    """The mask as classes (N,H,W), 1 = anomalous."""
    return (outputs["mask"] > 0.5)[:, 0].long()


class SegmentCrossEntropyLoss(nn.Module):
    """Cross entropy of logit (N,2,H,W) against mask (N,1,H,W) (RealNet, eq. 8)."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: dict) -> torch.Tensor:
        return self.weight * F.cross_entropy(outputs["logit"].float(), _targets(outputs))


class FeatureMSELoss(nn.Module):
    """Sum over blocks of MSE(feats_recon, gt_block_feats), each (N,C,h,w) (RealNet, eq. 6)."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: dict) -> torch.Tensor:
        reconstructed, target = outputs["feats_recon"], outputs["gt_block_feats"]
        return self.weight * sum(F.mse_loss(reconstructed[b].float(), target[b].float()) for b in reconstructed)


class SegmentFocalLoss(nn.Module):
    """Focal loss (Lin et al. 2017): the mean of -a (1-p)^gamma log p.

    p is the probability of the true class, from one-hot targets clamped to [smooth, 1 - smooth], plus smooth.

    Args:
        alpha: the weight a of class balance_index; that of the other class is 1 - alpha. A list holds the weights of
            both classes, which are divided by their sum. None: a = 1 for both.
        gamma: focusing exponent >= 0.
        balance_index: the class that alpha weights.
        smooth: in (0, 0.5).
        size_average: False sums over pixels and images instead.
    """

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float | Sequence[float] | None = None,
        gamma: float = 2.0,
        balance_index: int = 0,
        smooth: float = 1e-5,
        size_average: bool = True,
    ) -> None:
        super().__init__()
        self.weight, self.gamma, self.smooth, self.size_average = weight, gamma, smooth, size_average
        if isinstance(alpha, (int, float)):
            alpha = (alpha, 1 - alpha) if balance_index == 0 else (1 - alpha, alpha)
        elif alpha is not None:
            alpha = tuple(value / sum(alpha) for value in alpha)
        self.alpha = alpha

    def forward(self, outputs: dict) -> torch.Tensor:
        eps = self.smooth
        targets = _targets(outputs)
        probability = outputs["logit"].float().softmax(dim=1)
        one_hot = F.one_hot(targets, 2).permute(0, 3, 1, 2).clamp(eps, 1 - eps)
        p = (one_hot * probability).sum(dim=1) + eps
        # Above 0: for gamma < 1, the gradient of 0**gamma is infinite, and nan when it is multiplied by log(1).
        doubt = (1 - p).clamp(min=1e-12)
        loss = -(doubt**self.gamma) * p.log()
        if self.alpha is not None:
            loss = loss * torch.where(targets == 0, *self.alpha)
        return self.weight * (loss.mean() if self.size_average else loss.sum())


class ImageMSELoss(nn.Module):
    """MSE of image_recon against image, each (N,3,H,W) in [-1, 1]."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: dict) -> torch.Tensor:
        return self.weight * F.mse_loss(outputs["image_recon"].float(), outputs["image"].float())


LOSSES = {loss.__name__: loss for loss in (SegmentCrossEntropyLoss, FeatureMSELoss, SegmentFocalLoss, ImageMSELoss)}
DETECTOR_LOSSES = ("SegmentCrossEntropyLoss", "SegmentFocalLoss", "FeatureMSELoss")


def build_criterion(criterion: Sequence[dict], types: Sequence[str] = tuple(LOSSES)) -> dict[str, nn.Module]:
    """Build the losses of the YAML's `criterion` list, by name; each maps a model's outputs to a scalar.

    Args:
        types: the losses that fit the model's outputs.

    Raises:
        UsageError: no loss, an unknown type or argument, a type that does not fit, a name given twice, or no weight
            above 0.

    Example:
        >>> losses = build_criterion([{"name": "segmentation", "type": "SegmentFocalLoss", "kwargs": {"gamma": 2.0}}])
        >>> logit, mask = torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
        >>> round(float(losses["segmentation"]({"logit": logit, "mask": mask})), 3)
        0.173
    """
    if not criterion:
        raise UsageError(f"criterion: is empty; list losses of the types {', '.join(types)}")
    built = {}
    for entry in criterion:
        if entry["type"] not in types:
            name, kind = entry["name"], entry["type"]
            raise UsageError(f"criterion.{name}.type: {kind!r} is not one of {', '.join(types)}")
        if entry["name"] in built:
            raise UsageError(f"criterion: two losses are called {entry['name']!r}")
        where, loss = f"criterion.{entry['name']}.kwargs", LOSSES[entry["type"]]
        built[entry["name"]] = call_with_settings(where, loss, **(entry.get("kwargs") or {}))
    if not any(loss.weight for loss in built.values()):
        raise UsageError("criterion: the weights of all losses are 0, so nothing is trained")
    return built
