"""How close drawn images are to real ones, by their features: pure functions of arrays (N,C), a row an image.

| number | source |
|---|---|
| kernel distance (KID) | Bińkowski et al., ICLR 2018, arXiv 1801.01401 |
| precision, recall | Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991 |
| density, coverage | Naeem et al., ICML 2020, arXiv 2002.09797 |

Features of different networks and layers differ in size by a factor of 1000, and the kernel is not homogeneous:
`comparable` comes first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.neighbors import NearestNeighbors

PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5  # as in the papers
FEWEST = 3  # images on either side, of which the jackknife leaves one out


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its standard error."""

    value: float
    error: float


def comparable(features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join the layers' features (N,C of the layer) to (N,C of all), so that each layer counts the same.

    A layer is divided by its root mean square over the reference images, and by the square root of its share of all
    channels, times the number of layers: so a.b / C is the mean over the layers of each layer's own.

    Example:
        >>> layers = {"narrow": np.full((2, 1), 50.0), "wide": np.full((2, 3), 0.1)}
        >>> (comparable(layers, layers) ** 2).round(6).tolist()[0]
        [2.0, 0.666667, 0.666667, 0.666667]
    """
    total = sum(values.shape[1] for values in reference.values())
    parts = []
    for layer, values in reference.items():
        size = max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 1e-12)
        weight = np.sqrt(total / (len(reference) * values.shape[1]))
        parts.append(np.asarray(features[layer], np.float64) * (weight / size))
    return np.concatenate(parts, axis=1)


def kernel_distance(drawn: np.ndarray, real: np.ndarray) -> KernelDistance:
    """KID: the unbiased squared MMD with the kernel (a.b / C + 1)^3; its expectation is 0 if the distributions agree.

    The standard error is the jackknife's, over the images of both sides. Two distances from the same real images share
    that side's part, so their difference is more certain than the errors tell.

    Args:
        drawn, real: (N,C) and (M,C), with N and M at least FEWEST.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> near, far = (kernel_distance(rng.normal(m, 1, (50, 4)), rng.normal(0, 1, (60, 4))) for m in (0, 2))
        >>> abs(near.value) < 2 * near.error, far.value > 10 * far.error
        (True, True)
    """
    n, m, size = len(drawn), len(real), drawn.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / size + 1) ** 3

    def without_itself(a: np.ndarray) -> np.ndarray:
        """Each row's sum of the kernel with the other rows."""
        values = kernel(a, a)
        return values.sum(axis=1) - np.diagonal(values)

    drawn, real = drawn.astype(np.float64), real.astype(np.float64)
    own, other, across = without_itself(drawn), without_itself(real), kernel(drawn, real)
    within, among = own.sum() / (n * (n - 1)), other.sum() / (m * (m - 1))
    value = within + among - 2 * across.mean()
    # The distance without each of the drawn images, and without each of the real ones.
    less_drawn = _pairs_left(own) + among - 2 * (across.sum() - across.sum(axis=1)) / ((n - 1) * m)
    less_real = within + _pairs_left(other) - 2 * (across.sum() - across.sum(axis=0)) / (n * (m - 1))
    variance = sum((len(left) - 1) * left.var() for left in (less_drawn, less_real))
    return KernelDistance(float(value), float(np.sqrt(variance)))


def _pairs_left(own: np.ndarray) -> np.ndarray:
    """The mean of the kernel over pairs, without each of the rows; own: see without_itself."""
    n = len(own)
    return (own.sum() - 2 * own) / ((n - 1) * (n - 2))


def precision_recall(drawn: np.ndarray, real: np.ndarray, k: int = PRECISION_NEIGHBOURS) -> tuple[float, float]:
    """Share of drawn images that lie in the real images' region, and of real images in that of the drawn ones.

    A side's region is the union of balls around its images that reach to their k-th nearest neighbour of that side.
    Both depend on the numbers of images; compare only what was measured with the same numbers.
    """
    precision = (_distances(drawn, real) <= _radii(real, k)).any(axis=1).mean()
    recall = (_distances(real, drawn) <= _radii(drawn, k)).any(axis=1).mean()
    return float(precision), float(recall)


def density_coverage(drawn: np.ndarray, real: np.ndarray, k: int = COVERAGE_NEIGHBOURS) -> tuple[float, float]:
    """In how many of the real images' balls a drawn image lies, in k; and the share of balls that hold a drawn image.

    A single odd real image, whose ball is large, counts less here than in precision_recall. The density of real images
    is about 1; it is above 1 if drawn images crowd where real ones do.
    """
    inside = _distances(drawn, real) <= _radii(real, k)
    return float(inside.sum(axis=1).mean() / k), float(inside.any(axis=0).mean())


def nearest_distance(drawn: np.ndarray, real: np.ndarray) -> float:
    """Mean distance from a drawn image to the nearest real one, per channel (root mean square)."""
    found, _ = NearestNeighbors(n_neighbors=1).fit(real).kneighbors(drawn)
    return float(found.mean() / np.sqrt(real.shape[1]))


def nearest_other(real: np.ndarray) -> float:
    """Mean distance from an image to the nearest other one of the same set: the yardstick of nearest_distance."""
    return float(_radii(real, 1).mean() / np.sqrt(real.shape[1]))


def diversity(images: np.ndarray) -> float:
    """Mean distance between two different images, per channel (root mean square)."""
    distances, n = _distances(images, images), len(images)
    return float(distances.sum() / (n * (n - 1)) / np.sqrt(images.shape[1]))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,M) Euclidean distances."""
    distances, indices = NearestNeighbors(n_neighbors=len(b)).fit(b).kneighbors(a)
    result = np.empty_like(distances)
    np.put_along_axis(result, indices, distances, axis=1)
    return result


def _radii(images: np.ndarray, k: int) -> np.ndarray:
    """(N,) distances to the k-th nearest other image."""
    found, _ = NearestNeighbors(n_neighbors=k).fit(images).kneighbors()
    return found[:, -1]
