"""Sizes of SDAS for data sets of one's own: what diffusion.yaml, classifier.yaml and sample.yaml say in each.

A preset holds the values of the templates' places (@WIDTH_OF_UNET@ and the like), as YAML.
"""

from collections.abc import Sequence

import torch

GIB = 2**30
MEDIUM_MEMORY, PAPER_MEMORY = 7 * GIB, 22 * GIB  # cards that are sold as 8 and 24 GB, less what they keep

VALIDATIONS = 5  # in a training

_FROM_SCRATCH = {
    "MODEL_START": "from scratch",
    "PRETRAINED_UNET": "null",
    "PRETRAINED_CLASSIFIER": "null",
    "POOL": "adaptive",
    "CHECKPOINTING": False,
    "EPOCHS": 100_000,
    "ACCUMULATE": 1,
    "BETAS": "cosine",
    "SAMPLER": "dpmpp_2m_sde",
    "COUNTS": "logsnr20",
    "DEPTHS": "[0.6, 0.95]",
}
# In each, the model learns crops of the images at the detector's size, so that it draws their grain.
PRESETS: dict[str, dict[str, object]] = {
    # 5 M parameters: within an hour on two CPU cores.
    "small": {
        **_FROM_SCRATCH,
        "CROP": 64,
        "UNET_WIDTH": 32,
        "CLASSIFIER_WIDTH": 32,
        "DEPTH": 1,
        "MULT": "[1, 2, 4, 4]",
        "ATTENTION": "[8]",
        "HEAD": 32,
        "BATCH": 4,
        "STEPS": 3000,
        "RATE": "4e-4",
        "SCHEDULE": "{type: cosine, warmup_steps: 100}",
        "DECAY": 0.998,
        "IMAGES_AT_ONCE": 4,
        "NUMBER": 64,
    },
    # 58 M parameters: a GPU of 8 GB.
    "medium": {
        **_FROM_SCRATCH,
        "CROP": 128,
        "UNET_WIDTH": 96,
        "CLASSIFIER_WIDTH": 64,
        "DEPTH": 2,
        "MULT": "[1, 1, 2, 3, 4]",
        "ATTENTION": "[16, 8]",
        "HEAD": 32,
        "BATCH": 8,
        "STEPS": 30_000,
        "RATE": "1e-4",
        "SCHEDULE": "{type: cosine, warmup_steps: 500}",
        "DECAY": 0.9995,
        "IMAGES_AT_ONCE": 8,
        "NUMBER": 256,
    },
    # 553 M parameters, whole images: the settings of the benchmarks, but for what makes them fit on a GPU of 24 GB.
    "paper": {
        "MODEL_START": "fine-tuned from OpenAI's ImageNet weights",
        "PRETRAINED_UNET": "pretrain/256x256_diffusion.pt",
        "PRETRAINED_CLASSIFIER": "pretrain/256x256_classifier.pt",
        "POOL": "attention",
        "CHECKPOINTING": True,
        "EPOCHS": 1000,
        "ACCUMULATE": 3,
        "BETAS": "linear",
        "SAMPLER": "ancestral",
        "DEPTHS": "null",
        "COUNTS": "ddim20",
        "CROP": None,
        "UNET_WIDTH": 256,
        "CLASSIFIER_WIDTH": 128,
        "DEPTH": 2,
        "MULT": "[1, 1, 2, 2, 4, 4]",
        "ATTENTION": "[32, 16, 8]",
        "HEAD": 64,
        "BATCH": 5,
        "STEPS": "null",
        "RATE": "1e-4",
        "SCHEDULE": "{type: constant, warmup_steps: 0}",
        "DECAY": 0.9999,
        "IMAGES_AT_ONCE": 16,
        "NUMBER": 256,
    },
}


def values_of(preset: str, size: Sequence[int], images: int) -> dict[str, object]:
    """The values of a preset's places, for training images of the size (height, width), and so many of them."""
    values = dict(PRESETS[preset])
    if values["STEPS"] == "null":
        every = 10
    else:
        # With few images, an epoch takes seconds, and a validation minutes.
        every = max(1, values["STEPS"] * values["BATCH"] // (VALIDATIONS * max(1, images)))
    side = values["CROP"]
    crop = None if side is None else [min(side, whole) for whole in size]
    return values | {
        "EVERY": every,
        "CROP": crop or "null",
        "WINDOW": side or "null",
        "CLASSIFIER_EPOCHS": 100 if side is None else values["EPOCHS"],
    }


def chosen(wanted: str) -> tuple[str, str]:
    """The preset, and why it is that one, in words."""
    if wanted != "auto":
        return wanted, ""
    if not torch.cuda.is_available():
        return "small", " (there is no GPU)"
    memory = torch.cuda.get_device_properties(0).total_memory
    name = "paper" if memory >= PAPER_MEMORY else "medium" if memory >= MEDIUM_MEMORY else "small"
    return name, f" (the GPU has {memory / GIB:.0f} GiB)"
