"""Feature reconstruction networks, one per block (RealNet, section 3.2; docs/method.md, section 5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.padding import set_padding
from models.sdas.blocks import AttentionBlock, GroupNorm32, zero_init
from models.subspace import NormalSubspace
from utils.choices import STARTS
from utils.counts import counted
from utils.errors import UsageError

HEAD_CHANNELS = 64
SHARE = 0.95


class _UpConv(nn.Module):
    """4x4 stride-2 transposed convolution. (N, C, h, w) -> (N, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class _ResBlock(nn.Module):
    """skip(x) + conv3(SiLU(GN(x))), with both branches resampled the same way."""

    def __init__(self, channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        if resample == "up":
            self.h_upd, self.x_upd = _UpConv(channels), _UpConv(channels)
        elif resample == "down":
            self.h_upd, self.x_upd = nn.AvgPool2d(2), nn.AvgPool2d(2)
        else:
            self.h_upd, self.x_upd = nn.Identity(), nn.Identity()
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, act, conv = self.in_layers
        return self.skip_connection(self.x_upd(x)) + conv(self.h_upd(act(norm(x))))


class ReconstructionUNet(nn.Module):
    """U-Net without time embedding that maps features of an anomalous image to those of the normal image.

    Args:
        channels: channels of input and output.
        hidden: width of the first level, a multiple of 32.
        num_res_blocks: residual blocks per level.
        channel_mult: width multiplier of each level.
        attention_mult: downsampling factors that get attention.

    Shape:
        (N, channels, h, w) -> same; h and w multiples of 2 ** (levels - 1)
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        num_res_blocks: int,
        channel_mult: Sequence[int],
        attention_mult: Sequence[int],
    ) -> None:
        super().__init__()
        width = channel_mult[0] * hidden
        self.input_blocks = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])
        widths = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [_ResBlock(width, mult * hidden)]
                width = mult * hidden
                if 2**level in attention_mult:
                    layers.append(AttentionBlock(width, num_head_channels=HEAD_CHANNELS))
                self.input_blocks.append(nn.Sequential(*layers))
                widths.append(width)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(_ResBlock(width, width, "down"))
                widths.append(width)
        self.middle_block = nn.Sequential(
            _ResBlock(width, width), AttentionBlock(width, num_head_channels=HEAD_CHANNELS), _ResBlock(width, width)
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [_ResBlock(width + widths.pop(), mult * hidden)]
                width = mult * hidden
                if 2**level in attention_mult:
                    layers.append(AttentionBlock(width, num_head_channels=HEAD_CHANNELS))
                if level and i == num_res_blocks:
                    layers.append(_ResBlock(width, width, "up"))
                self.output_blocks.append(nn.Sequential(*layers))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), zero_init(nn.Conv2d(width, channels, 3, padding=1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for stage in self.input_blocks:
            x = stage(x)
            skips.append(x)
        x = self.middle_block(x)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1))
        return self.out(x)


class ResidualStack(nn.Module):
    """n times x + conv1(ReLU(conv3(ReLU(x)))), then ReLU. (N, C, h, w) -> same."""

    def __init__(self, channels: int, hidden: int, num_residual_layers: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList(_ResidualLayer(channels, hidden) for _ in range(num_residual_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self._layers:
            x = layer(x)
        return F.relu(x)


class _ResidualLayer(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._block(x)


class SimpleReconstruction(nn.Module):
    """Small convolutional autoencoder with skip connections, for one model over many classes.

    Args:
        channels: of input and output.
        num_residual_layers: length of the residual stack.
        zero: whether the output begins as 0.

    Shape:
        (N, channels, h, w) -> same; h and w multiples of 4
    """

    def __init__(self, channels: int, num_residual_layers: int, zero: bool = False) -> None:
        super().__init__()
        c = channels
        self.block1 = nn.Sequential(*self._conv(c, c), *self._conv(c, 2 * c))
        self.block2 = nn.Sequential(*self._conv(2 * c, 2 * c), *self._conv(2 * c, 4 * c))
        self._residual_stack = ResidualStack(4 * c, 2 * c, num_residual_layers)
        self.upblock1 = nn.ConvTranspose2d(8 * c, 2 * c, 4, stride=2, padding=1)
        self.upblock2 = nn.ConvTranspose2d(4 * c, c, 4, stride=2, padding=1)
        if zero:
            zero_init(self.upblock2)

    @staticmethod
    def _conv(channels: int, out_channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out_channels, 3, padding=1), nn.InstanceNorm2d(out_channels), nn.ReLU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b1 = F.avg_pool2d(self.block1(x), 2)
        b2 = F.avg_pool2d(self.block2(b1), 2)
        up = F.relu(self.upblock1(torch.cat([self._residual_stack(b2), b2], dim=1)))
        return self.upblock2(torch.cat([up, b1], dim=1))


class _PerBlock(nn.Module):
    """One network per block, named <block>_recon; pads features to the multiple of `factor` that networks need.

    Args:
        planes: channels of each block.
        start: what a network's output is added to: nothing ("zero", as in the paper), the features ("identity"), or
            their projection on the normal subspace ("subspace").
        share: of the variance that the normal subspace holds.
        padding: what the networks' convolutions see beyond the border (see padding.set_padding).
    """

    def __init__(
        self,
        planes: dict[str, int],
        networks: dict[str, nn.Module],
        factor: int,
        start: str,
        share: float,
        padding: str,
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise UsageError(f"net.recon.kwargs.start: {start!r} is not one of {', '.join(STARTS)}")
        self.blocks = tuple(networks)
        self.factor, self.start = factor, start
        for block, network in networks.items():
            self.add_module(f"{block}_recon", network)
            if start == "subspace":
                self.add_module(f"{block}_subspace", NormalSubspace(planes[block], share))
            set_padding(network, padding, "net.recon.kwargs.padding")

    def subspace(self, block: str) -> NormalSubspace:
        """The normal subspace of a block."""
        return getattr(self, f"{block}_subspace")

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {block: self._reconstruct(block, features[block]) for block in self.blocks}

    def _reconstruct(self, block: str, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        bottom, right = -h % self.factor, -w % self.factor
        padded = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        output = getattr(self, f"{block}_recon")(padded)[..., :h, :w]
        if self.start == "zero":
            return output
        return output.float() + (x if self.start == "identity" else self.subspace(block)(x))


class ReconstructionLayer(_PerBlock):
    """A ReconstructionUNet per block.

    Args:
        planes: channels of each block.
        num_res_blocks, channel_mult, attention_mult: see ReconstructionUNet.
        hide_channels_ratio: hidden width divided by the block's channels.
        start, share, padding: see _PerBlock.

    Shape:
        {block: (N, planes[block], h, w)} -> same

    Example:
        >>> recon = ReconstructionLayer({"block1": 64}, num_res_blocks=1)
        >>> recon({"block1": torch.zeros(1, 64, 15, 22)})["block1"].shape
        torch.Size([1, 64, 15, 22])

    Raises:
        UsageError: the hidden width of a block is not a positive multiple of 32.
    """

    def __init__(
        self,
        planes: dict[str, int],
        num_res_blocks: int = 2,
        hide_channels_ratio: float = 0.5,
        channel_mult: Sequence[int] = (1, 2, 4),
        attention_mult: Sequence[int] = (2, 4),
        start: str = "zero",
        share: float = SHARE,
        padding: str = "zeros",
    ) -> None:
        networks: dict[str, nn.Module] = {}
        for block, channels in planes.items():
            hidden = int(channels * hide_channels_ratio)
            if hidden == 0 or hidden % 32:
                raise UsageError(
                    f"structure: {block} keeps {counted(channels, 'channel')}; times recon's hide_channels_ratio "
                    f"{hide_channels_ratio} that is {hidden}, which is not a positive multiple of 32"
                )
            networks[block] = ReconstructionUNet(channels, hidden, num_res_blocks, channel_mult, attention_mult)
        super().__init__(planes, networks, 2 ** (len(channel_mult) - 1), start, share, padding)


class SimpleReconstructionLayer(_PerBlock):
    """A SimpleReconstruction per block, for the multi-class setting.

    Args:
        planes: channels of each block.
        num_residual_layers: length of the residual stack.
        start, share, padding: see _PerBlock.
    """

    def __init__(
        self,
        planes: dict[str, int],
        num_residual_layers: int = 2,
        start: str = "zero",
        share: float = SHARE,
        padding: str = "zeros",
    ) -> None:
        zero = start != "zero"
        networks: dict[str, nn.Module] = {
            block: SimpleReconstruction(channels, num_residual_layers, zero) for block, channels in planes.items()
        }
        super().__init__(planes, networks, 4, start, share, padding)
