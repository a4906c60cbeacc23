"""AFS, anomaly-aware feature selection (RealNet, section 3.2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import Backbone, FeatureStatistics, key
from models.subspace import Moments, standardized
from utils import distributed
from utils.errors import UsageError


@dataclass(frozen=True)
class Block:
    """One block of the `structure`: layers, how many channels to keep of each, and their common stride."""

    name: str
    layers: tuple[tuple[str, int], ...]
    stride: int

    @property
    def planes(self) -> int:
        """Number of channels of the block."""
        return sum(planes for _, planes in self.layers)


def grid_size(image_size: Sequence[int], stride: int) -> tuple[int, int]:
    """(height, width) of a feature map of that stride; rounded up, as strided convolutions with padding do."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def resize(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize bilinearly with aligned corners; return the input itself if it has that size."""
    if features.shape[-2:] == tuple(size):
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=True)


class AFS(nn.Module):
    """Keeps each layer's channels that show synthetic anomalies best, and joins layers into blocks.

    Args:
        structure: the blocks.
        channels: number of channels of each backbone layer.

    Shape:
        {layer: (N, C, h, w)}, image size (H, W) -> {block: (N, planes, ceil(H / stride), ceil(W / stride))}

    Example:
        >>> afs = AFS([Block("block1", (("layer1", 8), ("layer2", 16)), stride=4)], {"layer1": 64, "layer2": 128})
        >>> features = {"layer1": torch.zeros(2, 64, 16, 16), "layer2": torch.zeros(2, 128, 8, 8)}
        >>> afs(features, (64, 64))["block1"].shape
        torch.Size([2, 24, 16, 16])
    """

    def __init__(self, structure: Sequence[Block], channels: dict[str, int]) -> None:
        super().__init__()
        self.structure = tuple(structure)
        self.channels = channels
        self.indexes = nn.Module()
        for block in self.structure:
            for layer, planes in block.layers:
                self.indexes.register_buffer(f"{block.name}_{key(layer)}", torch.arange(planes))
        self.register_load_state_dict_post_hook(lambda module, _: module.check_indexes())

    def check_indexes(self) -> None:
        """Check indices from a file; on a GPU, wrong ones would only fail later, and end the whole process.

        Raises:
            UsageError: an index is no channel of its layer, or is there twice.
        """
        for block in self.structure:
            for layer, _ in block.layers:
                kept, channels = self._kept(block, layer), self.channels[layer]
                if kept.min() < 0 or kept.max() >= channels or len(kept.unique()) < len(kept):
                    name = f"afs.indexes.{block.name}_{key(layer)}"
                    raise UsageError(f"{name} has to hold different channels, 0 .. {channels - 1}, of {layer}")

    def forward(self, features: dict[str, torch.Tensor], image_size: Sequence[int]) -> dict[str, torch.Tensor]:
        blocks = {}
        for block in self.structure:
            size = grid_size(image_size, block.stride)
            # Select before resizing: fewer channels to interpolate.
            parts = [
                resize(features[layer].index_select(1, self._kept(block, layer)), size) for layer, _ in block.layers
            ]
            blocks[block.name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return blocks

    def _kept(self, block: Block, layer: str) -> torch.Tensor:
        return getattr(self.indexes, f"{block.name}_{key(layer)}")

    @torch.no_grad()
    def init_indexes(
        self, backbone: Backbone, loader: Iterable[dict], batches: int, moments: Moments | None = None
    ) -> dict[str, torch.Tensor]:
        """Choose the channels to keep, in one pass that also measures the backbone's standardisation.

        For each channel, the squared difference between the features of image and gt_image, at the block's stride, is
        scaled to [0, 1] over the batch and compared with the mask. Channels with the smallest mean squared error stay.

        Args:
            loader: batches with image, gt_image (N,3,H,W) and mask (N,1,H,W).
            batches: number of batches to use.
            moments: gets the normal images' features, all channels of the layers of each block.

        Returns:
            {"<block>_<layer>": (C,) summed loss of every channel}, averaged over ranks.
        """
        device = next(iter(self.indexes.buffers())).device
        statistics, deviation = FeatureStatistics(), None
        losses: dict[str, torch.Tensor] = {}
        for batch in islice(loader, batches):
            images, gt_images, masks = (
                batch[name].to(device, non_blocking=True) for name in ("image", "gt_image", "mask")
            )
            features, gt_features = backbone.maps(images), backbone.maps(gt_images)
            if backbone.standardize:
                statistics.add(gt_features)
                deviation = deviation or statistics.result(across_ranks=False)[1]
            if moments is not None:
                self._add_moments(moments, gt_features, images.shape[-2:])
            for layer, feature in features.items():
                difference = feature - gt_features[layer]
                # The mean cancels, but the scale matters: channel_losses adds an absolute 1e-4 to its denominator.
                difference = difference / deviation[layer].to(device) if deviation else difference
                for block in self.structure:
                    if layer in dict(block.layers):
                        name = f"{block.name}_{key(layer)}"
                        loss = channel_losses(difference, masks, grid_size(images.shape[-2:], block.stride))
                        losses[name] = losses.get(name, 0) + loss
        if not losses:
            raise ValueError("AFS needs at least one batch")
        for name, loss in losses.items():
            distributed.all_reduce_mean(loss)
            loss.nan_to_num_(nan=float("inf"))
            kept = getattr(self.indexes, name)
            kept.copy_(loss.argsort(stable=True)[: len(kept)].sort().values)
        if backbone.standardize:
            backbone.set_standardization(*statistics.result())
        return losses

    def _add_moments(self, moments: Moments, features: dict[str, torch.Tensor], image_size: Sequence[int]) -> None:
        for block in self.structure:
            size = grid_size(image_size, block.stride)
            moments.add(block.name, torch.cat([resize(features[layer], size) for layer, _ in block.layers], dim=1))

    def kept_moments(self, moments: Moments, backbone: Backbone) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean (C,) and covariance (C,C) of each block's features, as forward gives them for normal images."""
        kept = {}
        for block in self.structure:
            indices, shifts, scales, offset = [], [], [], 0
            for layer, planes in block.layers:
                index = self._kept(block, layer).cpu()
                shift, scale = backbone.standardization(layer)
                indices.append(index + offset)
                shifts.append(shift.cpu()[index])
                scales.append(scale.cpu().expand(planes))
                offset += self.channels[layer]
            chosen = torch.cat(indices)
            mean, covariance = moments.result(block.name)
            part = mean[chosen], covariance[chosen][:, chosen]
            kept[block.name] = standardized(part, torch.cat(shifts), torch.cat(scales))
        return kept


def channel_losses(difference: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean squared error between each channel's squared difference, scaled to [0, 1] over the batch, and the masks.

    Args:
        difference: (N, C, h, w) features of the anomalous images minus those of the normal ones.
        masks: (N, 1, H, W).
        size: (height, width) of the block's grid.

    Returns:
        (C,) errors.
    """
    squared = resize(difference, size) ** 2
    low, high = squared.amin(dim=(0, 2, 3), keepdim=True), squared.amax(dim=(0, 2, 3), keepdim=True)
    scaled = (squared - low) / (high - low + 1e-4)
    target = F.interpolate(masks.float(), size, mode="nearest")
    return ((scaled - target) ** 2).mean(dim=(0, 2, 3))
