"""What convolutions see beyond an image's border."""

from torch import nn

from utils.choices import PADDINGS
from utils.errors import UsageError


def set_padding(network: nn.Module, padding: str, setting: str) -> None:
    """Let all convolutions of a network see this beyond the border; transposed ones always see zeros.

    Zeros make the features at borders unlike all others, whatever the image shows (Islam et al., "How much position
    information do convolutional neural networks encode?", arXiv 2001.08248).

    Args:
        padding: "zeros", as networks are trained on ImageNet, or "replicate", the outermost values.
        setting: where the padding was named, for the error message.

    Raises:
        UsageError: another padding.
    """
    if padding not in PADDINGS:
        raise UsageError(f"{setting}: {padding!r} is not one of {', '.join(PADDINGS)}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = padding
