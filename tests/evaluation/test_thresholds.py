import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.lists import Sample
from evaluation.metrics import Ranking, image_scores, overlap_at
from evaluation.normal_scores import NormalScores
from evaluation.results import evaluate_class
from evaluation.score import ScoredImages
from evaluation.thresholds import (
    Thresholds,
    as_content,
    best_f1,
    for_target_fpr,
    midway_below,
    read_thresholds,
    sidecar,
    thresholds_from,
    write_thresholds,
)
from utils.errors import UsageError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 0.99]))
def test_the_target_fpr_is_kept_by_the_lowest_possible_threshold(values, target):
    normal = np.array(values, np.float32) / 20
    threshold = for_target_fpr(normal, target)
    assert np.mean(normal >= threshold) <= target
    # The next lower score would flag too many.
    lower = normal[normal < threshold]
    assert np.mean(normal >= lower.max()) > target


def test_target_fpr_without_normal_scores_is_undefined():
    assert for_target_fpr(np.zeros(0), 0.1) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_midway_thresholds_give_the_same_verdicts_as_the_best_f1(seed):
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, 15, 30) / 14).astype(np.float32)
    labels = rng.random(30) < 0.5
    if labels.all() or not labels.any():
        return
    ranking = Ranking.of(scores, labels)
    threshold = best_f1(ranking, scores)
    np.testing.assert_array_equal(scores >= threshold, scores >= ranking.best_f1()[1])
    margin = np.abs(scores - threshold).min()
    assert margin > 0


def test_midway_below_one_score_or_no_threshold():
    assert midway_below(np.array([0.5]), None) is None
    assert 0.499 < midway_below(np.array([0.5, 0.9]), 0.5) < 0.5


def test_sidecars_lie_beside_the_model_and_survive_a_round_trip(tmp_path):
    path = tmp_path / "ckpt_best.pth.tar"
    assert sidecar(path).name == "ckpt_best.thresholds.json"
    assert sidecar(tmp_path / "model.onnx").name == "model.thresholds.json"
    assert read_thresholds(path) is None
    overall = Thresholds(0.5, None, "rule", 0.1, 0.9)
    write_thresholds(path, overall)
    assert read_thresholds(path) == overall
    assert "classes" not in json.loads(sidecar(path).read_text())
    several = replace(overall, classes={"a": overall, "b": Thresholds(0.2, 0.3, "rule")})
    write_thresholds(path, several)
    assert read_thresholds(path) == several
    assert read_thresholds(path).of_class("b").image == 0.2
    with pytest.raises(UsageError, match="known are a, b"):
        read_thresholds(path).of_class("c")
    alone = replace(overall, fingerprint="abc", chosen_on="data/x/samples/test_bolts.json", class_name="bolts")
    write_thresholds(path, alone)
    assert read_thresholds(path).of_class("bolts") == alone
    for thresholds, other in [(alone, "nuts"), (alone, "bolt"), (overall, "bolts")]:
        with pytest.raises(UsageError, match="leave the name out"):
            thresholds.of_class(other)


def test_thresholds_hold_for_the_precision_that_they_were_chosen_in():
    single = Thresholds(0.5, 0.4, "rule")
    assert "precision" not in as_content(single)  # as in earlier versions
    whole = replace(single, classes={"a": single}).measured_in("bf16").with_tiled("64/16", single)
    assert thresholds_from(as_content(whole), "file") == whole
    assert (whole.classes["a"].precision, whole.tiled["64/16"].precision) == ("bf16", "fp32")
    whole.check_precision("bf16")
    text = r"^model\.pth: its thresholds .* in bf16.* evaluate again with --precision fp32, .*or pass --threshold$"
    with pytest.raises(UsageError, match=text):
        whole.check_precision("fp32", "model.pth")
    Thresholds(None, None, "").check_precision("fp16")
    with pytest.raises(UsageError, match="file: precision 'half' is not one of fp32, bf16, fp16"):
        thresholds_from({**as_content(single), "precision": "half"}, "file")
    scores = NormalScores.of(np.array([0.1, 0.2]), np.full((2, 4, 4), 0.1))
    known = replace(single, normal=scores)
    assert single.knowing(known).normal is scores
    assert single.knowing(known.measured_in("bf16")).normal is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"image": "high"}',
        '{"image": 0.5, "pixel": NaN, "low": 0, "high": 1}',
        '{"image": 0.5, "pixel": 0.5, "low": 0, "high": 1, "classes": {"a": 3}}',
        '{"image": 0.5, "pixel": 0.5, "low": 0, "high": 1, "classes": [3]}',
    ],
)
def test_broken_sidecars_are_named(tmp_path, text):
    sidecar(tmp_path / "ckpt_best.pth.tar").write_text(text)
    with pytest.raises(UsageError, match=r"ckpt_best\.thresholds\.json"):
        read_thresholds(tmp_path / "ckpt_best.pth.tar")


# ---- results of a class ----------------------------------------------------------------------------------------------


def scored(labels, defect_types, masked=None):
    rng = np.random.default_rng(0)
    masked = [True] * len(labels) if masked is None else masked
    samples = [
        Sample(f"x/test/{defect_type}/{i}.png", label, "x", "mask.png" if label and has_mask else None)
        for i, (label, defect_type, has_mask) in enumerate(zip(labels, defect_types, masked, strict=True))
    ]
    labels = np.array(labels, bool)
    masks = np.zeros((len(labels), 24, 24), bool)
    masks[labels, 4:12, 6:14] = True
    maps = rng.random(masks.shape).astype(np.float32) / 2 + 0.4 * masks
    return ScoredImages(samples, maps, image_scores(maps, (4, 4)), masks & np.array(masked)[:, None, None])


def test_each_defect_type_is_compared_with_the_good_images():
    images = scored([0, 0, 0, 1, 1, 1], ["good"] * 3 + ["crack", "crack", "hole"])
    result = evaluate_class("x", images)
    assert set(result.by_defect_type) == {"crack", "hole"}
    assert result.counts == {"crack": 2, "hole": 1}
    alone = evaluate_class("x", images.subset(np.array([0, 1, 2, 5])))
    # The threshold that is deployed is the class's.
    deployed = overlap_at(images.maps[[0, 1, 2, 5]], images.masks[[0, 1, 2, 5]], result.thresholds.pixel)
    expected = dict(zip(("pixel_f1_deployed", "pixel_iou_deployed"), deployed, strict=True))
    metrics = {name: value for name, value in alone.metrics.items() if name not in alone.verdict.row()}
    assert result.by_defect_type["hole"] == metrics | expected
    assert set(result.curves) == {"roc", "pr", "pixel_roc", "pixel_pr", "pro"}
    for name, (x, y) in result.curves.items():
        assert len(x) == len(y) <= 310, name
        assert 0 <= min(x.min(), y.min()) <= max(x.max(), y.max()) <= 1, name
        assert (np.diff(x) >= 0).all(), name


def test_thinned_curves_keep_their_area():
    result = evaluate_class("x", scored([0, 1] * 20, ["good", "crack"] * 20))
    assert np.trapezoid(*result.curves["pixel_roc"][::-1]) == pytest.approx(result.metrics["pixel_auroc"], abs=2e-3)


def test_without_masks_or_defects_undefined_results_are_absent():
    unmasked = evaluate_class(
        "x", scored([0, 0, 1, 1], ["good", "good", "bad", "bad"], masked=[True, True, False, False])
    )
    assert unmasked.metrics["image_auroc"] is not None
    assert unmasked.metrics["pixel_auroc"] is None
    assert set(unmasked.curves) == {"roc", "pr"}
    good = evaluate_class("x", scored([0, 0, 0, 0], ["good"] * 4))
    assert good.thresholds.image is None
    assert not good.by_defect_type
    # A target needs no defects.
    targeted = evaluate_class("x", scored([0, 0, 0, 0], ["good"] * 4), target_fpr=0.25)
    assert np.mean(targeted.scores >= targeted.thresholds.image) <= 0.25
    assert "25%" in targeted.thresholds.rule


@pytest.mark.parametrize(
    "content",
    [
        {"image": 10**400, "pixel": None, "low": 0, "high": 1},
        {"image": 0.5, "pixel": True, "low": 0, "high": 1},
        {"image": 0.5, "pixel": 0.5, "low": 1, "high": 0},
        {"image": 0.5, "pixel": 0.5, "low": 0, "high": 1, "classes": [1]},
        [0.5],
    ],
)
def test_thresholds_of_another_kind_are_refused(content):
    with pytest.raises(UsageError, match="evaluate the model again"):
        thresholds_from(content, "model.onnx")
