"""Opening every picture once: which are unreadable, how large they are, and which are nearly the same."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from datasets.images import read_mask, read_picture, same_proportions
from datasets.lists import Sample
from preparation.folders import LEAK, NO_MASK, UNREADABLE, Finding
from utils.errors import UsageError

_THUMBNAIL, _FREQUENCIES = 64, 16
_NOISE = 8.0  # coefficients of an orthonormal 64 x 64 DCT of grey levels: a wave of 1/4 grey level
_USUAL = 6.0  # near-duplicates differ this much less than is usual
_CHUNK = 2048


@dataclass(frozen=True)
class Look:
    """What one reading of a picture tells.

    Args:
        size: (height, width), upright.
        fingerprint: (255,) float32, see `fingerprint`.
    """

    size: tuple[int, int]
    fingerprint: np.ndarray


def fingerprint(image: np.ndarray) -> np.ndarray:
    """Perceptual hash: signs of the lowest 16 x 16 DCT coefficients but the mean (after Zauner, 2010).

    Coefficients too small to survive noise and compression count as 0, and the vector has unit length (or is all 0 for
    a flat picture): 1 - a . b is twice the share of signs that differ.

    Args:
        image: (H,W,3) uint8.

    Returns:
        (255,) float32.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[:_FREQUENCIES, :_FREQUENCIES].ravel()[1:]
    signs = np.where(np.abs(lowest) > _NOISE, np.sign(lowest), 0).astype(np.float32)
    return signs / max(float(np.linalg.norm(signs)), 1.0)


def inspect(root: Path, samples: Sequence[Sample]) -> tuple[dict[str, Look], list[Sample], list[Finding]]:
    """Decode all pictures and masks.

    Returns:
        Looks by file name; the samples that can be read, without masks that cannot serve; what was found.
    """
    looks, readable, findings = {}, [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda sample: _inspect_one(root, sample), samples)
        # disable=None: quiet where there is no terminal.
        for sample, look, found in tqdm(results, "reading pictures", len(samples), leave=False, disable=None):
            findings += found
            if look is not None:
                readable.append(sample)
                looks[sample.filename] = look
    return looks, readable, findings


def _inspect_one(root: Path, sample: Sample) -> tuple[Sample, Look | None, list[Finding]]:
    try:
        image = read_picture(root / sample.filename)
    except UsageError as error:
        return sample, None, [Finding(UNREADABLE, sample.filename, _reason(error, root / sample.filename))]
    size = image.shape[:2]
    problem = _mask_problem(root, sample, size)
    if problem is not None:
        sample = replace(sample, maskname=None)
    return sample, Look(size, fingerprint(image)), [problem] if problem else []


def _mask_problem(root: Path, sample: Sample, size: tuple[int, int]) -> Finding | None:
    """Why a picture's mask cannot serve, or None."""
    if sample.maskname is None:
        return None
    try:
        mask = read_mask(root / sample.maskname)
    except UsageError as error:
        return Finding(UNREADABLE, sample.maskname, f"mask {_reason(error, root / sample.maskname)}")
    # One of the same proportions is scaled when it is used, one of others belongs to another picture.
    if not same_proportions(mask.shape, size):
        (h, w), (height, width) = mask.shape, size
        text = f"mask of {w}x{h} pixels for a picture of {width}x{height}; it is left out"
        return Finding(NO_MASK, sample.maskname, text)
    if not mask.any():
        return Finding(NO_MASK, sample.maskname, "mask is empty, although the picture is defective; it is left out")
    return None


def _reason(error: UsageError, path: Path) -> str:
    """The message without the path that it starts with."""
    return str(error).removeprefix(str(path)).strip()


# ---- near-duplicates -------------------------------------------------------------------------------------------------


def near_duplicates(first: Sequence[Look], second: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) that show nearly the same picture.

    Their fingerprints differ at most a sixth as much as is usual between these pictures: parts that always lie alike
    have similar fingerprints without being the same part. Measured: photographs of magnetic tiles that are saved
    anew, scaled, brightened or noisier differ in 1 - 5 % of the signs, and those of different tiles in 22 - 50 %.
    """
    if not first or not second:
        return []
    a, b = (np.stack([look.fingerprint for look in looks]) for looks in (first, second))
    step_a, step_b = (-(-len(vectors) // 512) for vectors in (a, b))
    limit = np.median(1 - a[::step_a] @ b[::step_b].T) / _USUAL
    pairs = []
    for start in range(0, len(a), _CHUNK):
        rows, columns = np.nonzero(1 - a[start : start + _CHUNK] @ b.T <= max(limit, 1e-6))
        pairs += [(start + int(i), int(j)) for i, j in zip(rows, columns, strict=True)]
    return pairs


def duplicate_groups(looks: Sequence[Look]) -> list[list[int]]:
    """The indices in groups of near-duplicates, each group sorted, in the order of their first members."""
    parent = list(range(len(looks)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in near_duplicates(looks, looks):
        low, high = sorted((top(i), top(j)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(looks)):
        groups.setdefault(top(i), []).append(i)
    return list(groups.values())


def split_good(
    samples: Sequence[Sample], looks: dict[str, Look], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Good pictures of one class into training and test ones; near-duplicates stay on one side where that is possible.

    Args:
        fraction: of the pictures that are to test, 0 .. 1; at least one stays on each side where there are two.
    """
    rng = np.random.default_rng(seed)
    wanted = min(max(round(fraction * len(samples)), 1), len(samples) - 1) if fraction > 0 else 0
    groups = duplicate_groups([looks[sample.filename] for sample in samples])
    if max(map(len, groups)) > len(samples) / 2:
        # Nearly everything looks alike; report_leaks will tell.
        groups = [[i] for i in range(len(samples))]
    test: set[int] = set()
    for g in rng.permutation(len(groups)):
        if len(test) + len(groups[g]) <= wanted:
            test.update(groups[g])
    chosen = [sample for i, sample in enumerate(samples) if i in test]
    return [sample for i, sample in enumerate(samples) if i not in test], chosen


def report_leaks(train: Iterable[Sample], test: Iterable[Sample], looks: dict[str, Look]) -> list[Finding]:
    """Test pictures that nearly equal a training picture of their class."""
    train, test = list(train), list(test)
    findings = []
    for name in sorted({sample.clsname for sample in train}):
        ours = [sample for sample in train if sample.clsname == name]
        theirs = [sample for sample in test if sample.clsname == name]
        seen: dict[int, list[int]] = {}
        for i, j in near_duplicates([looks[s.filename] for s in ours], [looks[s.filename] for s in theirs]):
            seen.setdefault(j, []).append(i)
        for j, twins in seen.items():
            more = f" and {len(twins) - 1} more" if len(twins) > 1 else ""
            text = f"is nearly the same as the training picture {ours[twins[0]].filename}{more}"
            findings.append(Finding(LEAK, theirs[j].filename, text))
    return findings
