"""Finds near-duplicate images, and splits good images so that near-duplicates and views of a part stay on one side.

Two images are near-duplicates if they come from one photograph: saved again, scaled, brightened, made noisier, or
shifted a little. Different parts that lie the same way are not. docs/robustness.md has what was measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np

from datasets.lists import Sample

_SIDE = 96  # of the thumbnail, in pixels
_FREQUENCIES = 16
_SHIFT = 3  # pixels of the thumbnail by which near-duplicates may be shifted
_NOISE = 2.0  # local contrast that counts as structure, in percent of the mean brightness

_TIMES_CLOSER = 0.85  # near-duplicates are closer than this, times what is typical of neighbours
_NEIGHBOURS = 10  # A group of duplicates is expected to be smaller.
_FARTHEST = 0.6  # between near-duplicates
_FEW, _FARTHEST_OF_FEW = 8, 0.35  # So few images do not show what is typical.
_SAME = 0.02  # Images closer than this are near-duplicates, however similar all are.
_UNRELATED = 0.9  # distance of details that have nothing in common, but for chance
_COMPARED = 30_000  # pairs, beyond which each image is compared with its nearest in layout only
_SAMPLED = 150  # images that show what is typical
_CHUNK = 2048


class Fingerprint(NamedTuple):
    """What is kept of an image to find near-duplicates (10 KB).

    Args:
        layout: (256,) float32 of unit length: the lowest 16 x 16 DCT coefficients (after Zauner, 2010) without
            the mean and the two gradients, which illumination changes.
        detail: (96,96) uint8: high-pass, with its local contrast normalised; 128 is none. An outline then weighs no
            more than the grain inside of it, which tells apart parts of the same shape.
    """

    layout: np.ndarray
    detail: np.ndarray


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Fingerprint of an image (H,W,3) uint8, the same for any size and brightness."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    small *= 100 / max(float(small.mean()), 10.0)
    layout = cv2.dct(small)[:_FREQUENCIES, :_FREQUENCIES].copy()
    layout[0, :2] = layout[1, 0] = 0
    layout /= max(float(np.linalg.norm(layout)), 1.0)
    fine = small - cv2.GaussianBlur(small, (0, 0), 1.5)
    fine /= np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 2) + _NOISE**2)
    return Fingerprint(layout.ravel(), np.clip(128 + 40 * fine, 0, 255).astype(np.uint8))


def near_duplicates(first: Sequence[Fingerprint], second: Sequence[Fingerprint] | None = None) -> list[tuple[int, int]]:
    """Sorted pairs (index in first, index in second) of fingerprints whose images are nearly the same.

    Near-duplicates are closer than different images of the class come to each other. With many images, each is compared
    with those nearest in layout only.

    Args:
        second: None for the pairs i < j within the first.
    """
    within, second = second is None, first if second is None else second
    if not first or not second:
        return []
    a, b = (np.stack([f.layout for f in side]) for side in (first, second))
    limits = _limits(first, a, second, b, within)
    nearest = min(max(_COMPARED // len(second), _NEIGHBOURS), len(first))
    candidates = set()
    for start in range(0, len(second), _CHUNK):
        apart = 1 - b[start : start + _CHUNK] @ a.T
        if within:
            apart[np.arange(len(apart)), start + np.arange(len(apart))] = np.inf
        columns = np.argpartition(apart, nearest - 1, axis=1)[:, :nearest]
        close = np.take_along_axis(apart, columns, axis=1) <= _FARTHEST
        rows = np.nonzero(close)[0]
        pairs = zip(columns[close].tolist(), (start + rows).tolist(), strict=True)
        candidates.update((min(pair), max(pair)) if within else pair for pair in pairs)
    return [(i, j) for i, j in sorted(candidates) if limits.allow(1 - a[i] @ b[j], _distance(first[i], second[j]))]


class _Limits(NamedTuple):
    """Up to where images of a class are near-duplicates.

    Args:
        both: largest sum of the distances in layout and in detail. The layout counts because the details of a regular
            structure, such as a grid, agree wherever two images are in step.
        layout: images with a layout as close as this may differ in detail as far as _FARTHEST.
    """

    both: float
    layout: float = 0.0

    def allow(self, layout: float, detail: float) -> bool:
        return layout + detail <= (_FARTHEST if layout <= self.layout else self.both)


def _limits(
    first: Sequence[Fingerprint], a: np.ndarray, second: Sequence[Fingerprint], b: np.ndarray, within: bool
) -> _Limits:
    """The limits that follow from the distances of a sample of images to their nearest neighbours.

    Different images that lie alike are about equally far from each other, so the limit is just below. If many images
    have duplicates, the nearest neighbours are those; the median and the tenth nearest keep the limit up.
    """
    if len(first) < _FEW:
        return _Limits(_FARTHEST_OF_FEW)
    nearest, tenth, layouts = [], [], []
    for j in range(0, len(second), -(-len(second) // _SAMPLED)):
        apart = 1 - a @ b[j]
        if within:
            apart[j] = np.inf
        order = np.argsort(apart)[: 2 * _NEIGHBOURS]
        distances = sorted(_distance(first[i], second[j]) for i in order if apart[i] < np.inf)
        last = min(_NEIGHBOURS, len(first) // 2) - 1
        nearest.append(distances[0])
        tenth.append(distances[last])
        layouts.append(apart[order[last]])
    usual, far = float(np.median(nearest)), float(np.median(tenth))
    typical = max(float(np.quantile(nearest, 0.2)), 0.7 * usual, far / 4)
    # Textures: what lies alike in spite of unrelated details comes from one part, at another exposure for instance.
    layout = float(np.median(layouts)) / 6 if far >= _UNRELATED else 0.0
    return _Limits(min(max(_TIMES_CLOSER * typical, _SAME), _FARTHEST), layout)


def _distance(first: Fingerprint, second: Fingerprint) -> float:
    """1 - the correlation of the details at the best shift: 0 for the same image, about 1 for unrelated ones."""
    inner = first.detail[_SHIFT:-_SHIFT, _SHIFT:-_SHIFT].astype(np.float32) - 128
    matches = cv2.matchTemplate(second.detail.astype(np.float32) - 128, inner, cv2.TM_CCORR_NORMED)
    y, x = np.unravel_index(matches.argmax(), matches.shape)
    best = peak = float(matches[y, x])
    for line, at in ((matches[:, x], y), (matches[y], x)):
        # A parabola through the neighbours: most shifts are no whole pixels of the thumbnail.
        if 0 < at < 2 * _SHIFT and line[at - 1] + line[at + 1] < 2 * peak:
            before, after = float(line[at - 1]), float(line[at + 1])
            best += (after - before) ** 2 / (8 * (2 * peak - before - after))
    return max(1 - best, 0.0)


def duplicate_groups(fingerprints: Sequence[Fingerprint], parts: Sequence[str | None] | None = None) -> list[list[int]]:
    """Groups of near-duplicates as sorted lists of indices, ordered by their first members.

    Args:
        parts: the part that each image shows, or None; images of one part are in one group.
    """
    parts = parts or [None] * len(fingerprints)
    return _joined(len(fingerprints), [*near_duplicates(fingerprints), *_same_part(parts)])


def _same_part(parts: Sequence[str | None]) -> list[tuple[int, int]]:
    """Each image that shows a named part, paired with the first that shows it."""
    first: dict[str, int] = {}
    return [(first.setdefault(part, i), i) for i, part in enumerate(parts) if part is not None]


def _joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The groups of 0 .. count - 1 that pairs connect."""
    parent = list(range(count))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        low, high = sorted((root_of(i), root_of(j)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root_of(i), []).append(i)
    return list(groups.values())


def split_good(
    samples: Sequence[Sample],
    fingerprints: Mapping[str, Fingerprint],
    fraction: float,
    seed: int,
    at_least: int = 1,
    parts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Sample], list[Sample]]:
    """Split the good images of one class in two; images of one part, and near-duplicates, stay on one side if possible.

    Args:
        fingerprints: by file name.
        fraction: share of images to hold out, 0 .. 1; unless it is 0, the aim is at least one image on each side.
        at_least: the smallest number of images to hold out, unless that is more than half of them.
        parts: the part that an image shows, by file name, as far as it is known.

    Returns:
        The rest, to train on; the images held out. Both in the order of the samples.
    """
    rng = np.random.default_rng(seed)
    wanted = 0
    if fraction > 0:
        wanted = max(round(fraction * len(samples)), min(at_least, len(samples) // 2), 1)
        wanted = min(wanted, len(samples) - 1)
    shown = [parts.get(sample.filename) for sample in samples]
    groups = duplicate_groups([fingerprints[sample.filename] for sample in samples], shown)
    if max(map(len, groups)) > len(samples) / 2:
        # Most images look the same, so grouping by that is no use; the preparation's findings list the pairs.
        groups = _joined(len(samples), _same_part(shown))
    held_out: set[int] = set()
    for g in rng.permutation(len(groups)):
        if len(held_out) + len(groups[g]) <= wanted:
            held_out.update(groups[g])
    if wanted and not held_out and len(groups) > 1:
        # Every group is larger than wanted: better too many images than none.
        held_out.update(min(groups, key=len))
    chosen = [sample for i, sample in enumerate(samples) if i in held_out]
    return [sample for i, sample in enumerate(samples) if i not in held_out], chosen
