"""Thresholds from held-out good images: what they promise, how they go beyond the sample, and their place in files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluation.normal_scores import NormalScores, log_odds, normalised, pooled, raw
from evaluation.thresholds import Thresholds, as_content, from_normal, of_normals, thresholds_from
from utils.errors import UsageError


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def normal_scores(scores: np.ndarray) -> NormalScores:
    return NormalScores.of(scores, np.linspace(0, 1, 1001, dtype=np.float32))


@pytest.mark.parametrize(("count", "target"), [(9, 0.1), (19, 0.1), (19, 0.05), (99, 0.05), (99, 0.01)])
def test_the_promised_rate_holds_for_any_distribution(count, target):
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        # Heavy tails: Student's t with 2 degrees of freedom.
        good, new = np.split(sigmoid(rng.standard_t(2, count + 500) - 3), [count])
        rates.append(np.mean(new >= normal_scores(good).image_threshold(target)))
    assert np.mean(rates) <= target * 1.15
    assert np.mean(rates) >= target * 0.5


def test_the_promised_rate_holds_for_new_parts_of_which_there_are_several_images():
    rng, target = np.random.default_rng(0), 0.1
    rates, torn = [], []
    for _ in range(600):
        # Images of a part differ less than parts do; some parts have many images.
        counts = rng.integers(1, 9, 20)
        levels = rng.normal(-3, 1, 20 + 100)
        parts = np.repeat(np.arange(20), counts)
        good = sigmoid(levels[parts] + rng.normal(0, 0.2, len(parts)))
        new = sigmoid(levels[20:] + rng.normal(0, 0.2, 100))
        normal = NormalScores.of(good, np.zeros(10, np.float32), [str(part) for part in parts])
        rates.append(np.mean(new >= normal.image_threshold(target)))
        torn.append(np.mean(new >= normal_scores(good).image_threshold(target)))
    assert normal.count == 20
    assert 0.5 * target <= np.mean(rates) <= 1.05 * target < np.mean(torn)
    assert from_normal(normal, 0.01, 0, 1).rule.endswith("of 20 parts (an estimate: 20 parts can promise 4.8% at best)")


def test_parts_travel_with_the_scores_and_do_not_mix_across_classes():
    normal = NormalScores.of(np.array([0.3, 0.1, 0.2]), np.zeros(10, np.float32), ["b", "a", "b"])
    assert normal.parts.tolist() == [0, 1, 1]
    again = NormalScores.from_content(normal.as_content(), "file")
    assert [again.scores.tolist(), again.parts.tolist()] == [[0.1, 0.2, 0.3], [0, 1, 1]]
    both = pooled([normal, normal])
    assert both.count == 4
    assert both.weights.tolist() == pytest.approx([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])
    for parts in ([0, 1], [0, 1, "2"], 3):
        with pytest.raises(UsageError, match="parts of the good images"):
            NormalScores.from_content({**normal.as_content(), "parts": parts}, "file")


def test_below_what_the_images_can_promise_the_tail_is_continued():
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        good, new = np.split(sigmoid(rng.normal(-3, 1, 5040)), [40])
        normal = normal_scores(good)
        thresholds = [normal.image_threshold(target) for target in (0.001, 0.01, 0.02)]
        assert thresholds == sorted(thresholds, reverse=True)
        assert thresholds[-1] > good.max()
        rates.append(np.mean(new >= thresholds[1]))
    assert 0.002 < np.mean(rates) < 0.02


def test_equal_scores_and_a_single_one_have_a_threshold_above_them():
    for scores in (np.full(20, 0.3), np.array([0.3]), np.zeros(5)):
        for target in (0.001, 0.1, 0.5):
            threshold = normal_scores(scores).image_threshold(target)
            assert scores.max() < threshold < min(1, scores.max() + 0.1)


def test_the_pixel_threshold_is_a_quantile_of_all_pixels():
    normal = normal_scores(np.full(3, 0.1))
    for target in (0.5, 0.1, 0.01):
        assert normal.pixel_threshold(target) == pytest.approx(1 - target, abs=0.002)


def test_image_and_pixel_threshold_are_consistent():
    # Most pixels are higher than any image's score.
    normal = NormalScores.of(np.array([0.1, 0.2]), np.full(100, 0.9, np.float32))
    thresholds = from_normal(normal, 0.01, 0.0, 1.0)
    assert thresholds.pixel == thresholds.image > 0.2


def test_the_rule_says_what_the_images_can_promise():
    normal = normal_scores(np.linspace(0.1, 0.2, 40))
    assert from_normal(normal, 0.05, 0, 1).rule == "at most 5% of good images flagged, by 40 held-out good images"
    assert "(an estimate: 40 images can promise 2.4% at best)" in from_normal(normal, 0.01, 0, 1).rule


def test_normalised_scores_have_the_threshold_at_one_half_and_are_monotone():
    scores = np.concatenate([[0, 1e-9], np.linspace(0.001, 0.999, 200), [1]])
    values = [normalised(score, 0.2, 0.7) for score in scores]
    assert normalised(0.2, 0.2, 0.7) == 0.5
    assert (np.diff(values) > 0).all()
    assert (values[0], values[-1]) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert [raw(value, 0.2, 0.7) for value in values[2:-1]] == pytest.approx(list(scores[2:-1]))


def test_detectors_of_different_scales_compare_when_normalised():
    rng = np.random.default_rng(0)
    good = rng.normal(0, 1, 300)
    one, other = (
        from_normal(normal_scores(sigmoid(shift + scale * good)), 0.01, 0, 1) for shift, scale in ((-3, 1), (1, 0.3))
    )
    same = (sigmoid(np.array(-3 + 1 * 4.0)), sigmoid(np.array(1 + 0.3 * 4.0)))
    assert one.normalised(float(same[0])) == pytest.approx(other.normalised(float(same[1])), abs=0.02)


def model_thresholds() -> Thresholds:
    parts = {"bolts": normal_scores(np.linspace(0.1, 0.2, 30)), "nuts": normal_scores(np.linspace(0.5, 0.6, 20))}
    return of_normals(parts, 0.05, 0.1, 0.9, "abc")


def test_each_class_has_its_threshold_and_new_images_of_unknown_class_have_one():
    thresholds = model_thresholds()
    assert 0.19 < thresholds.of_class("bolts").image < 0.21
    assert 0.59 < thresholds.of_class("nuts").image < 0.62
    assert 0.59 < thresholds.image < 0.62
    assert len(thresholds.normal) == 50
    alone = of_normals({"bolts": normal_scores(np.linspace(0.1, 0.2, 30))}, 0.05, 0, 1, "abc")
    assert alone.of_class("bolts") is alone


def test_thresholds_survive_their_file_and_can_be_had_for_another_rate():
    thresholds = model_thresholds()
    thresholds = thresholds.with_tiled("64/16", replace(thresholds, image=0.95))
    read = thresholds_from(json.loads(json.dumps(as_content(thresholds))), "file")
    assert as_content(read) == as_content(thresholds)
    assert (read.tiled["64/16"].image, read.classes["bolts"].tiled["64/16"].image) == (
        0.95,
        read.classes["bolts"].image,
    )
    stricter = read.at(0.02)
    assert stricter.image > read.image
    assert stricter.classes["bolts"].image > read.classes["bolts"].image
    assert stricter.fingerprint == "abc"
    with pytest.raises(UsageError, match=r"^--target-fpr: this model knows no scores of held-out good images"):
        Thresholds(0.5, 0.5, "").at(0.1)


def test_thresholds_for_tiles_stay_when_those_for_whole_images_are_chosen_anew():
    before = model_thresholds().with_tiled("64/16", model_thresholds())
    now = replace(model_thresholds(), image=0.3).keeping_tiles(before)
    assert now.image == 0.3
    assert set(now.tiled) == set(now.classes["nuts"].tiled) == {"64/16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": 3}, "the good images' scores are 3, not a mapping"),
        ({"normal": {"scores": [], "pixels": [0.5] * 61}}, "scores of the good images are"),
        ({"normal": {"scores": [0.5, "x"], "pixels": [0.5] * 61}}, "scores of the good images are"),
        ({"normal": {"scores": [0.5], "pixels": [0.5]}}, "pixels of the good images are"),
        ({"normal": {"scores": [2.0], "pixels": [0.5] * 61}}, "scores of the good images are"),
        ({"scale": 0}, "scale is 0, not a number"),
        ({"scale": "x"}, "scale is 'x', not a number"),
        ({"tiled": [1]}, "tiled is not a JSON object"),
        ({"tiled": {"64/16": 1}}, "tiles 64/16: has to hold a JSON object"),
    ],
)
def test_a_damaged_file_is_one_error(change, message):
    content = as_content(model_thresholds()) | change
    with pytest.raises(UsageError) as error:
        thresholds_from(content, "file.json")
    assert message in str(error.value)
    assert str(error.value).startswith("file.json")


def test_log_odds_are_finite_for_every_score():
    assert np.isfinite(log_odds(np.array([0, 1], np.float32))).all()
