"""Anomalies made of good images alone: they need neither a diffusion model nor a folder of textures.

Each type is a function (image, other, rng) -> (source, mask) for anomaly.blend: `image` and `other` are good images of
a class, (H,W,3) uint8, and are not written to; the mask is (H,W) uint8 in {0, 1}; the source, (H,W,3) uint8, is the
image outside of it. Lengths are in pixels of a 256x256 image, and scale with the square root of the area.
"""

from collections.abc import Callable

import cv2
import numpy as np

from datasets.perlin import perlin_mask

PATCH_AREA, PATCH_ASPECT = (0.02, 0.15), (0.3, 3.3)  # share of the image; height / width
SCAR_LENGTH, SCAR_WIDTH, SCAR_ANGLE = (10, 25), (2, 16), (-45, 45)
CUTPASTE_JITTER, SELF_JITTER = 0.1, 0.3
GRIDS = (4, 8)
SHIFT = (0.125, 0.875)  # of each side
MOST_SHAPES = 3
BLOB_RADIUS, LINE_LENGTH, LINE_WIDTH = (4, 40), (20, 160), (1.5, 8)
BLUR, SHARPEN, SHADE = (1.5, 6), (1.5, 6), (25, 120)  # sigma; factor of the detail; grey levels
GRAIN = 5  # side of the windows whose means show a change


def cutpaste(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A rectangular patch or a thin scar of the other image, with equal odds (CutPaste, Li et al., CVPR 2021).

    The place that it is cut from and the place that it gets are random. A patch has 2 to 15% of the area and an aspect
    ratio of 0.3 to 3.3, as far as it fits; a scar is 10 to 25 long and 2 to 16 wide, and turned by -45 to 45 degrees.

    Example:
        >>> image, other = np.zeros((64, 96, 3), np.uint8), np.full((64, 96, 3), 200, np.uint8)
        >>> source, mask = cutpaste(image, other, np.random.default_rng(0))
        >>> source.shape, mask.shape, bool((source[mask == 0] == 0).all())
        ((64, 96, 3), (64, 96), True)
    """
    return (_patch if rng.random() < 0.5 else _scar)(image, other, rng)


def self_shuffle(
    image: np.ndarray, other: np.ndarray, rng: np.random.Generator, min_scale: int = 0, max_scale: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """The image's own parts at other places, inside a Perlin mask (MemSeg's structural anomalies, Yang et al. 2022).

    With equal odds, the cells of a 4x4 or 8x8 grid change places, or the whole image moves by an eighth to seven
    eighths of each side and comes in again at the other side. As in MemSeg, the colours change, too: without that,
    nothing would show on an even texture.

    Args:
        other: not used.
        min_scale, max_scale: see perlin.perlin_mask.
    """
    del other
    moved = _shuffled(image, int(rng.choice(GRIDS)), rng) if rng.random() < 0.5 else _shifted(image, rng)
    mask = perlin_mask(*image.shape[:2], rng, min_scale, max_scale)
    return _inside(image, colour_jitter(moved, rng, SELF_JITTER), mask), mask


def structured_noise(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The image blurred, sharpened, brightened or darkened inside blobs and lines.

    After the stain noise of Collin and De Vleeschouwer (ICPR 2020), ellipses of one colour. Here, one to three
    ellipses, polygons and curved lines share one effect. Their centres may lie anywhere, also at the very border.

    Args:
        other: not used.
    """
    del other
    mask = _blobs_and_lines(*image.shape[:2], rng)
    effect = EFFECTS[int(rng.integers(len(EFFECTS)))]
    return _inside(image, effect(image, rng), mask), mask


def visibility(image: np.ndarray, source: np.ndarray, mask: np.ndarray, delta: float) -> float:
    """How much blending the source in changes the image under its mask, in grey levels: the mean over GRAIN x GRAIN
    means, so that grain whose pixels change places counts for little.

    Args:
        image, source, mask, delta: as for anomaly.blend; the mask is not empty.
    """
    x, y, width, height = cv2.boundingRect(mask)
    part = (slice(y, y + height), slice(x, x + width))
    inside = mask[part].astype(np.float32)
    change = cv2.subtract(source[part], image[part], dtype=cv2.CV_32F) * inside[..., None]
    # The border of the mask's box is continued with zeros, in both, so that means are over pixels of the mask only.
    change, share = (cv2.blur(values, (GRAIN, GRAIN), borderType=cv2.BORDER_CONSTANT) for values in (change, inside))
    under = inside > 0
    return delta * float((np.abs(change).max(axis=2)[under] / share[under]).mean())


def _scale(image: np.ndarray) -> float:
    """The unit of length: 1 at 256x256 pixels."""
    return float(np.sqrt(image.shape[0] * image.shape[1])) / 256


def _log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _inside(image: np.ndarray, changed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The changed image inside the mask, the image elsewhere."""
    return cv2.copyTo(changed, mask, image.copy())


# ---- cutpaste --------------------------------------------------------------------------------------------------------


def _patch(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    area, aspect = rng.uniform(*PATCH_AREA) * height * width, _log_uniform(PATCH_ASPECT, rng)
    h, w = _fitting(image, np.sqrt(area * aspect), np.sqrt(area / aspect))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    source, mask = image.copy(), np.zeros((height, width), np.uint8)
    source[top : top + h, left : left + w] = colour_jitter(_cut(other, h, w, rng), rng, CUTPASTE_JITTER)
    mask[top : top + h, left : left + w] = 1
    return source, mask


def _scar(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    scale = _scale(image)
    h, w = _fitting(image, scale * rng.uniform(*SCAR_LENGTH), scale * rng.uniform(*SCAR_WIDTH))
    piece = colour_jitter(_cut(other, h, w, rng), rng, CUTPASTE_JITTER)
    # Turn the piece about its centre, and put this centre anywhere.
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    matrix = cv2.getRotationMatrix2D(centre.tolist(), float(rng.uniform(*SCAR_ANGLE)), 1.0)
    matrix[:, 2] += rng.uniform(0, (width, height)) - centre
    mask = cv2.warpAffine(np.ones((h, w), np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST)
    placed = cv2.warpAffine(piece, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return _inside(image, placed, mask), mask


def _fitting(image: np.ndarray, height: float, width: float) -> tuple[int, int]:
    """(height, width) in whole pixels, at least 1 and at most the image's."""
    return max(1, min(image.shape[0], round(height))), max(1, min(image.shape[1], round(width)))


def _cut(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A (height, width, 3) piece of the image, from a random place."""
    top, left = int(rng.integers(image.shape[0] - height + 1)), int(rng.integers(image.shape[1] - width + 1))
    return image[top : top + height, left : left + width]


def colour_jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Change brightness, contrast (around the mean), saturation and hue; three equal channels stay equal.

    Args:
        image: (H,W,3) uint8.
        strength: the first three are scaled by 1 - strength .. 1 + strength, the hue turns by up to this share of its
            circle to either side.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    values, mean = np.arange(256), float(image.mean())
    shade = np.clip(((values - mean) * contrast + mean) * brightness + 0.5, 0, 255)
    hsv = cv2.cvtColor(cv2.LUT(image, shade.astype(np.uint8)), cv2.COLOR_RGB2HSV_FULL)
    hue = (values + round(256 * rng.uniform(-strength, strength))) % 256
    table = np.stack([hue, np.clip(values * saturation + 0.5, 0, 255), values], axis=-1)
    return cv2.cvtColor(cv2.LUT(hsv, table.astype(np.uint8)[None]), cv2.COLOR_HSV2RGB_FULL)


# ---- self ------------------------------------------------------------------------------------------------------------


def _shuffled(image: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """The image's cells x cells cells in random order. Sides that the grid does not divide are mirrored to fit."""
    height, width = image.shape[:2]
    h, w = -(-height // cells), -(-width // cells)
    fitted = cv2.copyMakeBorder(image, 0, h * cells - height, 0, w * cells - width, cv2.BORDER_REFLECT)
    parts = fitted.reshape(cells, h, cells, w, 3).swapaxes(1, 2).reshape(cells * cells, h, w, 3)
    parts = parts[rng.permutation(cells * cells)].reshape(cells, cells, h, w, 3)
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(h * cells, w * cells, 3)[:height, :width])


def _shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image moved by a random part of each side; what leaves it comes in at the other side."""
    return np.roll(image, [round(side * rng.uniform(*SHIFT)) for side in image.shape[:2]], axis=(0, 1))


# ---- noise -----------------------------------------------------------------------------------------------------------


def _blobs_and_lines(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One to three random shapes. Returns (height, width) uint8 in {0, 1}."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(1 + int(rng.integers(MOST_SHAPES))):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        shape(mask, rng.uniform(0, (width, height)), _scale(mask), rng)
    return mask


def _ellipse(mask: np.ndarray, centre: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    axes = [2 * scale * _log_uniform(BLOB_RADIUS, rng) for _ in range(2)]
    cv2.ellipse(mask, (centre.tolist(), axes, float(rng.uniform(0, 180))), 1, cv2.FILLED)


def _polygon(mask: np.ndarray, centre: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """4 to 12 corners around the centre, each at a distance of its own."""
    corners = int(rng.integers(4, 13))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = scale * _log_uniform(BLOB_RADIUS, rng) * rng.uniform(0.5, 1.5, corners)
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)


def _line(mask: np.ndarray, centre: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """A quadratic Bezier curve past the centre."""
    length, angle = scale * rng.uniform(*LINE_LENGTH), rng.uniform(0, np.pi)
    half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    bend = centre + length * rng.uniform(-0.4, 0.4, 2)
    t = np.linspace(0, 1, 24)[:, None]
    points = (1 - t) ** 2 * (centre - half) + 2 * t * (1 - t) * bend + t**2 * (centre + half)
    width = max(1, round(scale * _log_uniform(LINE_WIDTH, rng)))
    cv2.polylines(mask, [points.round().astype(np.int32)], False, 1, width)


def _blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur."""
    return cv2.GaussianBlur(image, (0, 0), _scale(image) * float(rng.uniform(*BLUR)))


def _sharpened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add what a Gaussian blur of sigma 2 removes, several times."""
    amount = float(rng.uniform(*SHARPEN))
    return cv2.addWeighted(image, 1 + amount, cv2.GaussianBlur(image, (0, 0), 2 * _scale(image)), -amount, 0)


def _brightened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.add(image, np.full_like(image, round(rng.uniform(*SHADE))))


def _darkened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.subtract(image, np.full_like(image, round(rng.uniform(*SHADE))))


SHAPES = (_ellipse, _polygon, _line)
EFFECTS = (_blurred, _sharpened, _brightened, _darkened)
# The types by their names in dataset.train.anomaly_types, and the ranges of their opacity.
LOCAL: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "cutpaste": cutpaste,
    "self": self_shuffle,
    "noise": structured_noise,
}
OPACITY = {"cutpaste": (1.0, 1.0), "self": (0.5, 1.0), "noise": (0.5, 1.0)}
