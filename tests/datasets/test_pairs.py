"""Pairs of image and mask: those of training at the input size, and the images' own pixels at full size."""

import cv2
import numpy as np
import pytest

from datasets.catalog import ForegroundRule
from datasets.images import Augmentation, read_image
from datasets.pairs import TrainingPairs, enlarged_mask
from tests.datasets.test_synthesis import train_set
from utils.errors import RunError

TYPES = dict.fromkeys(("sdas", "dtd", "cutpaste", "self", "noise"), 0.2)


def maker(tiny_data, types=TYPES, full_size=False, **settings) -> TrainingPairs:
    dataset = train_set(tiny_data, types, **settings)
    return TrainingPairs(dataset, range(len(dataset)), full_size)


def test_a_pair_at_the_input_size_is_the_training_sample(tiny_data):
    make = maker(tiny_data, augmentation=Augmentation(hflip=True, rotate=True, jitter=0.1))
    seen = set()
    for i in range(40):
        sample, pair = make.train_set[divmod(i, 8)], make(i)
        if not sample["changed"]:
            continue
        seen.add(pair.type)
        assert (pair.epoch, pair.index) == divmod(i, 8)
        np.testing.assert_array_equal(pair.mask, sample["mask"][0].numpy())
        values = sample["image"].permute(1, 2, 0).numpy() * 255
        assert np.abs(pair.image - values).max() <= 0.5 + 1e-3
        assert (pair.source is None) == (pair.type in ("cutpaste", "self", "noise"))
    assert seen == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_at_full_size_only_pixels_under_the_mask_differ_from_the_original(name, tiny_data):
    full, small = (maker(tiny_data, {name: 1.0}, full_size) for full_size in (True, False))
    overlaps = []
    for i in range(12):
        pair, at_input = full(i), small(i)
        original = read_image(tiny_data / "images" / pair.good)
        assert pair.image.shape == original.shape == (64, 64, 3)
        np.testing.assert_array_equal(pair.image[pair.mask == 0], original[pair.mask == 0])
        assert (pair.image != original).any()
        if (pair.epoch, pair.index) == (at_input.epoch, at_input.index):
            assert (pair.opacity, pair.source) == (at_input.opacity, at_input.source)
            enlarged = cv2.resize(at_input.mask, (64, 64), interpolation=cv2.INTER_NEAREST)
            # Within a pixel of the input size: lines of one pixel's width are half as wide at full size.
            near = [cv2.dilate(mask, np.ones((5, 5), np.uint8)) for mask in (pair.mask, enlarged)]
            shares = [(pair.mask & near[1]).sum() / pair.mask.sum(), (enlarged & near[0]).sum() / enlarged.sum()]
            overlaps.append(min(shares))
    assert len(overlaps) > 6
    assert np.median(overlaps) > 0.9


@pytest.mark.parametrize("full_size", [True, False])
def test_a_pair_is_the_same_whatever_was_made_before(full_size, tiny_data):
    first, second = (maker(tiny_data, full_size=full_size, cache_mb=mb) for mb in (4, 0))
    made = {i: first(i) for i in range(10)}
    for i in reversed(range(10)):
        again = second(i)
        np.testing.assert_array_equal(again.image, made[i].image)
        np.testing.assert_array_equal(again.mask, made[i].mask)
        assert again.type == made[i].type


def test_flips_and_turns_are_those_of_the_input_size(tiny_data):
    make = maker(tiny_data, {"noise": 1.0}, True, augmentation=Augmentation(hflip=True, vflip=True, rotate=True))
    turned = set()
    for i in range(16):
        pair = make(i)
        drawn = make.train_set.draw(pair.epoch, pair.index)
        original = read_image(tiny_data / "images" / pair.good)
        views = [np.rot90(view, k) for view in (original, original[:, ::-1]) for k in range(4)]
        outside = pair.mask == 0
        (number,) = [k for k, view in enumerate(views) if np.array_equal(pair.image[outside], view[outside])]
        turned.add(number)
        small = cv2.resize(np.ascontiguousarray(views[number]), (32, 32), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - drawn.image).mean() < 10
    assert len(turned) > 3


def test_where_a_draw_changes_nothing_another_one_follows_and_none_is_used_twice(tiny_data):
    make = maker(tiny_data, {"dtd": 1.0})
    make.train_set.rules["dots"] = ForegroundRule(threshold=160)  # the bright dots only: many Perlin masks miss them
    empty = [i for i in range(24) if not make.train_set[divmod(i, 8)]["changed"]]
    pairs = [make(i) for i in range(24)]
    assert empty
    assert all(pair.mask.any() for pair in pairs)
    assert len({(pair.epoch, pair.index) for pair in pairs}) == 24
    assert all(pairs[i].epoch >= 1_000_000 for i in empty)


def test_without_any_foreground_the_error_names_the_image(tiny_data):
    make = maker(tiny_data, {"noise": 1.0})
    make.train_set.rules["dots"] = ForegroundRule(threshold=255)
    with pytest.raises(RunError, match=r"dots/train/good/000.png: no anomaly shows on it or the 7 images after it"):
        make(0)


def test_an_enlarged_mask_is_smoother_than_its_pixels():
    """A disc, whose true shape at eight times the size is known."""

    def disc(side: int) -> np.ndarray:
        y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
        return (np.hypot(y, x) < 0.3).astype(np.uint8)

    pixels = cv2.resize(disc(32), (256, 256), interpolation=cv2.INTER_NEAREST)
    wrong, wrong_pixels = ((mask != disc(256)).sum() for mask in (enlarged_mask(disc(32), (256, 256)), pixels))
    assert wrong < 0.75 * wrong_pixels
    np.testing.assert_array_equal(enlarged_mask(disc(32), (32, 32)), disc(32))
