"""The numbers of drawn images, beside those of real images and of noise, as rows of a table."""

from collections.abc import Mapping

import numpy as np

from evaluation.image_features import Features
from evaluation.image_quality import (
    comparable,
    density_coverage,
    diversity,
    kernel_distance,
    nearest_distance,
    nearest_other,
    precision_recall,
)

REAL, NOISE = "real", "noise"
FEWEST_REAL, FEWEST_DRAWN = 12, 8  # so that every number has the neighbours that it asks for
COLUMNS = {
    "kid": "KID",
    "kid_error": "error",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearest": "nearest",
    "diversity": "diversity",
}
Row = dict[str, float]


def name_of(s: float) -> str:
    """The name of the row of a strength."""
    return f"s = {s:g}"


def class_rows(real: Features, drawn: Mapping[str, Features], seed: int) -> dict[str, Row]:
    """The numbers of each set of drawn images, and of real images among themselves (REAL), by name of the row.

    Precision, recall, density and coverage depend on the numbers of images. So all rows compare the same number with
    the same real images: some of the real ones, drawn by lot, are held back for the row REAL.

    Args:
        real: features of all training images of a class, at least FEWEST_REAL.
        drawn: features by the name of the row; each of as many images, at least FEWEST_DRAWN.
    """
    everything = comparable(real, real)
    images = {name: comparable(features, real) for name, features in drawn.items()}
    count = min(len(everything) // 2, *map(len, images.values()))
    order = np.random.default_rng(seed).permutation(len(everything))
    held_back, others = everything[order[:count]], everything[order[count:]]
    rows = {REAL: {**_distance(held_back, others), **_shares(held_back, others)}}
    rows[REAL] |= {"nearest": nearest_other(everything), "diversity": diversity(held_back)}
    for name, values in images.items():
        rows[name] = {**_distance(values, everything), **_shares(values[:count], others)}
        rows[name] |= {"nearest": nearest_distance(values, everything), "diversity": diversity(values)}
    return rows


def _distance(images: np.ndarray, real: np.ndarray) -> Row:
    distance = kernel_distance(images, real)
    return {"kid": distance.value, "kid_error": distance.error}


def _shares(images: np.ndarray, real: np.ndarray) -> Row:
    precision, recall = precision_recall(images, real)
    density, coverage = density_coverage(images, real)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
