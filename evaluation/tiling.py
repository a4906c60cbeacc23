"""Score large images in overlapping tiles, and blend the maps of the tiles without seams."""

from collections.abc import Callable

import cv2
import numpy as np
from tqdm import tqdm

from utils import distributed

SECONDS = 5.0  # after which the tiles of an image have a progress bar of their own


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """The starts of tiles that cover a side of `length` pixels; neighbours overlap by at least `overlap` pixels."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def ramp(tile: int, overlap: int) -> np.ndarray:
    """(tile,) weights that rise from the border over the overlap, and are 1 further inside."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1.0
    return np.minimum(1.0, distance / (overlap + 1)).astype(np.float32)


def tiled_map(
    image: np.ndarray, tile: int, overlap: int, batch: int, score: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    """The anomaly map of an image, at its own size, from tiles that are scored like separate images.

    Where that takes long, a progress bar on rank 0 shows it, if stderr is a terminal.

    Args:
        image: (H,W,3) uint8.
        tile: side of the square tiles, in pixels of the image; a smaller image is one tile.
        overlap: pixels that neighbouring tiles share, 0 <= overlap < tile.
        batch: tiles scored at once.
        score: list of tiles (h,w,3) -> (N,h',w') float32 maps.

    Returns:
        (H,W) float32: where tiles overlap, their mean weighted by the distance from their borders.

    Example:
        >>> brightness = lambda tiles: np.stack([tile.mean(axis=2, dtype=np.float32) for tile in tiles])
        >>> values = tiled_map(np.full((100, 130, 3), 7, np.uint8), 64, 16, batch=4, score=brightness)
        >>> values.shape, bool(np.allclose(values, 7))
        ((100, 130), True)
    """
    height, width = image.shape[:2]
    sides = min(tile, height), min(tile, width)
    corners = [(y, x) for y in starts(height, tile, overlap) for x in starts(width, tile, overlap)]
    weight = ramp(sides[0], overlap)[:, None] * ramp(sides[1], overlap)
    total, weights = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    firsts = range(0, len(corners), batch)
    # disable=None hides it where there is no terminal.
    hidden = None if distributed.is_main() else True
    for start in tqdm(firsts, "batches of tiles", leave=False, delay=SECONDS, disable=hidden, dynamic_ncols=True):
        group = corners[start : start + batch]
        maps = score([image[y : y + sides[0], x : x + sides[1]] for y, x in group])
        for (y, x), values in zip(group, maps, strict=True):
            area = np.s_[y : y + sides[0], x : x + sides[1]]
            total[area] += weight * resize_map(values, sides)
            weights[area] += weight
    return total / weights


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map (h,w) float32 bilinearly to (height, width)."""
    if values.shape == tuple(size):
        return values
    return cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
