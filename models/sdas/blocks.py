"""Layers of the ADM U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233).

Tensor names are those of OpenAI's published weights, so that those files load. RealNet's reconstruction networks
(models/recon.py) use the same GroupNorm and attention.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.counts import counted
from utils.errors import UsageError


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups, computed in float32 whatever the input's dtype.

    Under autocast, the variance of a large group would lose too many bits in half precision.

    Raises:
        UsageError: the number of channels is not a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        if channels % 32:
            raise UsageError(f"GroupNorm(32) needs a multiple of 32 channels, got {channels}")
        super().__init__(32, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def zero_init(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the residual branch it ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of timesteps, cosines first.

    Args:
        t: (N,) timesteps, may be fractional.
        dim: length of the embedding.

    Returns:
        (N, dim) float32 in [-1, 1]; an odd dim ends in a zero.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class AttentionBlock(nn.Module):
    """Self-attention over positions: x + proj(attention(GN(x))).

    The 1x1 qkv projection orders its outputs (head, q/k/v, channel).

    Args:
        channels: channels of the input.
        num_heads: number of heads, used if num_head_channels is -1.
        num_head_channels: channels per head, or -1.
        window: longest side, in positions, of the parts within which positions attend to each other; None: no parts.

    Shape:
        (N, C, H, W) -> (N, C, H, W)

    Raises:
        UsageError: the heads do not divide the channels.
    """

    def __init__(
        self, channels: int, num_heads: int = 1, num_head_channels: int = -1, window: int | None = None
    ) -> None:
        super().__init__()
        self.window = window
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.window is None or max(x.shape[-2:]) <= self.window:
            return self._attend(x)
        rows, columns = (-(-side // self.window) for side in x.shape[-2:])
        bands = [
            torch.cat([self._attend(part) for part in band.chunk(columns, dim=3)], dim=3)
            for band in x.chunk(rows, dim=2)
        ]
        return torch.cat(bands, dim=2)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        tokens = x.reshape(n, c, h * w)
        qkv = self.qkv(self.norm(tokens)).reshape(n, self.num_heads, 3, c // self.num_heads, h * w)
        q, k, v = (part.transpose(-1, -2).contiguous() for part in qkv.unbind(2))
        attended = attend(q, k, v).transpose(-1, -2).reshape(n, c, h * w)
        return (tokens + self.proj_out(attended)).reshape(n, c, h, w)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled dot product attention (N, heads, tokens, channels), in float32 even under autocast: fp16 overflows."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Number of attention heads for a width; see AttentionBlock."""
    heads = num_heads if num_head_channels == -1 else max(channels // num_head_channels, 1)
    per_head = channels // heads if num_head_channels == -1 else num_head_channels
    if heads * per_head != channels:
        parts = counted(heads, "attention head")
        raise UsageError(
            f"{channels} channels cannot be split into {parts} of {per_head} channels; change the "
            "width, channel_mult or num_head_channels"
        )
    return heads


class AttentionPool2d(nn.Module):
    """Attention pooling (CLIP, Radford et al. 2021): the output of a mean token that attends to all positions.

    Args:
        positions: H * W of the input.
        channels: channels of the input.
        num_head_channels: channels per head.
        out_channels: length of the output vector.

    Shape:
        (N, C, H, W) -> (N, out_channels)
    """

    def __init__(self, positions: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = count_heads(channels, 1, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c = x.shape[:2]
        tokens = x.reshape(n, c, -1)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        qkv = self.qkv_proj(tokens).reshape(n, 3, self.num_heads, c // self.num_heads, -1)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1))
        # Only the mean token's output is used, so only its query is needed.
        attended = attend(q[:, :, :1], k, v).transpose(-1, -2).reshape(n, c, 1)
        return self.c_proj(attended)[..., 0]


class Upsample(nn.Module):
    """Nearest x2, then an optional 3x3 convolution. (N, C, H, W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """A strided 3x3 convolution. (N, C, H, W) -> (N, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block conditioned on an embedding, optionally resampling.

    Args:
        channels: channels of the input.
        emb_channels: length of the embedding.
        dropout: dropout probability in out_layers.
        out_channels: channels of the output.
        use_scale_shift_norm: condition by FiLM, GN(h) * (1 + scale) + shift, instead of by addition.
        resample: None, "up" or "down".

    Shape:
        x (N, C, H, W), emb (N, emb_channels) -> (N, out_channels, H', W')
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = {None: nn.Identity, "up": lambda: Upsample(channels, False), "down": lambda: nn.AvgPool2d(2)}[
            resample
        ]()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        x = self.resample(x)
        condition = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(x) + h


class EmbedSequential(nn.Sequential):
    """A Sequential that passes the embedding to its ResBlocks."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
