"""Layers to tap of common backbones: the `structure` of a realnet.yaml, for prepare_data.py."""

from dataclasses import dataclass

from utils.config import did_you_mean
from utils.errors import UsageError

# Of RGB in 0 .. 1. Nearly all ImageNet weights expect the first; those that TensorFlow Lite files hold, the second.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Tap:
    """A layer to tap, how many of its channels AFS keeps, and its stride."""

    layer: str
    planes: int
    stride: int


# A block per layer. Narrow networks are tapped where a block widens its features (the first layer of an inverted
# residual), so that AFS has channels to choose from. Half of the planes is a multiple of 32, as U-Nets need.
STRUCTURES = {
    "mobilenet_v2": (
        Tap("features.4.conv.0", 64, 4),
        Tap("features.7.conv.0", 128, 8),
        Tap("features.14.conv.0", 128, 16),
    ),
    "squeezenet1_1": (Tap("features.4", 64, 4), Tap("features.7", 128, 8), Tap("features.12", 128, 16)),
    "resnet18": (Tap("layer1", 64, 4), Tap("layer2", 128, 8), Tap("layer3", 128, 16)),
    "resnet34": (Tap("layer1", 64, 4), Tap("layer2", 128, 8), Tap("layer3", 128, 16)),
    "resnet50": (Tap("layer1", 128, 4), Tap("layer2", 256, 8), Tap("layer3", 256, 16)),
    "wide_resnet50_2": (
        Tap("layer1", 256, 4),
        Tap("layer2", 512, 8),
        Tap("layer3", 512, 16),
        Tap("layer4", 256, 32),
    ),
    "efficientnet_b0": (
        Tap("features.3.0.block.0", 64, 4),
        Tap("features.4.0.block.0", 128, 8),
        Tap("features.6.0.block.0", 128, 16),
    ),
    "efficientnet_b4": (
        Tap("features.3.0.block.0", 64, 4),
        Tap("features.4.0.block.0", 128, 8),
        Tap("features.6.0.block.0", 256, 16),
    ),
    "convnext_tiny": (Tap("features.1", 64, 4), Tap("features.3", 128, 8), Tap("features.5", 256, 16)),
    "swin_t": (Tap("features.1", 64, 4), Tap("features.3", 128, 8), Tap("features.5", 256, 16)),
    "timm/vit_small_patch14_dinov2.lvd142m": (Tap("blocks.3", 128, 16), Tap("blocks.7", 128, 16)),
    "timm/vit_base_patch14_dinov2.lvd142m": (Tap("blocks.3", 128, 16), Tap("blocks.7", 128, 16)),
    "timm/vit_small_patch16_dinov3.lvd1689m": (Tap("blocks.3", 128, 16), Tap("blocks.7", 128, 16)),
    "vit_b_16": (Tap("encoder.layers.encoder_layer_3", 128, 16), Tap("encoder.layers.encoder_layer_7", 128, 16)),
}


def structure_of(backbone: str) -> list[dict]:
    """The `structure` of a backbone, as it stands in a realnet.yaml.

    Raises:
        UsageError: there is none for this backbone.

    Example:
        >>> structure_of("resnet18")[0]
        {'name': 'block1', 'layers': [{'idx': 'layer1', 'planes': 64}], 'stride': 4}
    """
    if backbone not in STRUCTURES:
        hint = did_you_mean(backbone, STRUCTURES) or f"; known are {', '.join(STRUCTURES)}"
        raise UsageError(f"--backbone {backbone}: no structure is known for it{hint}")
    return [
        {"name": f"block{i}", "layers": [{"idx": tap.layer, "planes": tap.planes}], "stride": tap.stride}
        for i, tap in enumerate(STRUCTURES[backbone], start=1)
    ]
