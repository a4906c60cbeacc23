"""Anomalies made of good images alone, and how training draws them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.anomaly import grey, is_grey
from datasets.images import Preprocessing
from datasets.local_anomalies import LOCAL, OPACITY, colour_jitter, structured_noise, visibility
from datasets.synthesis import Synthesis
from tests.datasets.test_synthesis import train_set

PREPROCESSING = Preprocessing((96, 128), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pictures(height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Two different coloured pictures with structure and grain."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    waves = [120 + 50 * np.sin(y / 5 + phase) * np.cos(x / 7) for phase in (0, 1, 2)]
    image = np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))
    other = 255 - image[::-1]
    return image.clip(0, 255).astype(np.uint8), other.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", LOCAL)
@given(height=st.integers(32, 90), width=st.integers(32, 90), seed=st.integers(0, 10**6))
def test_a_source_differs_from_the_image_only_under_its_mask(name, height, width, seed):
    image, other = pictures(height, width)
    before = image.copy(), other.copy()
    source, mask = LOCAL[name](image, other, np.random.default_rng(seed))
    assert source.shape == image.shape
    assert source.dtype == mask.dtype == np.uint8
    assert mask.shape == (height, width)
    assert set(np.unique(mask)) <= {0, 1}
    np.testing.assert_array_equal(source[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(before, (image, other))
    again = LOCAL[name](image, other, np.random.default_rng(seed))
    np.testing.assert_array_equal(source, again[0])
    np.testing.assert_array_equal(mask, again[1])


@pytest.mark.parametrize("name", LOCAL)
def test_most_draws_change_most_pixels_under_the_mask(name):
    image, other = pictures()
    shares = []
    for seed in range(60):
        source, mask = LOCAL[name](image, other, np.random.default_rng(seed))
        if mask.any():
            shares.append((source != image).any(axis=2)[mask > 0].mean())
    assert len(shares) > 40
    assert np.median(shares) > 0.9


def test_cutpaste_draws_patches_and_scars_of_the_sizes_of_the_paper():
    """At 256x256, patches cover 2 to 15% with sides in 0.3 .. 3.3, and scars at most 25 x 16 pixels."""
    image, other = np.zeros((256, 256, 3), np.uint8), np.full((256, 256, 3), 255, np.uint8)
    patches, scars = [], []
    for seed in range(300):
        _, mask = LOCAL["cutpaste"](image, other, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        height, width = (int(np.ptp(sides)) + 1 for sides in (rows, columns))
        full = mask.sum() == height * width and mask.mean() > 0.015
        (patches if full else scars).append((mask.mean(), height / width, mask.sum()))
    assert 110 < len(patches) < 190
    areas, aspects, _ = np.array(patches).T
    assert 0.019 < areas.min() < 0.03 < 0.13 < areas.max() < 0.152
    assert 0.28 < aspects.min() < 0.5 < 2 < aspects.max() < 3.5
    assert max(count for *_, count in scars) <= 1.1 * 25 * 16


def test_cutpaste_takes_its_pixels_from_the_other_image():
    image, other = np.full((64, 64, 3), 40, np.uint8), np.full((64, 64, 3), 160, np.uint8)
    for seed in range(20):
        source, mask = LOCAL["cutpaste"](image, other, np.random.default_rng(seed))
        assert (source[mask > 0] > 0.8 * 160).all()


def test_noise_also_reaches_the_border_and_its_shapes_vary_in_size():
    masks = [structured_noise(*pictures(), np.random.default_rng(seed))[1] for seed in range(200)]
    edges = np.array([(m[0].any(), m[-1].any(), m[:, 0].any(), m[:, -1].any()) for m in masks])
    assert (edges.mean(axis=0) > 0.05).all()
    areas = np.array([mask.mean() for mask in masks])
    assert np.percentile(areas, 10) < 0.01 < 0.04 < np.percentile(areas, 90) < 0.3


@pytest.mark.parametrize("name", LOCAL)
def test_grey_images_give_grey_sources(name):
    image, other = (grey(picture) for picture in pictures())
    assert all(is_grey(LOCAL[name](image, other, np.random.default_rng(seed))[0]) for seed in range(20))


def test_colour_jitter_stays_near_the_image():
    image = np.full((4, 4, 3), (150, 100, 100), np.uint8)
    for seed in range(20):
        changed = colour_jitter(image, np.random.default_rng(seed), 0.1)
        assert 80 < changed.mean() < 160
    np.testing.assert_allclose(colour_jitter(image, np.random.default_rng(0), 0.0), image, atol=2)


def test_visibility_is_the_change_but_for_grain():
    rng = np.random.default_rng(0)
    image = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:9] = 1
    assert visibility(image, image + np.uint8(20), mask, 0.5) == pytest.approx(10, abs=1e-3)
    grain = (100 + rng.choice([-10, 10], (40, 40, 1)).repeat(3, axis=2)).astype(np.uint8)
    assert visibility(image, grain, mask, 1.0) < 4


# ---- drawn for training ----------------------------------------------------------------------------------------------


def drawn(types: dict[str, float], image: np.ndarray, other: np.ndarray, seed: int, foreground=None, **settings):
    """A training sample's anomalous image and mask."""
    foreground = np.ones(image.shape[:2], np.uint8) if foreground is None else foreground
    rng = np.random.default_rng(seed)
    anomaly = Synthesis(types, **settings).draw(image, foreground, "part", lambda: other, PREPROCESSING, rng)
    return (None, np.zeros_like(foreground)) if anomaly is None else (anomaly.blend(image), anomaly.mask)


@pytest.mark.parametrize("name", LOCAL)
def test_training_draws_until_the_anomaly_shows_on_the_foreground(name):
    image, other = pictures()
    foreground = np.zeros(image.shape[:2], np.uint8)
    foreground[:, :40] = 1
    for seed in range(30):
        anomalous, mask = drawn({name: 1.0}, image, other, seed, foreground)
        assert anomalous.dtype == np.float32
        assert mask.any()
        assert not (mask * (1 - foreground)).any()
        np.testing.assert_array_equal(anomalous[mask == 0], image[mask == 0])
        source = anomalous.round().clip(0, 255).astype(np.uint8)
        assert visibility(image, source, mask, 1.0) > 2.5


@pytest.mark.parametrize("name", LOCAL)
def test_an_image_without_foreground_stays_normal(name):
    anomalous, mask = drawn({name: 1.0}, *pictures(), 0, np.zeros((96, 128), np.uint8))
    assert anomalous is None
    assert not mask.any()


def test_a_patch_that_does_not_show_is_no_anomaly():
    """Of a black image, every patch looks like what it is pasted over."""
    image = np.zeros((96, 128, 3), np.uint8)
    assert all(drawn({"cutpaste": 1.0}, image, image, seed)[0] is None for seed in range(5))


def test_opacities_lie_in_their_ranges():
    image, other = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
    assert OPACITY["cutpaste"] == (1.0, 1.0)
    for seed in range(10):
        anomalous, mask = drawn({"cutpaste": 1.0}, image, other, seed)
        assert anomalous[mask > 0].min() > 0.8 * 200


@pytest.mark.parametrize("match_grey", [True, False])
def test_grey_images_get_grey_anomalies_if_asked_to(match_grey):
    image, coloured = grey(pictures()[0]), pictures()[1]
    spread = [np.ptp(drawn({"cutpaste": 1.0}, image, coloured, s, match_grey=match_grey)[0], axis=2) for s in range(5)]
    assert (max(values.max() for values in spread) == 0) == match_grey
    # Coloured images are left alone.
    anomalous, mask = drawn({"cutpaste": 1.0}, *pictures(), 0, match_grey=True)
    assert np.ptp(anomalous, axis=2)[mask > 0].max() > 0


def test_the_other_image_is_asked_for_only_where_it_is_needed():
    def refuse() -> np.ndarray:
        raise AssertionError("not needed")

    image, foreground = pictures()[0], np.ones((96, 128), np.uint8)
    for name in ("normal", "self", "noise"):
        Synthesis({name: 1.0}).draw(image, foreground, "part", refuse, PREPROCESSING, np.random.default_rng(0))
    with pytest.raises(AssertionError, match="not needed"):
        Synthesis({"cutpaste": 1.0}).draw(image, foreground, "part", refuse, PREPROCESSING, np.random.default_rng(0))


def test_the_types_given_take_the_place_of_the_settings():
    image, other = pictures()
    synthesis, rng = Synthesis({"normal": 1.0}), np.random.default_rng(0)
    assert synthesis.draw(image, np.ones((96, 128), np.uint8), "part", lambda: other, PREPROCESSING, rng) is None
    types = {"noise": 1.0}
    drawn_ = synthesis.draw(image, np.ones((96, 128), np.uint8), "part", lambda: other, PREPROCESSING, rng, types)
    assert drawn_.type == "noise"


def test_a_training_set_of_local_types_needs_no_folder(tiny_data):
    dataset = train_set(tiny_data, {"normal": 0.25, "cutpaste": 0.25, "self": 0.25, "noise": 0.25})
    changed = [dataset[epoch, index]["changed"] for epoch in range(4) for index in range(len(dataset))]
    assert 16 < sum(changed) < 32
    cached, uncached = (train_set(tiny_data, {"cutpaste": 1.0}, cache_mb=mb) for mb in (4, 0))
    for index in (1, 0, 1):
        np.testing.assert_array_equal(cached[3, index]["image"], uncached[3, index]["image"])


def test_the_other_image_is_any_of_the_rest(tiny_data):
    dataset = train_set(tiny_data, {"cutpaste": 1.0})
    others = [{dataset._other(index, np.random.default_rng(seed)) for seed in range(80)} for index in range(8)]
    assert others == [set(range(8)) - {index} for index in range(8)]
    del dataset.images.samples[1:]
    dataset._of_class = {"dots": [0]}
    assert dataset._other(0, np.random.default_rng(0)) == 0
    assert dataset[0, 0]["mask"].shape == (1, 32, 32)
