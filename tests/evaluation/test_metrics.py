import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, roc_auc_score

from evaluation.metrics import Ranking, anomaly_metrics, image_scores, overlap_at, pixel_ranking, pro
from evaluation.tables import COLUMNS, MEAN, SHOWN, markdown_table, text_table, with_mean, write_tables
from models.realnet import ExportedRealNet


def slow_pro(scores, masks, limit=0.3):
    """Bergmann et al.'s definition: regions and thresholds one by one."""
    regions = []
    for k, mask in enumerate(masks):
        left = {tuple(p) for p in np.argwhere(mask)}
        while left:
            region, edge = set(), [left.pop()]
            while edge:
                y, x = edge.pop()
                region.add((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                edge += near
            regions.append((k, np.array(sorted(region))))
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores.ravel()), reverse=True):
        hit = scores >= threshold
        overlap = np.mean([hit[k][r[:, 0], r[:, 1]].mean() for k, r in regions])
        points.append((hit[~masks].mean(), overlap))
    area, (x0, y0) = 0.0, points[0]
    for x1, y1 in points[1:]:
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
        x0, y0 = x1, y1
        if x0 >= limit:
            break
    return area / limit


scored = (
    st.integers(0, 10**6)
    .map(np.random.default_rng)
    .map(
        lambda rng: (
            # Few distinct values, sometimes only one, so that ties are common.
            rng.integers(0, int(rng.integers(1, 30)), int(rng.integers(1, 200))).astype(np.float32),
            rng,
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_rankings_agree_with_scikit_learn(scores_and_rng):
    scores, rng = scores_and_rng
    labels = rng.random(len(scores)) < 0.4
    ranking = Ranking.of(scores, labels)
    if not labels.any() or labels.all():
        assert ranking.auroc() is None
        assert ranking.average_precision() is None
        assert ranking.best_f1() == (None, None)
        assert ranking.best_iou() is None
        return
    assert ranking.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert ranking.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    f1, threshold = ranking.best_f1()
    assert f1 == pytest.approx(f1_score(labels, scores >= threshold), abs=1e-9)
    assert f1 == pytest.approx(max(f1_score(labels, scores >= t) for t in set(scores)), abs=1e-9)
    assert ranking.best_iou() == pytest.approx(max(jaccard_score(labels, scores >= t) for t in set(scores)), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-0.1, 1.1))
def test_overlap_at_a_threshold_pools_the_pixels_of_all_images(seed, threshold):
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 9, 2)) for _ in range(4)]
    masks = [rng.random(shape) < rng.choice([0, 0.4, 1]) for shape in shapes]
    maps = [(rng.integers(0, 5, shape) / 4).astype(np.float32) for shape in shapes]
    truth = np.concatenate([mask.ravel() for mask in masks])
    flagged = np.concatenate([values.ravel() for values in maps]) >= threshold
    got = overlap_at(maps, masks, threshold)
    if truth.all() or not truth.any():
        assert got == (None, None)
    else:
        assert got == pytest.approx((f1_score(truth, flagged), jaccard_score(truth, flagged)))
    assert overlap_at(maps, masks, None) == (None, None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0]))
def test_pro_agrees_with_its_definition(seed, limit):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 8)) < rng.uniform(0.02, 0.5)
    scores = (rng.integers(0, int(rng.integers(1, 13)), masks.shape) / 11).astype(np.float32)
    if not masks.any() or masks.all():
        assert pro(scores, masks, limit) is None
    else:
        assert pro(scores, masks, limit) == pytest.approx(slow_pro(scores, masks, limit), abs=1e-9)
        assert anomaly_metrics(scores, masks)["pro_005"] == pro(scores, masks, 0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_continuous_scores_agree_with_scikit_learn_too(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 12, 10)) < 0.2
    masks[0] = True
    masks[1] = False
    scores = rng.normal(size=masks.shape).astype(np.float32) + masks
    metrics = anomaly_metrics(scores, masks, pixel_threshold=0.5)
    # Tables write repr(), which differs for numpy's numbers.
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), scores.ravel()), abs=1e-6)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), scores.ravel()), abs=1e-6)


def test_constant_scores_give_the_chance_level():
    masks = np.zeros((4, 16, 16), bool)
    masks[0, 0, 0] = masks[3, 15, 2:9] = True
    metrics = anomaly_metrics(np.full(masks.shape, 0.25, np.float32), masks)
    assert metrics["image_auroc"] == metrics["pixel_auroc"] == 0.5
    assert metrics["pixel_ap"] == pytest.approx(masks.mean())
    assert metrics["pro"] == pytest.approx(0.15)


def test_holes_are_not_filled_and_corners_connect():
    masks = np.zeros((1, 12, 12), bool)
    masks[0, 1:6, 1:6] = True
    masks[0, 3, 3] = False
    masks[0, 6, 6] = True  # touches the ring at a corner: one region
    weights = pixel_ranking(np.arange(144, dtype=np.float32).reshape(1, 12, 12), masks).weights
    assert weights[-1] == pytest.approx(1)
    assert len(weights) == 25


def test_scores_that_are_not_numbers_are_refused():
    for labels in ([0, 1], [1, 0]):
        with pytest.raises(ValueError, match="not numbers"):
            Ranking.of(np.array([np.nan, 0.5]), np.array(labels, bool))


def test_perfect_and_inverted_maps():
    masks = np.zeros((4, 32, 32), bool)
    masks[2:, 8:26, 8:26] = True
    perfect = anomaly_metrics(masks.astype(np.float32), masks, pixel_threshold=0.5)
    for name in COLUMNS:
        assert perfect[name] == pytest.approx(1.0), name
    # An AUROC below one half is not replaced by 1 - AUROC.
    inverted = anomaly_metrics(1 - masks.astype(np.float32), masks)
    assert inverted["pixel_auroc"] == 0.0


def test_image_score_is_the_maximum_of_the_pooled_map():
    maps = np.random.default_rng(0).random((5, 40, 37)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(maps, (16, 16), axis=(1, 2)).mean(axis=(3, 4))
    np.testing.assert_allclose(image_scores(maps), windows.max(axis=(1, 2)), rtol=1e-5)
    # A map smaller than the window is averaged as a whole.
    np.testing.assert_allclose(image_scores(maps[:, :8, :8]), maps[:, :8, :8].mean(axis=(1, 2)), rtol=1e-5)


def test_without_masks_pixel_metrics_are_absent():
    scores = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    metrics = anomaly_metrics(scores, None, labels=np.array([0, 0, 1, 1]))
    assert metrics["image_auroc"] is not None
    assert all(metrics[name] is None for name in COLUMNS if not name.startswith("image"))
    with pytest.raises(ValueError, match="labels"):
        anomaly_metrics(scores, None)


def test_without_defects_no_metric_is_defined():
    scores = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    assert set(anomaly_metrics(scores, np.zeros((4, 20, 20), bool)).values()) == {None}


def test_tables_leave_undefined_values_out(tmp_path):
    row = dict.fromkeys(COLUMNS, 0.5)
    table = with_mean({"a": row, "b": {**row, "pro": None, "image_auroc": 0.9}})
    assert table[MEAN]["pro"] == 0.5
    assert table[MEAN]["image_auroc"] == pytest.approx(0.7)
    assert "n/a" in text_table(table).splitlines()[2]
    assert markdown_table(table).count("\n") == 5
    names = [path.name for path in write_tables(tmp_path, "metrics", table, {"image_auroc": 0.9965})]
    assert names == ["metrics.csv", "metrics.json", "metrics.md"]
    assert (tmp_path / "metrics.md").read_text().splitlines()[-1].startswith("| paper (mean) | 99.65 | n/a |")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == ",".join(["class", *COLUMNS])
    assert lines[2].split(",")[1:4] == ["0.9", "0.5", ""]


def test_a_line_of_the_table_fits_the_terminal():
    row = dict.fromkeys(COLUMNS, 1.0)
    assert set(SHOWN) < set(COLUMNS)
    assert max(len(line) for line in text_table({"metal_nut": row}).splitlines()) <= 120


@pytest.mark.parametrize("window", [(1, 1), (3, 5), (16, 16), (20, 9), (64, 64)])
def test_image_scores_are_the_highest_mean_of_a_window(window):
    maps = np.random.default_rng(0).random((3, 20, 24)).astype(np.float32) + 1000
    k_y, k_x = min(window[0], 20), min(window[1], 24)
    windows = np.lib.stride_tricks.sliding_window_view(maps.astype(np.float64), (k_y, k_x), axis=(1, 2))
    expected = windows.mean(axis=(3, 4)).max(axis=(1, 2))
    np.testing.assert_allclose(image_scores(maps, window), expected, rtol=1e-7)
    # Exported models give the same scores.
    model = ExportedRealNet(lambda batch: {"anomaly_score": batch["image"]}, window)
    np.testing.assert_allclose(model(torch.from_numpy(maps)[:, None])[1].numpy(), expected, rtol=1e-6)
    maps[1, 3, 4] = np.nan
    assert not np.isfinite(image_scores(maps, window)[1])
