"""Makes the YAML files of a user's own data set: realnet.yaml from a preset, the others from templates/.

In templates, @DATASET@ and the like stand for values. Presets (experiments/presets/) are whole files of a data set
called parts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datasets.foreground import rule_for
from datasets.lists import UNIFIED
from datasets.sources import OF_GOOD_IMAGES
from models.structures import NORMALIZATIONS, structure_of
from preparation import diffusion_presets
from preparation.presets import PRESETS
from utils.config import differences, read_yaml
from utils.errors import RunError, UsageError

TEMPLATES = Path(__file__).resolve().parent / "templates"
_ALL = ("DATASET", "IMAGES", "HEIGHT", "WIDTH")
UNIFIED_FILE = "realnet_unified.yaml"
# What the paper changes for one model of all classes, in experiments/presets/paper.yaml.
PAPER_UNIFIED = {
    r"anomaly_types: [^\n]*": "anomaly_types: {normal: 0.5, dtd: 0.5}",
    r"models\.recon\.ReconstructionLayer\n(    prev: afs)\n    kwargs: [^\n]*": (
        "models.recon.SimpleReconstructionLayer\n    prev: afs\n    kwargs: {num_residual_layers: 2}"
    ),
    r"max_epoch: 1000": "max_epoch: 500",
}
_SDAS = (
    *_ALL, "CLASSES", "MODEL_START", "CROP", "BATCH", "DEPTH", "MULT", "ATTENTION", "HEAD", "WINDOW", "CHECKPOINTING",
    "STEPS", "ACCUMULATE", "RATE", "SCHEDULE", "BETAS",
)  # fmt: skip
# The values that each file names.
FILES = {
    "diffusion.yaml": (*_SDAS, "UNET_WIDTH", "PRETRAINED_UNET", "EPOCHS", "EVERY", "DECAY"),
    "classifier.yaml": (*_SDAS, "CLASSIFIER_WIDTH", "PRETRAINED_CLASSIFIER", "POOL", "CLASSIFIER_EPOCHS"),
    "sample.yaml": (
        "DATASET", "HEIGHT", "WIDTH", "IMAGES_AT_ONCE", "NUMBER", "SAMPLER", "COLOURS", "DEPTHS", "COUNTS", "BETAS",
    ),
}  # fmt: skip
IMAGES = "images"  # folder under data/<dataset>/
STEP, AREA = 32, 256 * 256
FOREGROUND_HINT = "none, auto, a rule such as MVTec-AD/bottle, or {channel: gray, threshold: otsu, close: 6, open: 6}"


def input_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of about 256 x 256 pixels in the images' aspect ratio; square if their ratios differ.

    Both are multiples of 32, as the diffusion model requires.
    """
    ratios = np.array([height / width for height, width in sizes])
    ratio = float(np.median(ratios))
    if np.mean(np.abs(ratios / ratio - 1) < 0.1) < 0.9:
        ratio = 1.0
    sides = np.sqrt(AREA * ratio), np.sqrt(AREA / ratio)
    return tuple(map(_in_steps, sides))


def _in_steps(side: float) -> int:
    """The nearest multiple of STEP above 0."""
    return max(STEP, STEP * round(side / STEP))


def resizing(sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> str | None:
    """What to know where most images (height, width) have sides over 3 times, or below 2/3 of, the input size's.

    Example:
        >>> resizing([(1024, 1280)] * 3, (256, 256))
        'most images are 1024x1280, so a defect of 9 pixels becomes 2: a larger --input-size or tiles show smaller ones'
    """
    height, width = (round(float(side)) for side in np.median(np.array(sizes), axis=0))
    factor = math.sqrt(height * width / (size[0] * size[1]))
    if factor > 3:
        lost = f"so a defect of {round(2 * factor)} pixels becomes 2"
        return f"most images are {height}x{width}, {lost}: a larger --input-size or tiles show smaller ones"
    if factor < 1 / 1.5:
        own = " ".join(str(_in_steps(side)) for side in (height, width))
        return f"most images are {height}x{width}, so they are enlarged; --input-size {own} would be faster"
    return None


def diffusion_size(size: Sequence[int]) -> tuple[int, int]:
    """The diffusion model's size for an input size of RealNet: each side rounded up to a multiple of 32."""
    return tuple(STEP * -(-side // STEP) for side in size)


def foreground_value(text: str, dataset: str) -> str:
    """The value of --foreground as it stands in the YAML file, on one line.

    Raises:
        UsageError: it is not a foreground rule that training can read.
    """
    try:
        value = read_yaml(text)
        if value != "auto":
            rule_for(value, dataset, "", lambda: [])
    except UsageError as error:
        raise UsageError(str(error).replace("dataset.foreground", "--foreground", 1)) from None
    except ValueError as error:
        reason = f"not readable as YAML ({error})"
        raise UsageError(f"--foreground {text}: {reason}; write {FOREGROUND_HINT}") from None
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).splitlines()[0]


def kept_values(path: Path, text: str) -> list[str]:
    """What an existing settings file says otherwise than the text that would be written, as "key value, not value"."""
    try:
        existing = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["a text that is not YAML"]
    return [f"{key} {own}, not {new}" for key, own, new in differences(existing, read_yaml(text))]


@dataclass(frozen=True)
class Networks:
    """What the settings say of the networks.

    Args:
        preset: of realnet.yaml: name of a file in experiments/presets/, without its ending.
        backbone: one of models.structures.STRUCTURES, or None for the preset's.
        weights: file of the backbone's weights, or None for pretrain/ or a download.
        normalization: one of models.structures.NORMALIZATIONS, which goes with the weights.
        diffusion: one of diffusion_presets.PRESETS, of the other files.
    """

    preset: str = "paper"
    backbone: str | None = None
    weights: str | None = None
    normalization: str = "imagenet"
    diffusion: str = "paper"


@dataclass(frozen=True)
class Told:
    """What the settings say of the images.

    Args:
        foreground: value of dataset.foreground, as YAML.
        parts: value of dataset.train.parts.
        reader: further keys of dataset.image_reader.kwargs.
        textures: whether there are textures for the anomaly type dtd; else other types take its place.
        grey: whether all training images are grey.
        images: number of training images.
    """

    foreground: str = "none"
    parts: str | None = None
    reader: Mapping[str, Any] = field(default_factory=dict)
    textures: bool = True
    grey: bool = False
    images: int = 1000

    @property
    def reading(self) -> str:
        """The reader's keys as YAML, each after a comma."""
        return "".join(f", {key}: {value}" for key, value in self.reader.items())


def realnet_text(dataset: str, size: Sequence[int], told: Told, networks: Networks) -> str:
    """The text of realnet.yaml.

    Raises:
        RunError: the preset was changed so that a value has no place in it.
        UsageError: no structure is known for the backbone.
    """
    path = PRESETS / f"{networks.preset}.yaml"
    mean, std = NORMALIZATIONS[networks.normalization]
    text = path.read_text(encoding="utf-8")
    values = {
        r"\A# [^\n]*": f"# realnet.yaml of {dataset}: RealNet, one model per class ({{}} stands for the class)."
        f" Preset {networks.preset}.",
        r"data/parts/": f"data/{dataset}/",
        r"^  type: parts$": f"  type: {dataset}",
        r"^  input_size: [^\n]*": f"  input_size: [{size[0]}, {size[1]}]",
        # In proportion to the input: 16 at 256.
        r"avgpool_size: \[16, 16\]": f"avgpool_size: [{max(1, round(size[0] / 16))}, {max(1, round(size[1] / 16))}]",
        r"^  foreground: none$": f"  foreground: {told.foreground}  # {FOREGROUND_HINT}",
        r"color_mode: RGB": f"color_mode: RGB{told.reading}",
        r"^  pixel_mean: [^\n]*": f"  pixel_mean: {list(mean)}",
        r"^  pixel_std: [^\n]*": f"  pixel_std: {list(std)}",
    }
    if networks.backbone:
        lines = [
            yaml.safe_dump(b, default_flow_style=True, sort_keys=False, width=1000)
            for b in structure_of(networks.backbone)
        ]
        values |= {r"^structure:\n(  - [^\n]*\n)+": "structure:\n" + "".join(f"  - {line}" for line in lines)}
        values |= {r"backbone: \w+, weights": f"backbone: {networks.backbone}, weights"}
    if networks.weights:
        values |= {r"weights: auto\}": f"weights: {_quoted(networks.weights)}}}"}
    for pattern, value in values.items():
        text = _replaced(path, pattern, value, text)
    if told.parts is not None:
        text = _replaced(path, "^    parts: null", f"    parts: {_quoted(told.parts)}", text)
    return text if told.textures else _without_textures(text)


def unified_text(dataset: str, size: Sequence[int], told: Told, networks: Networks) -> str:
    """The text of realnet_unified.yaml: that of realnet.yaml with the images of all classes in one list.

    Raises: as realnet_text.
    """
    path = PRESETS / f"{networks.preset}.yaml"
    text = realnet_text(dataset, size, told, networks)
    command = f"python train_realnet.py --dataset {dataset} --config experiments/{dataset}/{UNIFIED_FILE}"
    values = {
        r"\A# [^\n]*": f"# {UNIFIED_FILE} of {dataset}: RealNet, one model for all classes. Preset {networks.preset}.\n"
        f"#     {command}",
        r"samples/train_\{\}": f"samples/train_{UNIFIED}",
        r"samples/test_\{\}": f"samples/test_{UNIFIED}",
        r"^  foreground: [^\n]*": "  foreground: none",  # one rule does not fit all classes
        r"^    sdas_dir: [^\n]*\n": "",
        **(PAPER_UNIFIED if networks.preset == "paper" else {}),
    }
    for pattern, value in values.items():
        text = _replaced(path, pattern, value, text)
    return text if told.textures else _without_textures(text)


def _quoted(value: str) -> str:
    return yaml.safe_dump(value, default_style='"', width=10**6).strip()


def _without_textures(text: str) -> str:
    """The text of a realnet.yaml with other anomaly types in place of dtd, if it has that one."""
    return re.sub(r"anomaly_types: \{[^}\n]*dtd:[^}\n]*\}", f"anomaly_types: {OF_GOOD_IMAGES}", text)


def settings_texts(
    dataset: str,
    classes: int,
    size: Sequence[int],
    told: Told | None = None,
    networks: Networks | None = None,
) -> dict[str, str]:
    """Texts of a data set's YAML files by file name, with its number of classes, paths and sizes.

    Args:
        classes: number of classes. One class needs neither a classifier nor a model for all classes.
        size: input size of RealNet.
        told: what the settings say of the images.
        networks: what the settings say of the networks.

    Raises:
        RunError: a template was changed so that a value has no place in it.
    """
    told, networks = told or Told(), networks or Networks()
    texts = {"realnet.yaml": realnet_text(dataset, size, told, networks)}
    if classes > 1:
        texts[UNIFIED_FILE] = unified_text(dataset, size, told, networks)
    height, width = diffusion_size(size)
    for name, keys in FILES.items():
        if classes == 1 and name == "classifier.yaml":
            continue
        values = {
            "DATASET": dataset,
            "IMAGES": IMAGES,
            "CLASSES": classes,
            "HEIGHT": height,
            "WIDTH": width,
            "COLOURS": "GRAY" if told.grey else "RGB",
            **diffusion_presets.values_of(networks.diffusion, (height, width), told.images),
        }
        path = TEMPLATES / name
        text = path.read_text(encoding="utf-8")
        for key in keys:
            text = _replaced(path, f"@{key}@", str(values[key]), text)
        if name == "sample.yaml" and classes == 1:
            section = r"^classifier:.*?(?=^TestSampler)"
            text = _replaced(path, section, "classifier: null  # one class\n", text)
        if name != "sample.yaml":
            # The diffusion model's validations draw grey images then, too.
            text = _replaced(path, "color_mode: RGB", f"color_mode: {values['COLOURS']}{told.reading}", text)
        left = re.search("@[A-Z_]+@", text)
        if left:
            raise RunError(f"{path}: {left[0]} is not a value that prepare_data.py knows; restore the file")
        texts[name] = text
    return texts


def _replaced(path: Path, pattern: str, value: str, text: str) -> str:
    text, count = re.subn(pattern, lambda _: value, text, flags=re.MULTILINE | re.DOTALL)
    if not count:
        raise RunError(f"{path}: {pattern} is missing; restore the file")
    return text
