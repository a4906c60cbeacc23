"""Masks as other programs want them: COCO's run lengths and boxes, YOLO's polygons."""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

Box = tuple[int, int, int, int]  # x, y, width, height


def instances(mask: np.ndarray) -> Iterator[tuple[np.ndarray, Box, int]]:
    """The connected parts (8 neighbours) of a mask (H,W) uint8 in {0, 1}.

    Yields:
        The part, cut out to its box, uint8 in {0, 1}; the box; its area in pixels.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    for label in range(1, count):
        x, y, width, height, area = (int(value) for value in stats[label])
        yield (labels[y : y + height, x : x + width] == label).astype(np.uint8), (x, y, width, height), area


# ---- COCO ------------------------------------------------------------------------------------------------------------


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: the lengths of runs of 0 and 1 in turn, column by column, beginning with 0.

    Example:
        >>> run_lengths(np.array([[0, 1], [1, 1]], np.uint8))
        [1, 3]
    """
    values = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(values)]])).tolist()
    return [0, *runs] if values[0] else runs


def coco_annotations(mask: np.ndarray, image_id: int, category_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO instances, one for each connected part of a mask; exact, holes too.

    Args:
        first_id: of the annotations, which are numbered on from there.
    """
    annotations = []
    for number, (part, (x, y, width, height), area) in enumerate(instances(mask)):
        alone = np.zeros_like(mask)
        alone[y : y + height, x : x + width] = part
        annotations.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": category_id,
                "segmentation": {"counts": run_lengths(alone), "size": list(mask.shape)},
                "area": area,
                "bbox": [x, y, width, height],
                "iscrowd": 0,
            }
        )
    return annotations


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def yolo_lines(mask: np.ndarray, category: int) -> str:
    """YOLO's segmentation labels: a line for each connected part, `category x y x y ...`, in shares of the size.

    Points are the centres of the part's border pixels. A hole is reached by a cut as thin as a line.
    """
    size = np.array(mask.shape[::-1])
    lines = []
    for part, (x, y, _, _), _ in instances(mask):
        points = polygon(part)
        outline = _widened(part) if len(points) < 3 else points.astype(np.float64)
        shares = np.add(outline, (x + 0.5, y + 0.5)) / size
        lines.append(" ".join([str(category), *(f"{value:.6f}" for value in shares.flatten())]) + "\n")
    return "".join(lines)


def polygon(part: np.ndarray) -> np.ndarray:
    """The border of a connected mask (H,W) uint8 as one polygon, (N,2) pixels x, y, with its holes.

    From the leftmost point of a hole, a line to and fro joins it to the first border on its left: the outline, or a
    hole that has been joined before, since it begins further left. cv2.fillPoly gives the mask back exactly.
    """
    contours, hierarchy = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outer = next(i for i, (_, _, _, parent) in enumerate(hierarchy[0]) if parent < 0)
    points = contours[outer][:, 0]
    holes = [contour[:, 0] for i, contour in enumerate(contours) if i != outer]
    for hole in sorted(holes, key=lambda hole: int(hole[:, 0].min())):
        start = int(hole[:, 0].argmin())
        x, y = hole[start].tolist()
        while x > 0 and part[y, x - 1]:
            x -= 1
        at = int(np.flatnonzero((points == (x, y)).all(axis=1))[0])
        hole = np.roll(hole, -start, axis=0)
        points = np.concatenate([points[: at + 1], hole, hole[:1], points[at:]])
    return _corners(points)


def _widened(line: np.ndarray) -> np.ndarray:
    """A rectangle (4,2) around the pixels of a mask that is a dot or a straight line, half a pixel wide."""
    ys, xs = np.nonzero(line)
    first, last = np.array([xs[0], ys[0]]), np.array([xs[-1], ys[-1]])
    along = (last - first) / max(1.0, float(np.linalg.norm(last - first))) if len(xs) > 1 else np.array([1.0, 0.0])
    along, across = along / 4, np.array([-along[1], along[0]]) / 4
    return np.stack([first - along - across, last + along - across, last + along + across, first - along + across])


def _corners(points: np.ndarray) -> np.ndarray:
    """The points of a closed outline where its direction changes."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[(before != after).any(axis=1)]


def yolo_settings(types: Sequence[str], validated: bool) -> str:
    """data.yaml: where YOLO finds images and labels, and what the categories are called.

    Without `path`, Ultralytics takes the folder of the file itself.

    Args:
        validated: whether there are images to validate on; else those of the training are named.
    """
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(types))
    return f"train: images/train\nval: images/{'val' if validated else 'train'}\nnames:\n{names}"
