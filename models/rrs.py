"""RRS, reconstruction residuals selection, and the discriminator (RealNet, section 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.afs import grid_size, resize
from models.padding import set_padding
from models.recon import ResidualStack
from utils.counts import counted
from utils.errors import UsageError


class RRS(nn.Module):
    """Keeps each image's residual channels that react most, and decodes them into anomaly logits.

    Args:
        planes: channels of each block.
        strides: stride of each block.
        modes: how to rank channels: by "max", "mean" or both over positions; two modes may keep the same channel.
        mode_numbers: how many channels each mode keeps.
        num_residual_layers: length of the residual stack.
        stop_grad: block the discriminator's gradient to the reconstruction networks.
        padding: what its convolutions see beyond the border (see padding.set_padding).

    Shape:
        {block: (N, planes[block], h, w) >= 0}, image size (H, W) -> logits (N, 2, H, W)

    Example:
        >>> rrs = RRS({"block1": 32}, {"block1": 4}, mode_numbers=(8, 8)).eval()
        >>> rrs({"block1": torch.rand(2, 32, 16, 16)}, (64, 64)).shape
        torch.Size([2, 2, 64, 64])

    Raises:
        UsageError: an unknown mode, or a number of channels that does not fit.
    """

    def __init__(
        self,
        planes: dict[str, int],
        strides: dict[str, int],
        modes: Sequence[str] = ("max", "mean"),
        mode_numbers: Sequence[int] = (256, 256),
        num_residual_layers: int = 2,
        stop_grad: bool = False,
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        total = sum(planes.values())
        if len(modes) != len(mode_numbers):
            raise UsageError(f"net.rrs.kwargs: {counted(len(modes), 'mode')}, but {len(mode_numbers)} mode_numbers")
        for mode, number in zip(modes, mode_numbers, strict=True):
            if mode not in ("max", "mean"):
                raise UsageError(f"net.rrs.kwargs.modes: {mode!r} is not one of max, mean")
            if not 0 < number <= total:
                raise UsageError(
                    f"net.rrs.kwargs.mode_numbers: {number} is not in 1 .. {total}, the structure's channels"
                )
        self.modes, self.mode_numbers = tuple(modes), tuple(mode_numbers)
        self.stride = min(strides.values())
        self.stop_grad = stop_grad
        kept = sum(mode_numbers)
        self.bn_idx = nn.BatchNorm2d(total, momentum=0.9, affine=False)
        self.decoder1 = nn.Sequential(
            ResidualStack(kept, kept, num_residual_layers),
            nn.Conv2d(kept, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
        )
        self.decoder2 = nn.Sequential(
            nn.Conv2d(128, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1), nn.ReLU()
        )
        self.decoder3 = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        set_padding(self, padding, "net.rrs.kwargs.padding")

    def forward(self, residual: dict[str, torch.Tensor], image_size: Sequence[int]) -> torch.Tensor:
        size = grid_size(image_size, self.stride)
        joined = torch.cat([resize(r, size) for r in residual.values()], dim=1)
        if self.stop_grad:
            joined = joined.detach()
        chosen = self.choose(joined)
        kept = joined.gather(1, chosen[:, :, None, None].expand(-1, -1, *joined.shape[-2:]))
        x = self.decoder2(self.decoder1(kept))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.interpolate(self.decoder3(x), tuple(image_size), mode="bilinear", align_corners=True)

    @torch.no_grad()
    def choose(self, joined: torch.Tensor) -> torch.Tensor:
        """Indices (N, kept) of the channels to keep, in descending order of score within each mode.

        BatchNorm makes the channels comparable; it is used for this choice only.
        """
        equalised = self.bn_idx(joined.detach())
        scores = {"max": lambda x: x.amax(dim=(2, 3)), "mean": lambda x: x.mean(dim=(2, 3))}
        chosen = [
            scores[mode](equalised).topk(number, dim=1).indices
            for mode, number in zip(self.modes, self.mode_numbers, strict=True)
        ]
        return torch.cat(chosen, dim=1)
