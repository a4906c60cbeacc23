"""Foreground, Perlin masks, blending, augmentations, and the training samples made of them."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import morphology

from datasets.anomaly import AUGMENTATIONS, augment_texture, blend, is_grey
from datasets.build import build_realnet_train_set, check_realnet_data
from datasets.catalog import CATALOG, ForegroundRule
from datasets.foreground import apply_rule, auto_rule, foreground_mask, rule_for
from datasets.images import Augmentation, Preprocessing, list_images
from datasets.lists import ImageList, read_list
from datasets.perlin import perlin_mask, perlin_noise
from datasets.realnet import CachedImages, RealNetTrainSet
from datasets.synthesis import Synthesis
from tests.conftest import settings
from utils.config import checked
from utils.errors import UsageError


def slow_perlin(height, width, rows, columns, rng):
    """The definition of Perlin noise, pixel by pixel in float64."""
    angles = rng.uniform(0, 2 * np.pi, (rows + 1, columns + 1))
    gy, gx = np.cos(angles), np.sin(angles)
    fade = lambda t: 6 * t**5 - 15 * t**4 + 10 * t**3  # noqa: E731
    out = np.zeros((height, width))
    for py in range(height):
        for px in range(width):
            y, x = py * rows / height, px * columns / width
            i, j = int(y), int(x)
            v, u = y - i, x - j
            dot = lambda a, b: gy[i + a, j + b] * (v - a) + gx[i + a, j + b] * (u - b)  # noqa: B023, E731
            top = dot(0, 0) + fade(u) * (dot(0, 1) - dot(0, 0))
            bottom = dot(1, 0) + fade(u) * (dot(1, 1) - dot(1, 0))
            out[py, px] = np.sqrt(2) * (top + fade(v) * (bottom - top))
    return out


@pytest.mark.parametrize("shape", [(16, 16, 4, 2), (20, 33, 8, 1), (7, 9, 3, 5)])
def test_perlin_noise_equals_its_definition(shape):
    fast = perlin_noise(*shape, np.random.default_rng(1))
    np.testing.assert_allclose(fast, slow_perlin(*shape, np.random.default_rng(1)), atol=1e-5)


@given(st.integers(8, 70), st.integers(8, 70), st.integers(0, 10**6))
def test_perlin_masks_are_binary_for_any_size(height, width, seed):
    mask = perlin_mask(height, width, np.random.default_rng(seed))
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


def test_perlin_masks_vary_and_usually_cover_some_of_the_image():
    areas = [perlin_mask(64, 64, np.random.default_rng(seed)).mean() for seed in range(200)]
    assert 0.02 < np.mean(areas) < 0.4
    assert np.mean(np.array(areas) > 0) > 0.6
    assert len(set(areas)) > 100


def test_blend_equals_its_formula():
    rng = np.random.default_rng(0)
    image, source = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mask = rng.integers(0, 2, (5, 6), dtype=np.uint8)
    m = mask[..., None].astype(float)
    expected = (1 - m) * image + m * (0.3 * source + 0.7 * image.astype(float))
    np.testing.assert_allclose(blend(image, source, mask, 0.3), expected, atol=1e-4)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda f: f.__name__)
def test_augmentations_keep_shape_and_type_and_change_the_image(augmentation):
    image = np.random.default_rng(0).integers(30, 200, (24, 32, 3), dtype=np.uint8)
    before, changed = image.copy(), 0
    for seed in range(8):
        out = augmentation(image, np.random.default_rng(seed))
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        changed += not np.array_equal(out, image)
    assert changed >= 3  # Solarise changes half of them.
    np.testing.assert_array_equal(image, before)


def test_texture_augmentation_depends_on_its_generator():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    first, again, other = (augment_texture(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# ---- foreground ------------------------------------------------------------------------------------------------------


def disc(inside: int, outside: int, side: int = 64) -> np.ndarray:
    """A grey disc on a background of another grey, with a little noise."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    grey = np.where(np.hypot(y, x) < side / 3, inside, outside)
    grey = grey + np.random.default_rng(0).integers(-3, 4, grey.shape)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def truth(side: int = 64) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.hypot(y, x) < side / 3


@pytest.mark.parametrize(
    ("dataset", "name", "inside", "outside"),
    [
        ("MVTec-AD", "pill", 200, 40),
        ("mvtec", "hazelnut", 200, 40),
        ("MVTec-AD", "bottle", 40, 200),
        ("VisA", "pcb1", 200, 40),
        ("visa", "candle", 200, 40),
        ("MPDD", "connector", 40, 200),
        ("MPDD", "tubes", 200, 40),
        ("btad", "01", 200, 40),
    ],
)
def test_foreground_rules_find_the_object(dataset, name, inside, outside):
    mask = foreground_mask(disc(inside, outside), dataset, name)
    assert mask.dtype == np.uint8
    assert np.mean(mask == truth()) > 0.95
    # With the opposite contrast, the rule finds the background instead.
    assert np.mean(foreground_mask(disc(outside, inside), dataset, name) == truth()) < 0.5


@pytest.mark.parametrize("sides", [(6, 0), (0, 6), (6, 6), (15, 6), (8, 3)])
def test_morphology_equals_scikit_image(sides):
    image = np.repeat((np.random.default_rng(0).random((160, 192, 1)) * 255).astype(np.uint8), 3, axis=2)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    mask = image[..., 0] > int(image.mean())
    for operation, side in zip((morphology.closing, morphology.opening), sides, strict=True):
        mask = operation(mask, np.ones((side, side))) if side else mask
    got = apply_rule(image, ForegroundRule(threshold=int(image.mean()), close=sides[0], open=sides[1]))
    inside = (slice(45, -45), slice(45, -45))  # libraries differ in what they assume beyond the border
    np.testing.assert_array_equal(got[inside], mask[inside])
    assert 0.05 < got[inside].mean() < 0.95


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("MVTec-AD", "carpet leather tile wood cable transistor"),
        ("VisA", "capsules"),
        ("BTAD", "02"),
        ("MyParts", "anything"),
    ],
)
def test_without_a_rule_the_whole_image_is_foreground(dataset, names):
    for name in names.split():
        assert foreground_mask(disc(40, 200), dataset, name).all()


def test_channel_rules_use_their_channel():
    image = np.zeros((64, 64, 3), np.uint8)
    image[truth(), 2] = 220
    assert np.mean(foreground_mask(image, "MPDD", "tubes") == truth()) > 0.95
    # VisA's pcb classes use the triangle threshold on the blue channel.
    assert np.mean(foreground_mask(image, "VisA", "pcb2") == truth()) > 0.95


def test_the_catalog_covers_every_class_once():
    assert {name: len(info.classes) for name, info in CATALOG.items()} == {
        "MVTec-AD": 15,
        "VisA": 12,
        "MPDD": 6,
        "BTAD": 3,
    }
    for info in CATALOG.values():
        assert list(info.classes) == sorted(info.classes)
        assert set(info.foreground) <= set(info.classes)


def test_foreground_settings():
    def no_images():
        raise AssertionError("not needed")

    assert rule_for(None, "mvtec", "pill", no_images) == CATALOG["MVTec-AD"].foreground["pill"]
    assert rule_for("none", "mvtec", "pill", no_images) is None
    assert rule_for("BTAD/01", "own", "x", no_images) == CATALOG["BTAD"].foreground["01"]
    assert rule_for("pcb2", "own", "x", no_images) == CATALOG["VisA"].foreground["pcb2"]
    assert rule_for("mvtec/carpet", "own", "x", no_images) is None
    rule = rule_for({"channel": "red", "threshold": 90, "invert": True}, "own", "x", no_images)
    assert rule == ForegroundRule("red", 90, True)
    for bad in ("BTAD/09", "sometimes", {"chanel": "red"}, {"channel": "cyan"}, {"threshold": 300}):
        with pytest.raises(UsageError, match="foreground"):
            rule_for(bad, "own", "x", no_images)


@pytest.mark.parametrize(("inside", "outside"), [(200, 40), (40, 200)])
def test_auto_foreground_is_the_side_without_the_border(inside, outside):
    rule = auto_rule([disc(inside, outside)] * 4, "x")
    assert rule.invert == (outside > inside)


def test_auto_foreground_gives_up_if_it_is_unstable():
    rng = np.random.default_rng(0)
    textures = [np.repeat(rng.integers(0, 256, (64, 64, 1), dtype=np.uint8), 3, axis=2) for _ in range(4)]
    assert auto_rule(textures, "x") is None
    assert auto_rule([disc(40, 200), disc(200, 40)], "x") is None


# ---- training samples ------------------------------------------------------------------------------------------------

UNIT = Preprocessing((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

NO_AUGMENTATION = Augmentation()


def train_set(tiny_data, types, cache_mb=4, augmentation=NO_AUGMENTATION):
    samples = read_list(tiny_data / "samples" / "train_dots.json", tiny_data / "images")
    images = ImageList(samples, tiny_data / "images")
    synthesis = Synthesis(types, sdas_dir=str(tiny_data / "images/{}/test"), dtd_dir=str(tiny_data / "images/lines"))
    return RealNetTrainSet(CachedImages(images, {"dots": None}, UNIT, cache_mb), synthesis, augmentation, 7)


def test_samples_differ_from_the_normal_image_only_under_the_mask(tiny_data):
    dataset = train_set(tiny_data, {"normal": 0.2, "sdas": 0.4, "dtd": 0.4})
    changed = 0
    for epoch in range(4):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            different = (sample["image"] != sample["gt_image"]).any(dim=0, keepdim=True)
            assert not (different & (sample["mask"] == 0)).any()
            assert sample["changed"] == bool(sample["mask"].any())
            changed += sample["changed"]
    assert 8 < changed < 32


def test_where_only_grey_is_seen_anomalies_are_grey(tiny_data):
    config = checked(settings(str(tiny_data), "none")["realnet"], "realnet.yaml", "realnet").dataset
    config.train.anomaly_types = {"dtd": 1.0}

    def coloured(mode: str) -> int:
        config.image_reader.kwargs.color_mode = mode
        dataset = build_realnet_train_set(config, "dots", 0)
        drawn = [dataset.draw(0, index).anomaly for index in range(8)]
        return sum(not is_grey(anomaly.source) for anomaly in drawn if anomaly is not None)

    assert coloured("RGB") > 2
    assert coloured("GRAY") == 0


def test_the_draws_of_normal_sdas_and_dtd_stay_what_they_were(tiny_data):
    """Recorded, so that a change of the draws, after which runs cannot be repeated, is not made by accident."""
    dataset = train_set(tiny_data, {"normal": 0.2, "sdas": 0.4, "dtd": 0.4})
    samples = [dataset[1, index] for index in range(8)]
    assert [int(sample["mask"].sum()) for sample in samples] == [71, 65, 28, 0, 7, 9, 10, 0]
    sums = [1358.79, 1425.63, 1357.71, 1354.65, 1345.94, 1354.55, 1353.71, 1354.27]
    assert [float(sample["image"].sum()) for sample in samples] == pytest.approx(sums, abs=0.01)


def test_a_sample_depends_on_seed_epoch_and_index_only(tiny_data):
    types = {"normal": 0.0, "dtd": 1.0}
    cached, uncached = train_set(tiny_data, types), train_set(tiny_data, types, cache_mb=0)
    for index in range(3):
        _ = uncached[5, 7 - index]
        for name, value in cached[2, index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(uncached[2, index][name])), name
    assert not torch.equal(cached[2, 0]["mask"], cached[3, 0]["mask"])


def test_anomaly_types_have_their_probabilities(tiny_data):
    dataset = train_set(tiny_data, {"normal": 1.0, "dtd": 0.0})
    assert not any(dataset[epoch, 0]["changed"] for epoch in range(20))
    dataset = train_set(tiny_data, {"normal": 0.9, "dtd": 0.1}).anomalous_only()
    assert sum(dataset[epoch, 0]["changed"] for epoch in range(20)) > 10


def test_augmentation_is_the_same_for_image_and_mask(tiny_data):
    dataset = train_set(tiny_data, {"dtd": 1.0}, augmentation=Augmentation(hflip=True, vflip=True, rotate=True))
    seen = set()
    for epoch in range(20):
        sample = dataset[epoch, 0]
        seen.add(sample["gt_image"].numpy().tobytes())
        assert not ((sample["image"] != sample["gt_image"]).any(dim=0, keepdim=True) & (sample["mask"] == 0)).any()
    assert len(seen) > 3


def test_foreground_limits_the_mask(tiny_data):
    dataset = train_set(tiny_data, {"dtd": 1.0})
    dataset.rules["dots"] = ForegroundRule(threshold=140)
    image, foreground = dataset.read(0)
    np.testing.assert_array_equal(foreground, image[..., 0] > 140)
    for epoch in range(10):
        assert not (dataset[epoch, 0]["mask"][0].numpy() * (1 - foreground)).any()


@pytest.mark.parametrize(
    ("types", "match"),
    [
        ({"normal": 0.5, "sdas": 0.6}, "add up"),
        ({"normal": 0.5, "cutpast": 0.5}, "cutpast"),
        ({"normal": 1.0, "noise": 0.0}, "cutpaste: 0.17, self: 0.16, noise: 0.17"),
        ({"normal": 1.5, "dtd": -0.5}, "at least 0"),
    ],
)
def test_bad_anomaly_types_are_refused(types, match, tiny_data):
    config = settings(str(tiny_data), "out")["realnet"]
    config["dataset"]["train"]["anomaly_types"] = types
    with pytest.raises(UsageError, match=match):
        check_realnet_data(checked(config, "realnet.yaml").dataset, "dots")


def test_missing_sources_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"sample\.py"):
        Synthesis({"sdas": 1.0}, sdas_dir=str(tmp_path / "{}")).open(["bottle"])
    with pytest.raises(UsageError, match=r"dtd_dir.* needs no other images"):
        Synthesis({"dtd": 1.0}).open(["bottle"])
    Synthesis({"cutpaste": 0.5, "self": 0.25, "noise": 0.25}).open(["bottle"])


def test_images_are_listed_in_any_letter_case(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.txt", "d.JPeG"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "d.JPeG"]
