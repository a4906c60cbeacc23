import io
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import tiling
from evaluation.tiling import ramp, resize_map, starts, tiled_map


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 100), st.data())
def test_tiles_cover_a_side_and_overlap(length, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    tile_starts = starts(length, tile, overlap)
    covered = np.zeros(length, int)
    for start in tile_starts:
        assert start >= 0
        assert start + min(tile, length) <= length
        covered[start : start + tile] += 1
    assert covered.min() >= 1
    assert all(b - a <= tile - overlap for a, b in itertools.pairwise(tile_starts))
    assert len(tile_starts) == len(set(tile_starts))


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 70), st.integers(5, 70), st.integers(8, 32), st.data())
def test_tiles_that_agree_are_blended_without_seams(height, width, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blended = tiled_map(image, tile, overlap, 3, lambda tiles: np.stack([t[..., 0] / np.float32(255) for t in tiles]))
    np.testing.assert_allclose(blended, image[..., 0] / 255, atol=1e-5)


def test_tiles_that_disagree_are_blended_gradually():
    image = np.zeros((32, 100, 3), np.uint8)
    tiles_seen = []

    def score(tiles):
        values = []
        for tile in tiles:
            values.append(np.full(tile.shape[:2], float(len(tiles_seen)), np.float32))
            tiles_seen.append(tile.shape)
        return np.stack(values)

    row = tiled_map(image, 32, 16, 1, score)[10]
    # From 0 to 1 over 16 pixels: steps of a sixteenth, not one of 1.
    assert np.abs(np.diff(row)).max() < 0.3
    assert set(tiles_seen) == {(32, 32, 3)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def zeros(tiles):
    return np.zeros((len(tiles), 16, 16), np.float32)


@pytest.mark.parametrize(("stderr", "shown"), [(Terminal, True), (io.StringIO, False)], ids=["terminal", "pipe"])
def test_an_image_of_many_tiles_shows_its_progress_on_a_terminal(stderr, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(tiling, "SECONDS", 0.0)
    tiled_map(np.zeros((64, 64, 3), np.uint8), 16, 0, 2, zeros)
    assert ("batches of tiles" in sys.stderr.getvalue()) == shown


def test_an_image_that_is_quick_shows_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    tiled_map(np.zeros((64, 64, 3), np.uint8), 16, 0, 2, zeros)
    assert not sys.stderr.getvalue().strip()


def test_an_image_smaller_than_a_tile_is_one_tile():
    seen = []

    def score(tiles):
        seen.extend(tile.shape for tile in tiles)
        return np.zeros((len(tiles), 16, 16), np.float32)

    assert tiled_map(np.zeros((20, 30, 3), np.uint8), 64, 8, 4, score).shape == (20, 30)
    assert seen == [(20, 30, 3)]


def test_ramps_and_resized_maps():
    assert ramp(8, 0).tolist() == [1] * 8
    assert ramp(8, 3).tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    values = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    assert resize_map(values, (8, 8)) is values
    assert resize_map(values, (16, 12)).shape == (16, 12)
