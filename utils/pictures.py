"""Pictures for people: contact sheets, heat maps, results beside ground truth."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.checkpoint import write_atomic
from utils.errors import RunError

_GAP = 4
_CAPTION = 18
_WHITE = 255


def to_uint8(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo normalisation: (N,3,H,W) -> (N,H,W,3) uint8 RGB."""
    images = images * np.asarray(std, np.float32)[:, None, None] + np.asarray(mean, np.float32)[:, None, None]
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_image(path: str | Path, image: np.ndarray, quality: int = 95) -> None:
    """Write an (H,W,3) or (H,W) uint8 RGB picture, whole or not at all; the format follows the suffix."""

    def encode(part: Path) -> None:
        # imencode, because imwrite fails without a word on paths that are not ASCII on some systems.
        stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(
            part.suffix, stored, [cv2.IMWRITE_JPEG_QUALITY, quality] if part.suffix in (".jpg", ".jpeg") else []
        )
        if not done:
            raise RunError(f"{path}: cannot be encoded")
        part.write_bytes(data.tobytes())

    write_atomic(path, encode)


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str] = ()) -> np.ndarray:
    """Captioned rows of equally large (H,W,3) or (H,W) uint8 pictures as one (H',W',3) picture.

    Args:
        rows: (caption, pictures) of each row; an empty caption takes no room.
        columns: captions above the columns.
    """
    width = rows[0][1][0].shape[1]
    count = max(len(pictures) for _, pictures in rows)
    lines = []
    if columns:
        heads = [_text(caption, width) for caption in columns]
        lines.append(_line(heads, count, width))
    for caption, pictures in rows:
        if caption:
            lines.append(_text(caption, count * (width + _GAP) - _GAP))
        lines.append(_line([_rgb(picture) for picture in pictures], count, width))
        lines.append(np.full((_GAP, lines[-1].shape[1], 3), _WHITE, np.uint8))
    return np.concatenate(lines[:-1])


def _line(pictures: Sequence[np.ndarray], count: int, width: int) -> np.ndarray:
    height = pictures[0].shape[0]
    blank = np.full((height, width, 3), _WHITE, np.uint8)
    gap = np.full((height, _GAP, 3), _WHITE, np.uint8)
    cells = [*pictures, *[blank] * (count - len(pictures))]
    return np.concatenate([part for cell in cells for part in (cell, gap)][:-1], axis=1)


def _text(caption: str, width: int) -> np.ndarray:
    strip = np.full((_CAPTION, width, 3), _WHITE, np.uint8)
    cv2.putText(strip, caption, (2, _CAPTION - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def _rgb(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture


def spread(kinds: Sequence[str], most: int) -> list[int]:
    """Up to `most` indices, about as many of each kind, evenly over those of a kind."""
    by_kind: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(i)
    quota = -(-most // max(1, len(by_kind)))
    groups = by_kind.values()
    chosen = [group[int(k)] for group in groups for k in np.linspace(0, len(group) - 1, min(quota, len(group)))]
    return chosen[:most]


def heat_overlay(image: np.ndarray, values: np.ndarray, threshold: float | None) -> np.ndarray:
    """A heat map over the picture, with the outline of what lies at or above the threshold.

    Args:
        image: (H,W,3) uint8.
        values: (H,W) in [0, 1].
        threshold: on the same scale, or None for no outline.
    """
    colours = cv2.applyColorMap((np.clip(values, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)
    overlay = cv2.addWeighted(image, 0.5, cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), 0.5, 0)
    if threshold is not None:
        outline(overlay, values >= threshold, (255, 255, 255))
    return overlay


def thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture whose longer side is at most `side`."""
    scale = min(1.0, side / max(picture.shape[:2]))
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw the border of a (H,W) bool mask into an (H,W,3) uint8 picture."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, colour, 1)


def result_picture(image: np.ndarray, mask: np.ndarray | None, heat: np.ndarray) -> np.ndarray:
    """[image | ground truth | heat map] of a test picture.

    Args:
        image, heat: (H,W,3) uint8.
        mask: (H,W) bool, or None where unknown.
    """
    truth = mask.astype(np.uint8) * 255 if mask is not None else np.full(image.shape[:2], 127, np.uint8)
    captions = ("image", "ground truth" if mask is not None else "no mask", "anomaly map")
    return contact_sheet([("", [image, truth, heat])], captions)
