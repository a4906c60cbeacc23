from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.aupimo import aupimo, image_aupimos


def slow_aupimo(maps, masks, labels, lower, upper):
    """The definition: the curve of each image at every threshold there is, and its steps added up one by one."""
    normal = [values for values, anomalous in zip(maps, labels, strict=True) if not anomalous]
    thresholds = {np.inf, *(float(value) for values in maps for value in values.ravel())}
    rates = {t: np.mean([np.mean(values >= t) for values in normal]) for t in thresholds}
    results = []
    for values, mask, anomalous in zip(maps, masks, labels, strict=True):
        if not anomalous or not mask.any():
            continue
        recalls = {t: np.mean(values[mask] >= t) for t in thresholds}
        corners = [lower, *sorted(rate for rate in set(rates.values()) if lower < rate < upper), upper]
        area = 0.0
        for left, right in pairwise(corners):
            best = max(recalls[t] for t in thresholds if rates[t] <= left)
            area += best * (np.log(right) - np.log(left))
        results.append(area / np.log(upper / lower))
    return np.mean(results) if results else None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1e-5, 1e-4), (0.01, 0.2), (0.03, 1.0)]), st.booleans())
def test_it_agrees_with_its_definition(seed, bounds, ties):
    rng = np.random.default_rng(seed)
    # At full size, the images of a set may differ in size.
    shapes = [tuple(rng.integers(1, 9, 2)) for _ in range(6)]
    labels = [False, *(rng.random(4) < 0.5), True]
    masks = [(rng.random(shape) < 0.3) & label for shape, label in zip(shapes, labels, strict=True)]
    levels = int(rng.integers(1, 8)) if ties else 10**6
    maps = [(rng.integers(0, levels, shape) / levels).astype(np.float32) for shape in shapes]
    expected = slow_aupimo(maps, masks, labels, *bounds)
    if expected is None:
        assert aupimo(maps, masks, labels, *bounds) is None
    else:
        assert aupimo(maps, masks, labels, *bounds) == pytest.approx(expected, abs=1e-9)


def test_a_case_computed_by_hand():
    normal = np.arange(10, dtype=np.float32).reshape(2, 5)
    anomalous = np.array([[9.5, 8.5, 7.5], [5, -1, 20]], np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    nothing = np.zeros((2, 5), bool)
    # As thresholds, the mask's scores flag 0, 0.1, 0.2, 0.5 (5 itself included) and 1 of the normal pixels, so they
    # count in all of log 0.1 .. log 1, in all, in 1 - log10(2), in log10(2), and in nothing of it.
    assert aupimo([normal, anomalous], [nothing, mask], [0, 1], 0.1, 1) == pytest.approx((1 + 1 + 1 + 0 + 0) / 5)
    # A second normal image, of twice the size and clean above 0, halves the rates: 0.05, 0.1, 0.25, 1.
    maps, masks = [normal, np.zeros((4, 5), np.float32), anomalous], [nothing, np.zeros((4, 5), bool), mask]
    expected = (1 + 1 + 1 + np.log10(4) + 0) / 5
    assert aupimo(maps, masks, [0, 0, 1], 0.1, 1) == pytest.approx(expected)


def test_few_normal_pixels_ask_for_no_false_alarm():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.random((20, 20)), rng.random((20, 20)) * 1.2
    mask = rng.random((20, 20)) < 0.5
    recall = np.mean(anomalous[mask] > normal.max())
    assert 0 < recall < 1
    assert aupimo([normal, anomalous], [mask & False, mask], [False, True]) == pytest.approx(recall)


def test_only_images_with_a_mask_count_and_defects_choose_no_threshold():
    rng = np.random.default_rng(1)
    maps, masks = rng.random((4, 16, 16)), np.zeros((4, 16, 16), bool)
    masks[2, 3:6, 3:6] = True
    labels = [False, False, True, True]
    assert len(image_aupimos(maps, masks, labels)) == 1
    # What an anomalous image scores outside of its mask is no false positive here.
    higher = np.where(masks | (np.arange(4) < 2)[:, None, None], maps, 10.0)
    assert aupimo(higher, masks, labels) == aupimo(maps, masks, labels)
    assert aupimo(maps[:2], masks[:2], labels[:2]) is None
    assert aupimo(maps[2:], masks[2:], labels[2:]) is None


@pytest.mark.parametrize("image", [0, 1])
def test_scores_that_are_not_numbers_are_refused(image):
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool)
    masks[1, 1, 1] = True
    maps[image, 1, 1] = np.nan
    with pytest.raises(ValueError, match="not numbers"):
        aupimo(maps, masks, [False, True])
