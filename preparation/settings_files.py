"""Makes the YAML files of a user's own data set from MVTec-AD's."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.catalog import CATALOG

SOURCE = "MVTec-AD"
TEMPLATES = Path(__file__).resolve().parent.parent / "experiments" / SOURCE
FILES = ("diffusion.yaml", "classifier.yaml", "sample.yaml", "realnet.yaml", "realnet_unified.yaml")
IMAGES = "images"  # folder under data/<dataset>/
STEP, AREA = 32, 256 * 256
FOREGROUND_HINT = "or auto, a rule such as MVTec-AD/bottle, or {channel: gray, threshold: otsu, close: 6, open: 6}"


def input_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of about 256 x 256 pixels in the images' aspect ratio; square if their ratios differ.

    Both are multiples of 32, as the diffusion model requires.
    """
    ratios = np.array([height / width for height, width in sizes])
    ratio = float(np.median(ratios))
    if np.mean(np.abs(ratios / ratio - 1) < 0.1) < 0.9:
        ratio = 1.0
    sides = np.sqrt(AREA * ratio), np.sqrt(AREA / ratio)
    return tuple(max(STEP, STEP * round(side / STEP)) for side in sides)


def diffusion_size(size: Sequence[int]) -> tuple[int, int]:
    """The diffusion model's size for an input size of RealNet: each side rounded up to a multiple of 32."""
    return tuple(STEP * -(-side // STEP) for side in size)


def settings_texts(dataset: str, classes: int, size: Sequence[int], foreground: str) -> dict[str, str]:
    """Texts of a data set's YAML files by file name, with its number of classes, paths and sizes.

    Args:
        classes: number of classes. One class needs neither a classifier nor a model for all classes.
        size: input size of RealNet.
        foreground: value of dataset.foreground, as YAML.
    """
    info = CATALOG[SOURCE]
    diffusion = diffusion_size(size)
    texts = {}
    for name in FILES:
        if classes == 1 and name in ("classifier.yaml", "realnet_unified.yaml"):
            continue
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        text = re.sub(r"^#.*\n", f"# {name} of {dataset}, made from {SOURCE}'s.\n", text, count=1)
        network_size = diffusion if name in ("diffusion.yaml", "classifier.yaml") else size
        changes = {
            f"data/{SOURCE}/{info.type}/": f"data/{dataset}/{IMAGES}/",
            f"data/{SOURCE}/": f"data/{dataset}/",
            f"experiments/{SOURCE}/": f"experiments/{dataset}/",
            f"--dataset {SOURCE}": f"--dataset {dataset}",
            f"type: {info.type}\n": f"type: {dataset}\n",
            f"class_number: {len(info.classes)}\n": f"class_number: {classes}\n",
            "input_size: [256, 256]\n": f"input_size: [{network_size[0]}, {network_size[1]}]\n",
            "H: 256, W: 256": f"H: {diffusion[0]}, W: {diffusion[1]}",
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        if name == "realnet.yaml":
            text = text.replace("  train:\n", f"  foreground: {foreground}  # {FOREGROUND_HINT}\n  train:\n", 1)
        if name == "sample.yaml" and classes == 1:
            text = re.sub(
                r"^classifier:.*?(?=^TestSampler)", "classifier: null  # one class\n", text, flags=re.M | re.S
            )
        texts[name] = text
    return texts
