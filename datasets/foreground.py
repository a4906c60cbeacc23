"""Foreground masks: where in an image a synthetic anomaly may lie."""

import dataclasses
import logging
from collections.abc import Callable, Iterable

import cv2
import numpy as np

from datasets.catalog import CATALOG, ForegroundRule, find
from utils.config import did_you_mean, shortened
from utils.errors import UsageError

log = logging.getLogger("realnet")

_THRESHOLDS = {"otsu": cv2.THRESH_OTSU, "triangle": cv2.THRESH_TRIANGLE}
FIELDS = tuple(field.name for field in dataclasses.fields(ForegroundRule))
MOST_SIDE = 1000  # of the squares of closing and opening, in pixels
_CHANNELS = {"red": 0, "green": 1, "blue": 2}


def foreground_mask(image: np.ndarray, dataset: str, class_name: str) -> np.ndarray:
    """Mask of the object in an image, by the rule of its data set and class (docs/method.md, section 2.3).

    Args:
        image: (H,W,3) uint8 RGB, already resized.
        dataset: name or type of a benchmark; for any other, the whole image is foreground.
        class_name: class of the image.

    Returns:
        (H,W) uint8 in {0, 1}.

    Example:
        >>> image = np.full((64, 64, 3), 255, np.uint8)
        >>> image[16:48, 16:48] = 40
        >>> int(foreground_mask(image, "MVTec-AD", "bottle").sum())  # darker than Otsu's threshold
        1024
    """
    info = find(dataset)
    return apply_rule(image, info.foreground.get(class_name) if info else None)


def apply_rule(image: np.ndarray, rule: ForegroundRule | None) -> np.ndarray:
    """Foreground mask of an (H,W,3) uint8 RGB image: (H,W) uint8 in {0, 1}, all ones without a rule."""
    if rule is None:
        return np.ones(image.shape[:2], np.uint8)
    if rule.channel == "gray":
        channel = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        channel = np.ascontiguousarray(image[..., _CHANNELS[rule.channel]])
    direction = cv2.THRESH_BINARY_INV if rule.invert else cv2.THRESH_BINARY
    method = _THRESHOLDS.get(rule.threshold, 0)
    value = 0 if method else int(rule.threshold)
    mask = cv2.threshold(channel, value, 1, direction | method)[1]
    for steps, side in (((cv2.dilate, cv2.erode), rule.close), ((cv2.erode, cv2.dilate), rule.open)):
        if side:
            # Mirror the square in the second step: with an even side, morphologyEx would shift the mask.
            square, anchor = np.ones((side, side), np.uint8), side // 2
            mask = steps[0](mask, square, anchor=(anchor, anchor))
            mask = steps[1](mask, square, anchor=(side - 1 - anchor, side - 1 - anchor))
    return mask


def rule_for(
    setting: str | dict | None, dataset_type: str, class_name: str, images: Callable[[], Iterable[np.ndarray]]
) -> ForegroundRule | None:
    """The foreground rule that the setting `dataset.foreground` selects.

    Args:
        setting: None for the catalog's rule of dataset.type's class; "none"; "auto"; any rule of the catalog as
            "<data set>/<class>" or "<class>"; or a mapping {channel, threshold, invert, close, open}.
        images: returns some training images (H,W,3) uint8; called for "auto" only.

    Raises:
        UsageError: no such rule.
    """
    if setting is None:
        info = find(dataset_type)
        return info.foreground.get(class_name) if info else None
    if setting == "none":
        return None
    if setting == "auto":
        return auto_rule(images(), class_name)
    if isinstance(setting, dict):
        return _rule_from(setting)
    dataset, _, name = setting.rpartition("/") if isinstance(setting, str) else ("", "", "")
    named = [find(dataset)] if dataset else list(CATALOG.values())
    info = next((info for info in named if info is not None and name in info.classes), None)
    if info is None:
        raise UsageError(
            f"dataset.foreground: {shortened(setting)} is not none, auto, a mapping or a rule such as MVTec-AD/bottle"
        )
    return info.foreground.get(name)


def _rule_from(setting: dict) -> ForegroundRule:
    for key in setting:
        if key not in FIELDS:
            hint = did_you_mean(key, FIELDS) or f"; known are {', '.join(FIELDS)}"
            raise UsageError(f"dataset.foreground.{str(key)[:80]} is not a setting{hint}")
    rule = ForegroundRule(**setting)
    for name in ("close", "open"):
        side = getattr(rule, name)
        if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side <= MOST_SIDE:
            raise UsageError(
                f"dataset.foreground.{name}: {shortened(side)} is not a number of pixels, 0 .. {MOST_SIDE}"
            )
    if not isinstance(rule.invert, bool):
        raise UsageError(f"dataset.foreground.invert: {shortened(rule.invert)} is not True or False")
    if not isinstance(rule.channel, str) or not isinstance(rule.threshold, (str, int)):
        raise UsageError("dataset.foreground: channel is a text, and threshold a text or a number")
    if rule.channel != "gray" and rule.channel not in _CHANNELS:
        raise UsageError(f"dataset.foreground.channel: {rule.channel!r} is not gray, red, green or blue")
    number = isinstance(rule.threshold, int) and not isinstance(rule.threshold, bool) and 0 <= rule.threshold <= 255
    if rule.threshold not in _THRESHOLDS and not number:
        raise UsageError(f"dataset.foreground.threshold: {shortened(rule.threshold)} is not otsu, triangle or 0 .. 255")
    return rule


def auto_rule(images: Iterable[np.ndarray], class_name: str) -> ForegroundRule | None:
    """The side of Otsu's threshold that the image borders are not on, or None if that is unstable.

    Unstable means that the side differs between images, that borders are not clearly on one side, or that the object
    covers almost nothing or almost everything, or varies widely in area.
    """
    bright_border, mixed_border, areas = [], [], []
    for image in images:
        bright = apply_rule(image, ForegroundRule())
        border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]]).mean()
        bright_border.append(border > 0.5)
        mixed_border.append(0.15 < border < 0.85)
        area = apply_rule(image, ForegroundRule(invert=bool(border > 0.5), close=6, open=6)).mean()
        areas.append(area)
    agreement = max(np.mean(bright_border), 1 - np.mean(bright_border))
    area, spread = float(np.median(areas)), float(np.std(areas))
    if agreement < 0.95 or np.mean(mixed_border) > 0.2 or not 0.02 < area < 0.9 or spread > 0.5 * area:
        log.info("%s: foreground auto is unstable over the training images; the whole image is used", class_name)
        return None
    invert = bool(np.mean(bright_border) > 0.5)
    side = "darker" if invert else "brighter"
    log.info("%s: foreground auto takes pixels %s than the border (%.0f%% of the image)", class_name, side, 100 * area)
    return ForegroundRule(invert=invert, close=6, open=6)
