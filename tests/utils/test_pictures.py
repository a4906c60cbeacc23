"""Contact sheets: captions are readable whatever the size of the images, and images keep their pixels."""

import numpy as np
import pytest

from utils.pictures import LEAST_WIDTH, contact_sheet

CAPTION = "with a synthetic anomaly"


def ink(strip: np.ndarray) -> int:
    """How much of a strip of text is drawn upon."""
    return int((255 - strip.astype(int)).sum())


def test_small_images_are_enlarged_by_whole_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    factor = 3  # the smallest that makes 30 pixels at least LEAST_WIDTH
    assert 2 * 30 < LEAST_WIDTH <= factor * 30
    sheet = contact_sheet([("", list(images))])
    assert sheet.shape == (60, 3 * 90 + 2 * 4, 3)
    for i, image in enumerate(images):
        cell = sheet[:, 94 * i : 94 * i + 90]
        np.testing.assert_array_equal(cell, image.repeat(factor, axis=0).repeat(factor, axis=1))


def test_large_images_are_shown_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 200, 3), dtype=np.uint8)
    sheet = contact_sheet([("rows", [images[0]]), ("", [images[1]])])
    np.testing.assert_array_equal(sheet[18:68], images[0])
    np.testing.assert_array_equal(sheet[72:], images[1])


@pytest.mark.parametrize("side", [8, 32, 100])
def test_no_caption_is_cut_off(side: int):
    blank = np.full((side, side), 255, np.uint8)
    wide = np.full((side, 600), 255, np.uint8)
    whole = ink(contact_sheet([(CAPTION, [wide])]))
    assert whole > 0
    assert ink(contact_sheet([(CAPTION, [blank])])) == whole
    assert ink(contact_sheet([("", [blank] * 2)], [CAPTION] * 2)) == 2 * whole
    assert ink(contact_sheet([([CAPTION] * 3, [blank] * 3), ("", [blank])])) == 3 * whole
