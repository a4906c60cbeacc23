"""Opens every image once, to find sizes, unreadable files, and masks that do not fit."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.images import read_image, read_mask, same_aspect_ratio
from datasets.lists import Sample
from preparation.duplicates import fingerprint
from preparation.findings import NO_MASK, UNREADABLE, Finding
from utils.errors import UsageError


@dataclass(frozen=True)
class ImageInfo:
    """What inspection measures on an image.

    Args:
        size: (height, width) of the upright image.
        fingerprint: (255,) float32, see duplicates.fingerprint.
    """

    size: tuple[int, int]
    fingerprint: np.ndarray


def inspect(root: Path, samples: Sequence[Sample]) -> tuple[dict[str, ImageInfo], list[Sample], list[Finding]]:
    """Decode all images and masks.

    Returns:
        ImageInfo by file name; the readable samples, without unusable masks; findings.
    """
    infos, readable, findings = {}, [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda sample: _inspect_one(root, sample), samples)
        # disable=None hides the bar if there is no terminal.
        for sample, info, problems in tqdm(results, "reading images", len(samples), leave=False, disable=None):
            findings += problems
            if info is not None:
                readable.append(sample)
                infos[sample.filename] = info
    return infos, readable, findings


def _inspect_one(root: Path, sample: Sample) -> tuple[Sample, ImageInfo | None, list[Finding]]:
    try:
        image = read_image(root / sample.filename)
    except UsageError as error:
        return sample, None, [Finding(UNREADABLE, sample.filename, _reason(error, root / sample.filename))]
    size = image.shape[:2]
    problem = _mask_problem(root, sample, size)
    if problem is not None:
        sample = replace(sample, maskname=None)
    return sample, ImageInfo(size, fingerprint(image)), [problem] if problem else []


def _mask_problem(root: Path, sample: Sample, size: tuple[int, int]) -> Finding | None:
    """Why an image's mask cannot be used, or None."""
    if sample.maskname is None:
        return None
    try:
        mask = read_mask(root / sample.maskname)
    except UsageError as error:
        return Finding(UNREADABLE, sample.maskname, f"mask {_reason(error, root / sample.maskname)}")
    # A mask with the image's aspect ratio is scaled when used; with a different one, it belongs to another image.
    if not same_aspect_ratio(mask.shape, size):
        (h, w), (height, width) = mask.shape, size
        text = f"mask is {w}x{h} pixels, but the image is {width}x{height}; the mask is ignored"
        return Finding(NO_MASK, sample.maskname, text)
    if not mask.any():
        return Finding(NO_MASK, sample.maskname, "mask is empty although the image is defective; the mask is ignored")
    return None


def _reason(error: UsageError, path: Path) -> str:
    """The error's message without the leading path."""
    return str(error).removeprefix(str(path)).strip()
