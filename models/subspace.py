"""The subspace that features of normal images span: a reconstruction in closed form."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from utils import distributed


class NormalSubspace(nn.Module):
    """Projects features at each position onto the principal components of normal ones.

    What the projection leaves is novel: the residual of a principal component model (Jackson and Mudholkar 1979).
    Before it is fitted, it projects everything onto 0.

    Args:
        channels: of the features.
        share: of the variance that the subspace holds.

    Attributes:
        weight (C,C), bias (C,): the projection x -> weight x + bias.

    Shape:
        (N,C,h,w) -> same, float32

    Example:
        >>> line = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> subspace = NormalSubspace(2, share=0.9)
        >>> subspace.fit(torch.zeros(2), line)
        1
        >>> subspace(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)).flatten().tolist()
        [1.0, 2.0]
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, channels: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("weight", torch.zeros(channels, channels))
        self.register_buffer("bias", torch.zeros(channels))

    def fit(self, mean: torch.Tensor, covariance: torch.Tensor) -> int:
        """Keep the first components that hold the share of the variance; returns how many.

        Args:
            mean (C,), covariance (C,C): of normal features.
        """
        covariance = covariance.double().cpu()
        mean = mean.double().cpu()
        variances, vectors = torch.linalg.eigh(covariance)  # in ascending order
        held = variances.clamp(min=0).flip(0).cumsum(0)
        count = min(int((held < self.share * held[-1]).sum()) + 1, len(held))
        components = vectors[:, -count:]
        weight = components @ components.T
        self.weight.copy_(weight)
        self.bias.copy_(mean - weight @ mean)
        return count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.conv2d(features.float(), self.weight[:, :, None, None], self.bias)


class Moments:
    """Means and covariances of channels by block, over batches and ranks."""

    def __init__(self) -> None:
        self.shifts: dict[str, torch.Tensor] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.products: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, block: str, features: torch.Tensor) -> None:
        """Add features (N,C,h,w) of normal images."""
        flat = features.float().transpose(0, 1).flatten(1)
        # Products of values that are far from 0 would lose the digits that matter.
        shift = self.shifts.setdefault(block, flat.mean(dim=1))
        flat = flat - shift[:, None]
        # Sum over batches on the CPU: not every device has float64.
        sums, products = flat.sum(dim=1).cpu().double(), (flat @ flat.T).cpu().double()
        self.sums[block] = self.sums.get(block, 0) + sums
        self.products[block] = self.products.get(block, 0) + products
        self.counts[block] = self.counts.get(block, 0) + flat.shape[1]

    def result(self, block: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (C,) and covariance (C,C) over all ranks, float64 on the CPU."""
        count, shift = self.counts[block], self.shifts[block].cpu().double()
        mean = self.sums[block] / count
        covariance = self.products[block] / count - torch.outer(mean, mean)
        mean = mean + shift
        total = distributed.all_reduce_mean(torch.tensor(float(count), dtype=torch.float64))
        weight = count / total
        mean_of_all = distributed.all_reduce_mean(weight * mean)
        away = mean - mean_of_all
        return mean_of_all, distributed.all_reduce_mean(weight * (covariance + torch.outer(away, away)))


def standardized(
    moments: tuple[torch.Tensor, torch.Tensor], shift: Iterable[float], scale: Iterable[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of (x - shift) / scale from those of x."""
    mean, covariance = moments
    shift, scale = (torch.as_tensor(values, dtype=torch.float64) for values in (shift, scale))
    return (mean - shift) / scale, covariance / torch.outer(scale, scale)
