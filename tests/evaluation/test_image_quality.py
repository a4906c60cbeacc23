"""The numbers of drawn images, against closed forms and slow definitions."""

import numpy as np
import pytest

from evaluation.image_quality import (
    comparable,
    density_coverage,
    diversity,
    kernel_distance,
    nearest_distance,
    nearest_other,
    precision_recall,
)
from evaluation.quality_rows import NOISE, REAL, class_rows


def gaussian_moments(mean: np.ndarray, deviation: np.ndarray) -> list[np.ndarray]:
    """The tensors E[x], E[x x], E[x x x] of independent normal coordinates, each sorted out by how often one occurs."""
    powers = [np.ones_like(mean), mean, mean**2 + deviation**2, mean**3 + 3 * mean * deviation**2]
    size, tensors = len(mean), []
    for order in (1, 2, 3):
        tensor = np.ones((size,) * order)
        for index in np.ndindex(*tensor.shape):
            counts = np.bincount(index, minlength=size)
            tensor[index] = np.prod([powers[count][i] for i, count in enumerate(counts)])
        tensors.append(tensor)
    return tensors


def exact_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """The squared MMD of two normal distributions with the kernel (x.y / C + 1)^3, by its binomial expansion."""
    size = len(first[0])
    pairs = zip(gaussian_moments(*first), gaussian_moments(*second), strict=True)
    squares = [((a - b) ** 2).sum() for a, b in pairs]
    return 3 * squares[0] / size + 3 * squares[1] / size**2 + squares[2] / size**3


DISTRIBUTIONS = {
    "one dimension": ((np.array([0.3]), np.array([0.5])), (np.array([-0.1]), np.array([0.8]))),
    "two": ((np.array([0.5, -0.2]), np.array([0.6, 0.3])), (np.array([0.1, 0.1]), np.array([0.5, 0.5]))),
    "equal": ((np.array([0.4, 0.0]), np.array([0.7, 0.2])), (np.array([0.4, 0.0]), np.array([0.7, 0.2]))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_kernel_distance_is_unbiased_and_its_error_is_that_of_repeated_draws(name):
    first, second = DISTRIBUTIONS[name]
    rng = np.random.default_rng(5)
    draws = [
        kernel_distance(rng.normal(*first, (16, len(first[0]))), rng.normal(*second, (24, len(first[0]))))
        for _ in range(700)
    ]
    values, errors = np.array([draw.value for draw in draws]), np.array([draw.error for draw in draws])
    assert values.mean() == pytest.approx(exact_distance(first, second), abs=3.5 * values.std() / np.sqrt(len(draws)))
    # The jackknife's variance is too large in expectation, never too small (Efron & Stein 1981).
    ratio = np.sqrt((errors**2).mean()) / values.std()
    assert 0.95 < ratio < (1.6 if name == "equal" else 1.25)


def regions(points: np.ndarray, k: int) -> list[float]:
    """Distance of each point to its k-th nearest other one."""
    return [
        sorted(float(np.linalg.norm(p - q)) for j, q in enumerate(points) if j != i)[k - 1]
        for i, p in enumerate(points)
    ]


@pytest.mark.parametrize("shift", [0.0, 0.7, 9.0])
def test_shares_are_those_of_their_definitions(shift):
    rng = np.random.default_rng(1)
    drawn, real = rng.normal(shift, 1, (13, 3)), rng.normal(0, 1, (17, 3))

    def inside(points: np.ndarray, centres: np.ndarray, k: int) -> np.ndarray:
        """(points, centres) bool: which centre's ball holds which point."""
        radii = regions(centres, k)
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)] for p in points])

    expected = inside(drawn, real, 3).any(axis=1).mean(), inside(real, drawn, 3).any(axis=1).mean()
    assert precision_recall(drawn, real) == pytest.approx(expected)
    held = inside(drawn, real, 5)
    assert density_coverage(drawn, real) == pytest.approx((held.sum() / (5 * 13), held.any(axis=0).mean()))


def test_distances_are_those_of_their_definitions():
    rng = np.random.default_rng(2)
    drawn, real = rng.normal(1, 1, (7, 4)), rng.normal(0, 2, (9, 4))
    nearest = np.mean([min(np.linalg.norm(d - r) for r in real) for d in drawn]) / 2
    assert nearest_distance(drawn, real) == pytest.approx(nearest)
    assert nearest_other(real) == pytest.approx(np.mean(regions(real, 1)) / 2)
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j]
    assert diversity(drawn) == pytest.approx(np.mean(pairs) / 2)


def test_layers_count_the_same_whatever_their_size_and_width():
    rng = np.random.default_rng(3)
    real = {"narrow": rng.normal(3, 1, (30, 4)), "wide": rng.normal(3, 1, (30, 64))}
    drawn = {"narrow": rng.normal(2, 1, (20, 4)), "wide": rng.normal(2, 1, (20, 64))}

    def distance(factor: float) -> float:
        scaled = [{**part, "wide": factor * part["wide"]} for part in (drawn, real)]
        return kernel_distance(*(comparable(part, scaled[1]) for part in scaled)).value

    assert distance(1) == pytest.approx(distance(1000))
    joined = comparable(real, real)
    assert joined.shape == (30, 68)
    for part in (joined[:, :4], joined[:, 4:]):
        assert (part**2).sum() / (30 * 68) == pytest.approx(0.5)


def test_rows_tell_real_images_from_noise_and_from_copies():
    rng = np.random.default_rng(4)
    real = {"a": rng.normal(2, 1, (60, 8))}
    sets = {
        "fresh": {"a": rng.normal(2, 1, (40, 8))},
        "copies": {"a": real["a"][:40]},
        "one": {"a": np.repeat(rng.normal(2, 1, (1, 8)), 40, axis=0)},
        NOISE: {"a": rng.normal(9, 1, (40, 8))},
    }
    rows = class_rows(real, sets, seed=0)
    assert list(rows) == [REAL, *sets]
    for name in (REAL, "fresh"):
        assert abs(rows[name]["kid"]) < 2 * rows[name]["kid_error"], name
        assert rows[name]["coverage"] > 0.7, name
    assert rows[NOISE]["kid"] > 10 * rows[NOISE]["kid_error"]
    assert rows[NOISE]["precision"] == rows[NOISE]["coverage"] == 0
    assert rows["copies"]["nearest"] < 1e-6 < 0.5 * rows[REAL]["nearest"] < rows["fresh"]["nearest"]
    assert rows["one"]["diversity"] < 1e-6
    assert rows["one"]["recall"] == 0
