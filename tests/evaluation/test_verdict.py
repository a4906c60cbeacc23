"""Words about verdicts: counts, bootstrap intervals, and doubts."""

import shutil

import numpy as np
import pytest

import evaluation_realnet
from evaluation.metrics import Ranking
from evaluation.verdict import image_auroc_interval, pixel_auroc_interval, verdict_of
from tests.in_process import run


def made_up(good: int, bad: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(0, 1, good), rng.normal(shift, 1, bad)])
    return 1 / (1 + np.exp(-scores)), np.arange(good + bad) >= good


def judged(scores, labels, threshold):
    maps = np.zeros((len(scores), 2, 2))
    return verdict_of(scores, labels, threshold, maps, maps.astype(bool), ~labels)


def test_the_counts_are_those_of_the_threshold():
    scores, labels = np.array([0.1, 0.5, 0.4, 0.9, 0.3]), np.array([False, False, True, True, True])
    verdict = judged(scores, labels, 0.4)
    assert verdict.counts() == ("1 of 2 good images called anomalous (50.0%), 1 of 3 defective images missed (33.3%)")
    row = verdict.row()
    assert [row[name] for name in ("good_images", "good_flagged", "defective_images", "defects_missed")] == [2, 1, 3, 1]
    assert judged(scores, labels, None).counts() == "2 good and 3 defective images; no threshold, so no verdicts"


def test_the_interval_of_image_auroc_holds_the_true_value_as_often_as_it_says():
    # AUROC of two normal distributions one deviation apart.
    truth, inside, trials = 0.7602, 0, 200
    for seed in range(trials):
        low, high = image_auroc_interval(*made_up(40, 40, 1.0, seed))
        inside += low <= truth <= high
    assert 0.88 <= inside / trials <= 0.99


def test_the_interval_of_pixel_auroc_surrounds_it_and_counts_images_not_pixels():
    rng = np.random.default_rng(0)
    maps, masks = rng.uniform(0.05, 0.3, (30, 16, 16)), np.zeros((30, 16, 16), bool)
    masks[15:, 4:8, 4:8] = True
    # Whole images differ: as many pixels as there are, only 15 images say how well defects are found.
    maps += masks * rng.uniform(-0.05, 0.3, (30, 1, 1))
    low, high = pixel_auroc_interval(list(maps), list(masks))
    auroc = Ranking.of(maps.ravel(), masks.ravel()).auroc()
    assert low < auroc < high
    assert high - low > 0.02
    assert pixel_auroc_interval(list(maps[:15]), list(masks[:15])) is None
    twice_as_large = [np.kron(values, np.ones((2, 2))) for values in maps]
    assert pixel_auroc_interval(twice_as_large, [np.kron(mask, np.ones((2, 2))).astype(bool) for mask in masks]) == (
        pytest.approx((low, high), abs=1e-6)
    )


def test_a_detector_that_knows_nothing_is_called_so():
    scores, labels = made_up(8, 20, 0.2)
    verdict = judged(scores, labels, scores.min())
    assert verdict.doubts[0].startswith("hardly better than chance: the 95% interval of image AUROC, ")
    assert verdict.doubts[1] == "hardly better than calling every image anomalous: F1 83.3, against 83.3"


def test_a_good_detector_is_not_doubted():
    scores, labels = made_up(30, 30, 4.0)
    assert judged(scores, labels, float(np.median(scores))).doubts == []


def test_a_few_missed_ones_among_many_defective_images_are_no_doubt():
    """13 good images, none flagged, and 31 defective ones, 6 of them missed, as examples/own_images.py finds."""
    labels = np.arange(44) >= 13
    scores = np.where(labels, 0.95, 0.2) + np.linspace(0, 0.01, 44)
    scores[13:19] = 0.8
    assert judged(scores, labels, 0.9).doubts == []


def test_verdicts_that_miss_most_or_flag_nearly_all_are_doubted():
    labels = np.arange(100) >= 50
    scores = np.linspace(0, 1, 100)
    missed = "hardly better than calling every image anomalous: F1 33.3, against 66.7"
    assert judged(scores, labels, scores[90]).doubts == [missed]
    (doubt,) = judged(scores, labels, scores[2]).doubts
    assert doubt.startswith("hardly better than calling every image anomalous: F1 67.6")


def test_one_label_alone_has_no_interval_and_no_doubt():
    for labels in (np.zeros(5, bool), np.ones(5, bool)):
        verdict = judged(np.linspace(0.1, 0.5, 5), labels, 0.3)
        assert (verdict.image_auroc, verdict.doubts, verdict.intervals()) == (None, [], "")


def test_one_image_is_counted_in_the_singular():
    scores, labels = np.array([0.1, 0.9]), np.array([False, True])
    verdict = judged(scores, labels, 0.5)
    assert verdict.counts() == "0 of 1 good image called anomalous (0.0%), 0 of 1 defective image missed (0.0%)"


def test_images_that_the_pixel_metrics_leave_out_are_counted():
    scores, labels = np.linspace(0, 1, 6), np.array([False, False, True, True, True, True])
    maps, said = np.zeros((6, 2, 2)), []
    for known in ([0, 1, 2], range(6), [0, 1]):
        mask_known = np.isin(np.arange(6), list(known))
        said.append(verdict_of(scores, labels, 0.5, maps, maps.astype(bool), mask_known).left_out())
    assert said == ["pixel metrics leave out 3 of 4 defective images, which have no mask", "", ""]


def test_images_that_training_has_seen_flatter_the_figures(detector, monkeypatch, capsys):
    """After a new split, test images may be among those that the checkpoint was trained on."""
    shutil.copytree(detector.out / "predict_checkpoints", detector.out / "seen_checkpoints")
    lists = detector.root / "data/tiny/samples"
    train, test = (lists / f"{split}_dots.json" for split in ("train", "test"))
    before = test.read_text()
    arguments = ["--dataset", "tiny", "--class_name", "dots", "--no-pictures", "--gallery", "0"]
    folders = {"checkpoints_dir": "seen_checkpoints/", "log_dir": "seen_log/", "results_dir": "seen_results/"}
    arguments += [word for key, folder in folders.items() for word in ("--set", f"saver.{key}={folder}")]
    said = {}
    try:
        for name, content in (("new", before), ("seen", before + "".join(train.read_text().splitlines(True)[:3]))):
            test.write_text(content)
            code, out, _ = run(evaluation_realnet.main, arguments, detector.root, monkeypatch, capsys)
            assert code == 0
            said[name] = out
    finally:
        test.write_text(before)
    assert "flattered" not in said["new"]
    text = "warning: dots is flattered: 3 of the 11 test images were trained on; train again, or test on other images"
    assert text in said["seen"]
    assert text.removeprefix("warning: ") in (detector.out / "seen_results/report.html").read_text()
