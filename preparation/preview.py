"""Contact sheets of what training will see: masks, foregrounds and synthetic anomalies."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from easydict import EasyDict

from datasets.build import build_realnet_test_set, build_realnet_train_set
from datasets.catalog import ForegroundRule
from datasets.edits import TABLE
from datasets.images import list_images
from datasets.local_anomalies import LOCAL
from datasets.realnet import RealNetTestSet, RealNetTrainSet
from utils.choices import EDIT
from utils.pictures import contact_sheet, outline, spread, thumbnail

log = logging.getLogger("realnet")

COLUMNS, MAX_DRAWS = 8, 32
CELL = 192
_OUTLINE = (255, 40, 40)
DESCRIPTIONS = {
    "cutpaste": "patches and scars of other good images",
    "self": "the image's own parts, moved",
    "noise": "blurred, sharpened, brighter and darker shapes",
    "sdas": "images of the diffusion model",
    "dtd": "textures",
    EDIT: "good images that the diffusion model has changed",
}
# Not white: an all-ones mask would be invisible on the white sheet.
_MASK_GREY = np.uint8(215)


def preview_sheet(config: EasyDict, class_name: str, seed: int) -> np.ndarray:
    """One sheet for a class: training images, foregrounds, test images with masks, and each type of anomaly.

    Args:
        config: `dataset` section of a realnet.yaml.

    Returns:
        (H,W,3) uint8.
    """
    train_set = build_realnet_train_set(_with_available_types(config, class_name), class_name, seed)
    test_set = build_realnet_test_set(config, class_name)
    count = min(COLUMNS, len(train_set))
    indices = np.linspace(0, len(train_set) - 1, count).round().astype(int).tolist()
    shown = [train_set.read(index) for index in indices]
    rows = [("training images", [image for image, _ in shown])]
    rule = rules_text([train_set.rules[train_set.samples[index].clsname] for index in indices])
    rows.append((f"foreground: {rule}", [mask * _MASK_GREY for _, mask in shown]))
    defective = [i for i, sample in enumerate(test_set.samples) if sample.label]
    chosen = [defective[k] for k in spread([test_set.samples[i].defect_type for i in defective], COLUMNS)]
    if chosen:
        masked = sum(test_set.samples[i].maskname is not None for i in chosen)
        outlined = f"{masked} of these {len(chosen)} with a mask (outlined)" if masked else "without masks"
        caption = f"defective test images, {outlined}"
        rows.append((caption, [_outlined(test_set, i) for i in chosen]))
    blank = np.full_like(shown[0][0], 255)
    for name in train_set.synthesis.anomaly_types:
        share = config.train.anomaly_types.get(name, 0)
        images, masks, normal = _anomalies(train_set.of_types({name: 1.0}), indices)
        trained = f"{100 * share:.0f}% of the training" if share else "not trained on"
        rows.append((f"{name}: {DESCRIPTIONS[name]} ({trained}; {100 * normal:.0f}% stayed normal)", images or [blank]))
        rows.append(("", masks or [blank]))
    return contact_sheet([(caption, [thumbnail(image, CELL) for image in row]) for caption, row in rows])


def rules_text(rules: Sequence[ForegroundRule | None]) -> str:
    """The distinct foreground rules in words."""
    texts = []
    for rule in rules:
        if rule is None:
            text = "the whole image"
        else:
            side = "<=" if rule.invert else ">"
            text = f"{rule.channel} {side} {rule.threshold}, close {rule.close}, open {rule.open}"
        if text not in texts:
            texts.append(text)
    return "; ".join(texts)


def _with_available_types(config: EasyDict, class_name: str) -> EasyDict:
    """The settings with every anomaly type that there are images for, equally likely."""
    config = copy.deepcopy(config)
    train = config.train
    folders = {"sdas": (train.sdas_dir or "").replace("{}", class_name), "dtd": train.dtd_dir or ""}
    found = [name for name, folder in folders.items() if folder and list_images(folder)]
    folders[EDIT] = (train.edit_dir or "").replace("{}", class_name)
    if folders[EDIT] and (Path(folders[EDIT]) / TABLE).is_file():
        found.append(EDIT)
    for name in folders:
        if name not in found and train.anomaly_types.get(name):
            log.info("%s: no %s images in %s yet", class_name, name, folders[name] or "(not set)")
    available = [*LOCAL, *found]
    train.anomaly_types = {name: 1 / len(available) for name in available}
    return config


def _outlined(test_set: RealNetTestSet, index: int) -> np.ndarray:
    image, sample = test_set.read(index).copy(), test_set.samples[index]
    if sample.maskname is not None:
        outline(image, test_set.mask(index) > 0, _OUTLINE)
    return image


def _anomalies(train_set: RealNetTrainSet, indices: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Synthetic anomalies in these images and their masks, and the share of draws that left an image normal."""
    images, masks, draws = [], [], 0
    preprocessing = train_set.preprocessing
    while len(images) < COLUMNS and draws < MAX_DRAWS:
        sample = train_set[draws // len(indices), indices[draws % len(indices)]]
        draws += 1
        if sample["changed"]:
            images += list(preprocessing.pictures(sample["image"][None].numpy()))
            masks.append(sample["mask"][0].numpy().astype(np.uint8) * _MASK_GREY)
    return images, masks, 1 - len(images) / draws
