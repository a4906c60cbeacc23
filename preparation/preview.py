"""Contact sheets of what training will see: masks, foregrounds and synthetic anomalies."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from easydict import EasyDict

from datasets.build import build_realnet_test_set, build_realnet_train_set
from datasets.catalog import ForegroundRule
from datasets.images import list_images
from datasets.lists import read_list
from datasets.realnet import RealNetTestSet, RealNetTrainSet
from utils.pictures import contact_sheet, outline, spread, thumbnail

log = logging.getLogger("realnet")

COLUMNS, ANOMALIES, MAX_DRAWS = 8, 16, 64
CELL = 192
_OUTLINE = (255, 40, 40)
# Not white: an all-ones mask would be invisible on the white sheet.
_MASK_GREY = np.uint8(215)


def preview_sheet(config: EasyDict, class_name: str, seed: int) -> np.ndarray:
    """One sheet for a class: training images, foregrounds, test images with masks, and 16 synthetic anomalies.

    Args:
        config: `dataset` section of a realnet.yaml.

    Returns:
        (H,W,3) uint8.
    """
    config, source = _with_sources(config, class_name)
    train_set = build_realnet_train_set(config, class_name, seed)
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
    images, masks, empty = _anomalies(train_set)
    for start in range(0, len(images), COLUMNS):
        caption = f"synthetic anomalies ({source}; {100 * empty:.0f}% of the masks were empty)" if start == 0 else ""
        rows.append((caption, images[start : start + COLUMNS]))
        rows.append(("", masks[start : start + COLUMNS]))
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


def _with_sources(config: EasyDict, class_name: str) -> tuple[EasyDict, str]:
    """The settings with only those anomaly types whose source images exist, and a caption that names these.

    If none exist, good images of the class serve as sources, so that at least the masks are as in training.
    """
    config = copy.deepcopy(config)
    train = config.train
    folders = {"sdas": (train.sdas_dir or "").replace("{}", class_name), "dtd": train.dtd_dir or ""}
    wanted = [name for name, probability in train.anomaly_types.items() if name != "normal" and probability > 0]
    available = [name for name in wanted if folders[name] and list_images(folders[name])]
    for name in set(wanted) - set(available):
        log.info("%s: no %s images in %s yet", class_name, name, folders[name] or "(not set)")
    if available:
        train.anomaly_types = {name: 1 / len(available) for name in available}
        return config, "from " + " and ".join(available)
    reader = config.image_reader.kwargs
    root = reader.image_dir
    first = read_list(train.meta_file.replace("{}", class_name), root, follow_links=reader.follow_links)[0]
    train.anomaly_types = {"dtd": 1.0}
    train.dtd_dir = str((Path(root) / first.filename).parent)
    return config, f"no {' or '.join(wanted)} images yet: training images used instead"


def _outlined(test_set: RealNetTestSet, index: int) -> np.ndarray:
    image, sample = test_set.read(index).copy(), test_set.samples[index]
    if sample.maskname is not None:
        outline(image, test_set.mask(index) > 0, _OUTLINE)
    return image


def _anomalies(train_set: RealNetTrainSet) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Synthetic anomalies and their masks, and the share of draws whose mask was empty."""
    anomalous, images, masks, draws = train_set.anomalous_only(), [], [], 0
    preprocessing = train_set.preprocessing
    while len(images) < ANOMALIES and draws < MAX_DRAWS:
        sample = anomalous[draws // len(anomalous), draws % len(anomalous)]
        draws += 1
        if sample["changed"]:
            images += list(preprocessing.pictures(sample["image"][None].numpy()))
            masks.append(sample["mask"][0].numpy().astype(np.uint8) * _MASK_GREY)
    return images, masks, 1 - len(images) / draws
