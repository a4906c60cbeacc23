"""The settings of the detector's networks, losses and metrics, for the tables in utils/settings.py."""

import math
import re
from typing import Any

from utils.choices import PADDINGS, STARTS
from utils.setting_types import MISSING, Entries, Section, Setting

MOST_PIXELS = 16_384  # of a side of the networks' inputs

# ---- checks of single values ----


def _block_name_problem(name: str) -> str | None:
    # Names of blocks become parts of the names of tensors.
    return None if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) else "has to hold 1 to 60 letters, digits, _ and -"


def _short_problem(name: str) -> str | None:
    return None if 1 <= len(name) <= 100 else "has to hold 1 to 100 letters"


def _loss_name_problem(name: str) -> str | None:
    return "is what the log calls the sum of all losses" if name == "loss" else _short_problem(name)


def _weights_problem(text: str) -> str | None:
    if text == "checkpoint":  # what build_realnet is told when a checkpoint brings them
        return "would leave the backbone untrained"
    return None if text.strip() else "is empty"


def _distinct_problem(values: list) -> str | None:
    return "holds a value twice" if len(set(values)) < len(values) else None


def _alpha_problem(alpha: Any) -> str | None:
    numbers = alpha if isinstance(alpha, list) else [alpha]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        return "is neither a number nor a list of two"
    if isinstance(alpha, list):
        fits = len(alpha) == 2 and all(0 <= number < math.inf for number in alpha) and sum(alpha) > 0
        return None if fits else "has to hold two numbers >= 0, not both 0"
    return None if 0 <= alpha <= 1 else "has to lie in 0 .. 1"


# ---- structure and networks ------------------------------------------------------------------------------------------

_LAYERS = Entries(
    {"idx": Setting("str", "Name of the layer."), "planes": Setting("int", "Channels to keep.", low=1, high=10**6)},
    "The layers to tap.",
    distinct="idx",
)
STRUCTURE = Entries(
    {
        "name": Setting("str", "Name of the block.", check=_block_name_problem),
        "layers": _LAYERS,
        "stride": Setting("int", "Common stride of its layers.", low=1, high=4096),
    },
    "Blocks {name, layers: [{idx, planes}], stride}: layers to tap, channels to keep, common stride.",
    may_be_empty=True,
)
_MEASURED = {
    name: Setting("any", "Stored by the reference program; measured here.", None, legacy=True)
    for name in ("outlayers", "structure", "inplanes", "instrides")
}
_DEPTH = Setting("int", "Length of the residual stack.", 2, low=0, high=64)
_START = {
    "start": Setting("str", "What the reconstruction begins as.", "zero", choices=STARTS),
    "share": Setting("float", "Share of the variance that the normal subspace holds.", 0.95, above=0, high=1),
}
_PADDING = {
    "padding": Setting(
        "str",
        "What convolutions see beyond the border: zeros, or the outermost values.",
        "zeros",
        choices=PADDINGS,
    )
}
_PARTS = {
    "models.backbones.Backbone": Section(
        {
            **_MEASURED,
            "backbone": Setting("str", "Name of a torchvision network."),
            "weights": Setting("str", "auto, random, or a file.", "auto", check=_weights_problem),
            "standardize": Setting("bool?", "Whether to standardise features; null: all but ResNets.", None),
            **_PADDING,
        }
    ),
    "models.afs.AFS": Section(
        {**_MEASURED, "init_bsn": Setting("int", "Batches that AFS looks at.", 64, low=1, high=100_000)}
    ),
    "models.recon.ReconstructionLayer": Section(
        {
            **_MEASURED,
            "num_res_blocks": Setting("int", "Residual blocks per level.", 2, low=1, high=32),
            "hide_channels_ratio": Setting("float", "Hidden width divided by the channels.", 0.5, above=0, high=16),
            "channel_mult": Setting("ints", "Width multiplier of each level.", [1, 2, 4], low=1, high=32),
            "attention_mult": Setting("ints", "Downsampling factors with attention.", [2, 4], low=1, may_be_empty=True),
            **_START,
            **_PADDING,
        }
    ),
    "models.recon.SimpleReconstructionLayer": Section(
        {**_MEASURED, "num_residual_layers": _DEPTH, **_START, **_PADDING}
    ),
    "models.rrs.RRS": Section(
        {
            **_MEASURED,
            "modes": Setting(
                "strs", "How channels are ranked.", ["max", "mean"], choices=("max", "mean"), check=_distinct_problem
            ),
            "mode_numbers": Setting("ints", "Channels that each mode keeps.", [256, 256], low=1),
            "num_residual_layers": _DEPTH,
            "stop_grad": Setting("bool", "Keep the discriminator's gradient from the reconstruction.", False),
            **_PADDING,
        }
    ),
}
_NET_HELP = (
    "The four parts {name, type, kwargs}: backbone (backbone, weights, standardize, padding), afs (init_bsn), recon, "
    "rrs (modes, mode_numbers, num_residual_layers, stop_grad, padding)."
)
NET = Entries(
    {
        "name": Setting("str", "backbone, afs, recon or rrs."),
        "type": Setting("str", "Its class."),
        "frozen": Setting("bool", "Not used.", False, legacy=True),
        "prev": Setting("str?", "Not used.", None, legacy=True),
    },
    _NET_HELP,
    kwargs=_PARTS,
    may_be_empty=True,
)

# In whose features drawn images are compared with real ones.
FEATURES = Section(
    {
        "backbone": Setting(
            "str?", "Network in whose features drawn images are compared with real ones; null: that of realnet.yaml.",
            None, check=_weights_problem,
        ),
        "weights": Setting("str", "Its weights: auto, random, or a file.", "auto", check=_weights_problem),
        "layers": Setting("strs?", "Its layers; null: those that are usual for it.", None),
        "input_size": Setting(
            "ints", "[height, width] that images are resized to for it.", [256, 256], low=1, high=MOST_PIXELS, length=2
        ),
        "normalization": Setting(
            "str", "What its weights expect: imagenet, or half (mean and deviation of 0.5).", "imagenet",
            choices=("imagenet", "half"),
        ),
    }
)  # fmt: skip

# ---- losses and metrics ----------------------------------------------------------------------------------------------

_WEIGHT = {"weight": Setting("float", "Factor of this loss in the sum of all.", 1.0, low=0, high=1e6)}
_LOSSES = {
    "SegmentCrossEntropyLoss": Section(_WEIGHT),
    "FeatureMSELoss": Section(_WEIGHT),
    "ImageMSELoss": Section(_WEIGHT),
    "SegmentFocalLoss": Section(
        {
            **_WEIGHT,
            "alpha": Setting(
                "any", "Weight of class balance_index, or the weights of both.", None, check=_alpha_problem
            ),
            "gamma": Setting("float", "Focusing exponent.", 2.0, low=0, high=100),
            "balance_index": Setting("int", "The class that alpha weights.", 0, low=0, high=1),
            "smooth": Setting("float", "Smoothing of targets.", 1e-5, above=0, below=0.5),
            "size_average": Setting("bool", "Mean instead of sum.", True),
        }
    ),
}


def losses(text: str, default: Any = MISSING) -> Entries:
    """The key `criterion`."""
    keys = {
        "name": Setting("str", "Its name in the log.", check=_loss_name_problem),
        "type": Setting("str", "Its class."),
    }
    return Entries(keys, text, default, kwargs=_LOSSES, may_be_empty=True)


AUC = Entries(
    {
        "name": Setting("str", "image or pixel.", choices=("image", "pixel")),
        "kwargs": Section(
            {
                "avgpool_size": Setting(
                    "ints",
                    "[height, width] of the pooling window of image scores.",
                    [16, 16],
                    low=1,
                    high=MOST_PIXELS,
                    length=2,
                )
            }
        ),
    },
    "The entry image has kwargs: {avgpool_size: [height, width]}, the pooling window of image scores.",
    [{"name": "image", "kwargs": {"avgpool_size": [16, 16]}}],
    may_be_empty=True,
)
