"""Near-duplicates are found, different parts that lie alike are not taken for them, and splits keep them together."""

import cv2
import numpy as np
import pytest

from datasets.lists import Sample
from datasets.splits import Fingerprint, duplicate_groups, fingerprint, near_duplicates, split_good

SIDE = 192


def part(seed: int, turned: float = 4.0) -> np.ndarray:
    """A small grey grained part on an even, unevenly lit background, (SIDE, SIDE, 3) uint8 with sensor noise."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:SIDE, :SIDE] - SIDE / 2).astype(np.float32)
    shape = cv2.GaussianBlur(((x / 1.4) ** 2 + y**2 < 14**2).astype(np.float32), (0, 0), 0.8)
    grain = cv2.GaussianBlur(rng.normal(0, 30, (SIDE, SIDE)).astype(np.float32), (0, 0), 1.2)
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-turned, turned), 1)
    turn[:, 2] += rng.uniform(-3, 3, 2)
    shape, grain = (cv2.warpAffine(plane, turn, (SIDE, SIDE)) for plane in (shape, grain))
    light = 170 + rng.normal(0, 4) + (rng.normal(0, 6) * x + rng.normal(0, 6) * y) / SIDE
    image = light * (1 - shape) + (110 + grain) * shape + rng.normal(0, 2, (SIDE, SIDE))
    return np.repeat(clipped(image)[..., None], 3, axis=2)


def clipped(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


CHANGES = {
    "saved at 60": lambda image: saved(image, 60),
    "saved at 95": lambda image: saved(image, 95),
    "made smaller": lambda image: scaled(image, 0.7),
    "made larger": lambda image: scaled(image, 2.0),
    "brighter": lambda image: clipped(image * 1.2),
    "darker": lambda image: clipped(image * 0.7),
    "noisier": lambda image: clipped(image + np.random.default_rng(0).normal(0, 3, image.shape[:2])[..., None]),
    "shifted": lambda image: np.roll(image, (1, 2), (0, 1)),
}


@pytest.fixture(scope="module")
def parts() -> list[Fingerprint]:
    return [fingerprint(part(seed)) for seed in range(60)]


def test_different_parts_that_lie_alike_are_no_near_duplicates(parts):
    assert near_duplicates(parts[:30], parts[30:]) == []
    assert duplicate_groups(parts) == [[i] for i in range(60)]


def test_different_parts_turned_anyhow_are_no_near_duplicates():
    turned = [fingerprint(part(seed, turned=180)) for seed in range(60)]
    assert near_duplicates(turned) == []


@pytest.mark.parametrize("change", CHANGES)
def test_copies_among_parts_that_lie_alike_are_found(change, parts):
    copies = [fingerprint(CHANGES[change](part(seed))) for seed in (3, 11, 27)]
    assert near_duplicates(parts[:30], parts[30:] + copies) == [(3, 30), (11, 31), (27, 32)]


def test_copies_are_found_where_every_image_has_one(parts):
    copies = [fingerprint(saved(part(seed), 95)) for seed in range(30)]
    assert duplicate_groups(parts[:30] + copies) == [[i, 30 + i] for i in range(30)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_copies_are_found_among_a_few_images(count, parts):
    copy = fingerprint(saved(part(0), 80))
    assert near_duplicates([*parts[:count], copy]) == [(0, count)]
    assert near_duplicates(parts[:count]) == []
    assert near_duplicates(parts[:count], []) == []


def test_images_without_structure_are_no_near_duplicates():
    flat = [fingerprint(np.full((40, 60, 3), grey, np.uint8)) for grey in (0, 90, 255)]
    assert near_duplicates(flat) == []


@pytest.mark.parametrize(("groups", "held_out"), [([4, 3, 4], 3), ([2, 2], 2), ([3], 1), ([1], 0), ([1] * 5, 1)])
def test_both_sides_of_a_split_get_images_where_possible(groups, held_out, parts):
    samples, fingerprints = [], {}
    for g, count in enumerate(groups):
        for i in range(count):
            samples.append(Sample(f"{g}/{i}.png", 0, "parts"))
            fingerprints[samples[-1].filename] = parts[g]
    for seed in range(5):
        train, test = split_good(samples, fingerprints, 0.1, seed)
        assert (len(train), len(test)) == (len(samples) - held_out, held_out)
        if len(groups) > 1:
            assert not {s.filename[0] for s in train} & {s.filename[0] for s in test}


@pytest.mark.parametrize(
    ("count", "fraction", "at_least", "held_out"),
    [
        (40, 0.2, 8, 8),
        (20, 0.2, 8, 8),
        (10, 0.2, 8, 5),
        (60, 0.2, 8, 12),
        (1, 0.2, 8, 0),
        (20, 0, 8, 0),
        (10, 0.7, 8, 7),
    ],
)
def test_at_least_so_many_are_held_out_but_not_more_than_half(count, fraction, at_least, held_out, parts):
    samples = [Sample(f"{i}.png", 0, "parts") for i in range(count)]
    fingerprints = {sample.filename: parts[i] for i, sample in enumerate(samples)}
    assert len(split_good(samples, fingerprints, fraction, 0, at_least)[1]) == held_out
