"""Perlin noise masks (Perlin 1985; as in DRAEM and RealNet, section 3.1)."""

import cv2
import numpy as np


def perlin_mask(
    height: int,
    width: int,
    rng: np.random.Generator,
    min_scale: int = 0,
    max_scale: int = 6,
    threshold: float = 0.5,
) -> np.ndarray:
    """A random blob mask: rotated Perlin noise above a threshold.

    Args:
        min_scale, max_scale: the lattice has 2^a x 2^b cells, a and b uniform integers in [min_scale, max_scale).
        threshold: noise above it becomes 1.

    Returns:
        (height, width) uint8 in {0, 1}.

    Example:
        >>> mask = perlin_mask(64, 96, np.random.default_rng(1))
        >>> mask.shape, mask.dtype, np.unique(mask).tolist()
        ((64, 96), dtype('uint8'), [0, 1])
    """
    rows, columns = (2 ** int(rng.integers(min_scale, max_scale)) for _ in range(2))
    noise = perlin_noise(height, width, rows, columns, rng)
    angle = float(rng.uniform(-90, 90))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    rotated = cv2.warpAffine(noise, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=0)
    return (rotated > threshold).astype(np.uint8)


def perlin_noise(height: int, width: int, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Gradient noise on a rows x columns lattice, times sqrt(2). Returns (height, width) float32 about in [-1, 1]."""
    angles = rng.uniform(0, 2 * np.pi, (rows + 1, columns + 1))
    gradients = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    i, y, fade_y = _cells(height, rows)
    j, x, fade_x = _cells(width, columns)
    y, fade_y = y[:, None], fade_y[:, None]

    def corner(di: int, dj: int) -> np.ndarray:
        """Dot product of the cells' corner gradient with the offset from that corner."""
        gy, gx = gradients[:, i + di][:, :, j + dj]
        return gy * (y - di) + gx * (x - dj)

    top = corner(0, 0)
    top += fade_x * (corner(0, 1) - top)
    bottom = corner(1, 0)
    bottom += fade_x * (corner(1, 1) - bottom)
    return np.float32(np.sqrt(2)) * (top + fade_y * (bottom - top))


def _cells(length: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel: its cell, its offset t within the cell in [0, 1), and the fade 6t^5 - 15t^4 + 10t^3."""
    position = np.arange(length) * (cells / length)
    index = position.astype(np.int64)
    t = (position - index).astype(np.float32)
    return index, t, t**3 * (t * (t * 6 - 15) + 10)
