"""COCO's run lengths and YOLO's polygons give the mask back."""

import cv2
import numpy as np
import pytest
import yaml
from scipy import ndimage

from datasets.pair_formats import coco_annotations, run_lengths, yolo_lines, yolo_settings
from datasets.perlin import perlin_mask


def masks(seed: int) -> np.ndarray:
    """Blobs, often with holes, and dots and lines of a pixel's width."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(8, 90, 2))
    mask = perlin_mask(height, width, rng)
    mask &= (rng.random(mask.shape) > rng.choice([0, 0.02, 0.3])).astype(np.uint8)
    mask[rng.random(mask.shape) > 0.99] = 1
    cv2.line(mask, (0, 0), (int(rng.integers(width)), int(rng.integers(height))), 1, 1)
    return mask


def decoded(counts: list[int], size: list[int]) -> np.ndarray:
    """Uncompressed RLE as COCO describes it, run by run."""
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    return values.astype(np.uint8).reshape(size[1], size[0]).T


@pytest.mark.parametrize("seed", range(12))
def test_coco_instances_are_the_connected_parts_of_the_mask(seed):
    mask = masks(seed)
    annotations = coco_annotations(mask, image_id=7, category_id=3, first_id=11)
    assert len(annotations) == ndimage.label(mask, np.ones((3, 3)))[1]
    assert [entry["id"] for entry in annotations] == list(range(11, 11 + len(annotations)))
    together = np.zeros_like(mask)
    for entry in annotations:
        part = decoded(entry["segmentation"]["counts"], entry["segmentation"]["size"])
        ys, xs = np.nonzero(part)
        assert entry["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert entry["area"] == part.sum()
        assert (entry["image_id"], entry["category_id"], entry["iscrowd"]) == (7, 3, 0)
        together += part
    np.testing.assert_array_equal(together, mask)


def test_run_lengths_begin_with_zeros():
    assert run_lengths(np.ones((2, 3), np.uint8)) == [0, 6]
    assert run_lengths(np.array([[0, 0], [1, 0]], np.uint8)) == [1, 1, 2]


@pytest.mark.parametrize("seed", range(30))
def test_yolo_polygons_filled_again_are_the_mask(seed):
    mask = masks(seed)
    size, filled = np.array(mask.shape[::-1]), np.zeros_like(mask)
    for line in yolo_lines(mask, 4).splitlines():
        category, *values = line.split()
        shares = np.array(values, float).reshape(-1, 2)
        assert category == "4"
        assert len(shares) >= 3
        assert shares.min() >= 0
        assert shares.max() <= 1
        assert (np.ptp(shares, axis=0) > 0).all()
        cv2.fillPoly(filled, [(shares * size).astype(np.int32)], 1)
    np.testing.assert_array_equal(filled, mask)


@pytest.mark.parametrize("validated", [True, False])
def test_yolo_settings_name_the_categories(validated):
    settings = yaml.safe_load(yolo_settings(["dtd", "noise"], validated))
    assert settings["names"] == {0: "dtd", 1: "noise"}
    assert settings["val"] == ("images/val" if validated else "images/train")
