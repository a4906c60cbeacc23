"""Finds near-duplicate images, and splits good images so that near-duplicates stay on one side."""

from collections.abc import Sequence

import cv2
import numpy as np

from datasets.lists import Sample

_THUMBNAIL, _FREQUENCIES = 64, 16
_NOISE = 8.0  # coefficient of an orthonormal 64 x 64 DCT: a wave of 1/4 grey level
_TIMES_CLOSER = 6.0  # near-duplicates differ at least this many times less than the median pair
_CHUNK = 2048


def fingerprint(image: np.ndarray) -> np.ndarray:
    """Perceptual hash: signs of the lowest 16 x 16 DCT coefficients, without the mean (after Zauner, 2010).

    Coefficients whose sign noise or compression may flip count as 0. The vector has unit length (all 0 for a flat
    image), so 1 - a . b is twice the share of signs that differ.

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


def near_duplicates(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) of fingerprints whose images are nearly the same.

    Their fingerprints differ at most a sixth as much as those of the median pair. The limit is relative because parts
    that always lie the same way have similar fingerprints. Measured on magnetic tiles: photographs that are saved
    again, scaled, brightened or made noisier differ in 1 - 5 % of the signs; those of different tiles in 22 - 50 %.
    """
    if not first or not second:
        return []
    a, b = np.stack(first), np.stack(second)
    step_a, step_b = (-(-len(vectors) // 512) for vectors in (a, b))
    limit = np.median(1 - a[::step_a] @ b[::step_b].T) / _TIMES_CLOSER
    pairs = []
    for start in range(0, len(a), _CHUNK):
        rows, columns = np.nonzero(1 - a[start : start + _CHUNK] @ b.T <= max(limit, 1e-6))
        pairs += [(start + int(i), int(j)) for i, j in zip(rows, columns, strict=True)]
    return pairs


def duplicate_groups(fingerprints: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups of near-duplicates as sorted lists of indices, ordered by their first members."""
    parent = list(range(len(fingerprints)))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in near_duplicates(fingerprints, fingerprints):
        low, high = sorted((root_of(i), root_of(j)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(fingerprints)):
        groups.setdefault(root_of(i), []).append(i)
    return list(groups.values())


def split_good(
    samples: Sequence[Sample], fingerprints: dict[str, np.ndarray], fraction: float, seed: int, at_least: int = 1
) -> tuple[list[Sample], list[Sample]]:
    """Split the good images of one class into training and test; near-duplicates stay on one side if possible.

    Args:
        fingerprints: by file name.
        fraction: share of test images, 0 .. 1; unless it is 0, the aim is at least one image on each side.
    """
    rng = np.random.default_rng(seed)
    wanted = min(max(round(fraction * len(samples)), at_least), len(samples) // 2) if fraction > 0 else 0
    groups = duplicate_groups([fingerprints[sample.filename] for sample in samples])
    if max(map(len, groups)) > len(samples) / 2:
        # Most images look the same, so grouping them is no use; report_leaks lists the pairs.
        groups = [[i] for i in range(len(samples))]
    test: set[int] = set()
    for g in rng.permutation(len(groups)):
        if len(test) + len(groups[g]) <= wanted:
            test.update(groups[g])
    if wanted and not test and len(groups) > 1:
        # Every group is larger than wanted: better too many test images than none.
        test.update(min(groups, key=len))
    chosen = [sample for i, sample in enumerate(samples) if i in test]
    return [sample for i, sample in enumerate(samples) if i not in test], chosen
