import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from utils.metrics import Ranking, anomaly_metrics, image_scores, pro
from utils.report import COLUMNS, MEAN, markdown_table, text_table, with_mean, write_tables


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
            # Few distinct values: ties are the rule.
            rng.integers(0, int(rng.integers(2, 30)), int(rng.integers(2, 200))).astype(np.float32),
            rng,
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_rankings_agree_with_scikit_learn(drawn):
    scores, rng = drawn
    labels = rng.random(len(scores)) < 0.4
    ranking = Ranking.of(scores, labels)
    if not labels.any() or labels.all():
        assert ranking.auroc() is None
        assert ranking.average_precision() is None
        assert ranking.best_f1() == (None, None)
        return
    assert ranking.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert ranking.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    f1, threshold = ranking.best_f1()
    assert f1 == pytest.approx(f1_score(labels, scores >= threshold), abs=1e-9)
    assert f1 == pytest.approx(max(f1_score(labels, scores >= t) for t in set(scores)), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_pro_agrees_with_its_definition(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 8)) < rng.uniform(0.02, 0.5)
    scores = (rng.integers(0, 12, masks.shape) / 11).astype(np.float32)
    if not masks.any() or masks.all():
        assert pro(scores, masks) is None
    else:
        assert pro(scores, masks) == pytest.approx(slow_pro(scores, masks), abs=1e-9)


def test_perfect_and_inverted_maps():
    masks = np.zeros((4, 32, 32), bool)
    masks[2:, 8:26, 8:26] = True
    perfect = anomaly_metrics(masks.astype(np.float32), masks)
    for name in ("image_auroc", "pixel_auroc", "pro", "pixel_ap", "pixel_f1"):
        assert perfect[name] == pytest.approx(1.0), name
    # An AUROC below one half is reported as it is.
    inverted = anomaly_metrics(1 - masks.astype(np.float32), masks)
    assert inverted["pixel_auroc"] == 0.0


def test_image_score_is_the_maximum_of_the_pooled_map():
    maps = np.random.default_rng(0).random((5, 40, 37)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(maps, (16, 16), axis=(1, 2)).mean(axis=(3, 4))
    np.testing.assert_allclose(image_scores(maps), windows.max(axis=(1, 2)), rtol=1e-5)
    # A map smaller than the window is averaged whole.
    np.testing.assert_allclose(image_scores(maps[:, :8, :8]), maps[:, :8, :8].mean(axis=(1, 2)), rtol=1e-5)


def test_without_masks_pixel_metrics_are_absent():
    scores = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    metrics = anomaly_metrics(scores, None, labels=np.array([0, 0, 1, 1]))
    assert metrics["image_auroc"] is not None
    assert all(metrics[name] is None for name in ("pixel_auroc", "pixel_ap", "pixel_f1", "pro"))
    with pytest.raises(ValueError, match="labels"):
        anomaly_metrics(scores, None)


def test_without_defects_nothing_is_defined():
    scores = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    assert set(anomaly_metrics(scores, np.zeros((4, 20, 20), bool)).values()) == {None}


def test_tables_leave_the_undefined_out(tmp_path):
    row = dict.fromkeys(COLUMNS, 0.5)
    table = with_mean({"a": row, "b": {**row, "pro": None, "image_auroc": 0.9}})
    assert table[MEAN]["pro"] == 0.5
    assert table[MEAN]["image_auroc"] == pytest.approx(0.7)
    assert "n/a" in text_table(table).splitlines()[2]
    assert markdown_table(table).count("\n") == 5
    names = [path.name for path in write_tables(tmp_path, table)]
    assert names == ["metrics.csv", "metrics.json", "metrics.md"]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("class,image_auroc,")
    assert lines[2].split(",")[1:4] == ["0.9", "0.5", ""]
