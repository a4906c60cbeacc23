"""Pictures for people: contact sheets, heat maps, results beside ground truth."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.errors import RunError
from utils.files import write_atomic

Row = tuple[str | Sequence[str], Sequence[np.ndarray]]

LEAST_WIDTH = 64  # of a picture in a sheet, in pixels
_GAP = 4
_CAPTION = 18
_MARGIN = 2
_FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.42)  # and its scale
_WHITE = 255


def to_uint8(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo normalisation: (N,3,H,W) -> (N,H,W,3) uint8 RGB."""
    images = images * np.asarray(std, np.float32)[:, None, None] + np.asarray(mean, np.float32)[:, None, None]
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_image(path: str | Path, image: np.ndarray, quality: int = 95) -> None:
    """Write an (H,W,3) RGB or (H,W) grey uint8 image atomically; the format follows the suffix."""

    def encode(part: Path) -> None:
        # Not imwrite: on some systems it fails silently if the path is not ASCII.
        stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(
            part.suffix, stored, [cv2.IMWRITE_JPEG_QUALITY, quality] if part.suffix in (".jpg", ".jpeg") else []
        )
        if not done:
            raise RunError(f"{path}: cannot be encoded")
        part.write_bytes(data.tobytes())

    write_atomic(path, encode)


def contact_sheet(rows: Sequence[Row], columns: Sequence[str] = ()) -> np.ndarray:
    """One (H',W',3) picture of captioned rows of (H,W,3) or (H,W) uint8 images, all of the same size.

    Where images are narrower than LEAST_WIDTH or than the caption of one of them, the pixels of all are repeated; where
    the caption of a row is wider than the row, the sheet is.

    Args:
        rows: (caption, images) of each row; the caption is one text (an empty one takes no space), or a text per image.
        columns: captions above the columns.

    Example:
        >>> small = np.zeros((16, 24), np.uint8)
        >>> contact_sheet([("", [small] * 3)]).shape  # (3 * 16, 3 * (3 * 24) + 2 * 4, 3)
        (48, 224, 3)
    """
    texts = [caption for caption, _ in rows if isinstance(caption, str)]
    heads = [*columns, *(text for caption, _ in rows if not isinstance(caption, str) for text in caption)]
    least = max([LEAST_WIDTH, *map(_text_width, heads)])
    factor = -(-least // rows[0][1][0].shape[1])
    width = rows[0][1][0].shape[1] * factor
    count = max(len(images) for _, images in rows)
    whole = max([count * (width + _GAP) - _GAP, *map(_text_width, texts)])
    lines = []
    for caption, images in ((columns, ()), *rows):
        if caption:
            lines.append(
                _text(caption, whole) if isinstance(caption, str) else _line([_text(c, width) for c in caption])
            )
        if len(images):
            lines.append(_line([_rgb(image).repeat(factor, axis=0).repeat(factor, axis=1) for image in images]))
            lines.append(np.full((_GAP, whole, 3), _WHITE, np.uint8))
    return np.concatenate([_widened(line, whole) for line in lines[:-1]])


def _line(images: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((images[0].shape[0], _GAP, 3), _WHITE, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def _widened(line: np.ndarray, width: int) -> np.ndarray:
    return np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=_WHITE)


def _text(caption: str, width: int) -> np.ndarray:
    strip = np.full((_CAPTION, width, 3), _WHITE, np.uint8)
    cv2.putText(strip, caption, (_MARGIN, _CAPTION - 5), *_FONT, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def _text_width(caption: str) -> int:
    return cv2.getTextSize(caption, *_FONT, 1)[0][0] + 2 * _MARGIN


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def spread(groups: Sequence[str], most: int) -> list[int]:
    """Choose up to `most` indices: about as many from each group, spaced evenly within it."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    quota = -(-most // max(1, len(members)))
    chosen = [
        indices[int(k)]
        for indices in members.values()
        for k in np.linspace(0, len(indices) - 1, min(quota, len(indices)))
    ]
    return chosen[:most]


def heat_overlay(
    image: np.ndarray, values: np.ndarray, low: float, high: float, contour: float | None = None
) -> np.ndarray:
    """An anomaly map over its image, coloured from `low` (blue) to `high` (red).

    Args:
        image: (H,W,3) uint8.
        values: (H,W) anomaly map.
        contour: outline the areas at or above this value; None draws no outline.
    """
    scaled = np.clip((values - low) * (1 / max(high - low, 1e-6)), 0, 1)
    colours = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_JET)
    overlay = cv2.addWeighted(image, 0.5, cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), 0.5, 0)
    if contour is not None:
        outline(overlay, values >= contour, (255, 255, 255))
    return overlay


def thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """The image, shrunk so that its longer side is at most `side`."""
    scale = min(1.0, side / max(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image


def outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw the border of a (H,W) bool mask into an (H,W,3) uint8 image."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, colour, 1)


def result_picture(image: np.ndarray, mask: np.ndarray | None, heat: np.ndarray) -> np.ndarray:
    """[image | ground truth | heat map] of a test image, side by side.

    Args:
        image, heat: (H,W,3) uint8.
        mask: (H,W) bool, or None if unknown.
    """
    truth = mask.astype(np.uint8) * 255 if mask is not None else np.full(image.shape[:2], 127, np.uint8)
    captions = ("image", "ground truth" if mask is not None else "no mask", "anomaly map")
    return contact_sheet([("", [image, truth, heat])], captions)
