"""The noise-predicting U-Net of SDAS, and the guidance classifier with the same encoder (docs/method.md, section 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.sdas.blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EmbedSequential,
    GroupNorm32,
    ResBlock,
    Upsample,
    timestep_embedding,
    zero_init,
)
from utils.checkpoint import load_pretrained
from utils.errors import UsageError


@dataclass(frozen=True)
class UNetShape:
    """Settings that encoder and decoder share.

    Args:
        width: channels of the first level.
        depth: residual blocks per level.
        channel_mult: width multiplier of each level.
        attention_factors: downsampling factors that get attention (factors, not pixel sizes).
        dropout: dropout probability.
        num_heads, num_head_channels: see AttentionBlock.
        use_scale_shift_norm, resblock_updown: see ResBlock; without resblock_updown, plain convolutions resample.
        attention_window: side in pixels of the windows within which attention looks; None for the whole image.
    """

    width: int
    depth: int
    channel_mult: tuple[int, ...]
    attention_factors: tuple[int, ...]
    dropout: float
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    attention_window: int | None = None

    @property
    def factor(self) -> int:
        """Total downsampling factor."""
        return 2 ** (len(self.channel_mult) - 1)

    def res(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        return ResBlock(channels, 4 * self.width, self.dropout, out_channels, self.use_scale_shift_norm, resample)

    def attention(self, channels: int, factor: int, num_heads: int | None = None) -> AttentionBlock:
        window = None if self.attention_window is None else max(1, self.attention_window // factor)
        return AttentionBlock(channels, num_heads or self.num_heads, self.num_head_channels, window)

    def down(self, channels: int) -> nn.Module:
        return self.res(channels, channels, "down") if self.resblock_updown else Downsample(channels)

    def up(self, channels: int) -> nn.Module:
        return self.res(channels, channels, "up") if self.resblock_updown else Upsample(channels, True)

    def time_embed(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(self.width, 4 * self.width), nn.SiLU(), nn.Linear(4 * self.width, 4 * self.width)
        )

    def encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The encoder's stages, and the number of output channels of each."""
        channels = self.channel_mult[0] * self.width
        stages = nn.ModuleList([EmbedSequential(nn.Conv2d(3, channels, 3, padding=1))])
        widths = [channels]
        factor = 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.depth):
                layers: list[nn.Module] = [self.res(channels, mult * self.width)]
                channels = mult * self.width
                if factor in self.attention_factors:
                    layers.append(self.attention(channels, factor))
                stages.append(EmbedSequential(*layers))
                widths.append(channels)
            if level < len(self.channel_mult) - 1:
                stages.append(EmbedSequential(self.down(channels)))
                widths.append(channels)
                factor *= 2
        return stages, widths

    def middle(self, channels: int) -> EmbedSequential:
        return EmbedSequential(
            self.res(channels, channels), self.attention(channels, self.factor), self.res(channels, channels)
        )


def check_size(size: Sequence[int], channel_mult: Sequence[int], setting: str) -> None:
    """Refuse an input size (height, width) that the levels of a network cannot halve.

    Raises:
        UsageError: the size does not fit; the message names the setting and the nearest size that does.
    """
    factor = 2 ** (len(channel_mult) - 1)
    if any(side < 1 or side % factor for side in size):
        nearest = [max(factor, round(side / factor) * factor) for side in size]
        raise UsageError(
            f"{setting}: {list(size)} does not fit {len(channel_mult)} levels (channel_mult), which need multiples of "
            f"{factor}; the nearest is {nearest}"
        )


def check_training_size(size: Sequence[int], crop: Sequence[int] | None, channel_mult: Sequence[int]) -> None:
    """Refuse sizes of training images, dataset.input_size and dataset.crop, that do not fit a network or each other.

    Raises:
        UsageError: a size does not fit (see check_size), or a crop is larger than the image.
    """
    check_size(size, channel_mult, "dataset.input_size")
    if crop is not None:
        check_size(crop, channel_mult, "dataset.crop")
        if any(part > whole for part, whole in zip(crop, size, strict=True)):
            raise UsageError(f"dataset.crop: {list(crop)} is larger than dataset.input_size {list(size)}")


class UNetTrunk(nn.Module):
    """Time embedding and encoder, common to the diffusion model and the classifier."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = False
        self.time_embed = shape.time_embed()

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        return self.time_embed(timestep_embedding(t, self.shape.width))

    def run(self, stage: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Run a stage; with activation checkpointing, the backward pass recomputes it."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, emb, use_reentrant=False)
        return stage(x, emb)

    def check_size(self, x: torch.Tensor) -> None:
        check_size(x.shape[-2:], self.shape.channel_mult, "input size")


class UNet(UNetTrunk):
    """Class-conditional ADM U-Net.

    Args:
        shape: see UNetShape.
        out_channels: 3 for eps, 6 for eps and the variance interpolation v.
        class_number: number of classes.
        num_heads_upsample: number of heads in the decoder; -1 for the same as in the encoder.

    Shape:
        x (N, 3, H, W) in [-1, 1], t (N,) original timesteps, y (N,) classes -> (N, out_channels, H, W)
    """

    def __init__(self, shape: UNetShape, out_channels: int, class_number: int, num_heads_upsample: int = -1) -> None:
        super().__init__(shape)
        self.label_emb = nn.Embedding(class_number, 4 * shape.width)
        self.input_blocks, widths = shape.encoder()
        channels = widths[-1]
        self.middle_block = shape.middle(channels)
        self.output_blocks = nn.ModuleList()
        heads = shape.num_heads if num_heads_upsample == -1 else num_heads_upsample
        factor = shape.factor
        for level, mult in reversed(list(enumerate(shape.channel_mult))):
            for i in range(shape.depth + 1):
                layers: list[nn.Module] = [shape.res(channels + widths.pop(), mult * shape.width)]
                channels = mult * shape.width
                if factor in shape.attention_factors:
                    layers.append(shape.attention(channels, factor, heads))
                if level and i == shape.depth:
                    layers.append(shape.up(channels))
                    factor //= 2
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.check_size(x)
        emb = self.embed_time(t) + self.label_emb(y)
        skips = []
        h = x
        for stage in self.input_blocks:
            h = self.run(stage, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


class ClassifierUNet(UNetTrunk):
    """Classifier of noisy images: encoder, middle and a pooling head.

    Args:
        shape: see UNetShape.
        class_number: number of classes.
        pool: "attention", "adaptive", "spatial" or "spatial_v2".
        image_size: (H, W) of the input; the attention pool learns one vector per position.

    Shape:
        x (N, 3, H, W) in [-1, 1], t (N,) original timesteps -> logits (N, class_number)
    """

    def __init__(self, shape: UNetShape, class_number: int, pool: str, image_size: tuple[int, int]) -> None:
        super().__init__(shape)
        self.pool = pool
        self.input_blocks, widths = shape.encoder()
        channels = widths[-1]
        self.middle_block = shape.middle(channels)
        if pool == "attention":
            positions = (image_size[0] // shape.factor) * (image_size[1] // shape.factor)
            head = AttentionPool2d(positions, channels, shape.num_head_channels, class_number)
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), head)
        elif pool == "adaptive":
            conv = zero_init(nn.Conv2d(channels, class_number, 1))
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), conv, nn.Flatten())
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(sum(widths) + channels, 2048), nn.ReLU(), nn.Linear(2048, class_number))
        elif pool == "spatial_v2":
            self.out = nn.Sequential(
                nn.Linear(sum(widths) + channels, 2048), GroupNorm32(2048), nn.SiLU(), nn.Linear(2048, class_number)
            )
        else:
            raise ValueError(f"pool {pool!r} is not attention, adaptive, spatial or spatial_v2")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.check_size(x)
        emb = self.embed_time(t)
        means = []
        h = x
        for stage in [*self.input_blocks, self.middle_block]:
            h = self.run(stage, h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.float().mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=-1) if means else h)


def create_diffusion_unet(
    classifier_width: int = 256,
    classifier_depth: int = 2,
    channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
    attention_resolutions: Sequence[int] = (32, 16, 8),
    class_number: int = 15,
    learn_sigma: bool = True,
    dropout: float = 0.0,
    num_heads: int = 4,
    num_heads_upsample: int = -1,
    num_head_channels: int = 64,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = True,
    attention_window: int | None = None,
    use_checkpoint: bool = False,
    pertrain_path: str | None = None,
    pretrain_path: str | None = None,
    image_size: int | Sequence[int] = 256,
    use_fp16: bool = False,
) -> UNet:
    """Build the diffusion U-Net from the keys of the YAML's `unet` section, and load weights if it names a file.

    Args:
        pertrain_path: file with a bare or wrapped state_dict to start from, or None; logs which tensors fitted. The
            spelling is the reference's; pretrain_path means the same.
        attention_window: see UNetShape.
        use_checkpoint: recompute activations in the backward pass to save memory.
        image_size, use_fp16: ignored, but accepted as in the reference: the network takes any size, and the trainer
            sets the precision (autocast).

    Raises:
        UsageError: the file is missing, or fits fewer than half of the network's tensors.

    Example:
        >>> unet = create_diffusion_unet(classifier_width=32, classifier_depth=1, channel_mult=[1, 2], class_number=3)
        >>> unet(torch.zeros(2, 3, 16, 16), torch.tensor([10, 900]), torch.tensor([0, 2])).shape
        torch.Size([2, 6, 16, 16])
    """
    del image_size, use_fp16
    shape = UNetShape(
        classifier_width,
        classifier_depth,
        tuple(channel_mult),
        tuple(attention_resolutions),
        dropout,
        num_heads,
        num_head_channels,
        use_scale_shift_norm,
        resblock_updown,
        attention_window,
    )
    model = UNet(shape, 6 if learn_sigma else 3, class_number, num_heads_upsample)
    model.activation_checkpointing = use_checkpoint
    if start := pretrain_path or pertrain_path:
        load_pretrained(model, start, hint="unet.classifier_width and unet.channel_mult")
    return model


def create_classifier_unet(
    classifier_width: int = 128,
    classifier_depth: int = 2,
    channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
    classifier_attention_resolutions: Sequence[int] = (32, 16, 8),
    class_number: int = 15,
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
    classifier_pool: str = "attention",
    num_head_channels: int = 64,
    dropout: float = 0.0,
    attention_window: int | None = None,
    use_checkpoint: bool = False,
    pertrain_path: str | None = None,
    pretrain_path: str | None = None,
    image_size: int | Sequence[int] = 256,
) -> ClassifierUNet:
    """Build the guidance classifier from the keys of the YAML's `classifier` section; see create_diffusion_unet.

    Args:
        image_size: side or (height, width) of the images; sets the attention pool's positions.
    """
    shape = UNetShape(
        classifier_width,
        classifier_depth,
        tuple(channel_mult),
        tuple(classifier_attention_resolutions),
        dropout,
        1,
        num_head_channels,
        classifier_use_scale_shift_norm,
        classifier_resblock_updown,
        attention_window,
    )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    model = ClassifierUNet(shape, class_number, classifier_pool, size)
    model.activation_checkpointing = use_checkpoint
    if start := pretrain_path or pertrain_path:
        load_pretrained(model, start, hint="classifier.classifier_width and classifier.channel_mult")
    return model
