"""Which checkpoints a detector's training keeps, and by which figures."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from torch import nn

import train_realnet
from evaluation import validation
from evaluation.thresholds import sidecar
from tests.scripts.conftest import ALONE, training_of
from utils.checkpoint import BEST, LAST, load_checkpoint
from utils.signals import StopRequest


def test_save_best_writes_only_what_is_at_least_as_good(configured, tmp_path):
    training = training_of(configured("realnet"), nn.Linear(1, 1), figures={"best_metric": -1.0})
    for epoch, (metric, saved, best) in enumerate(
        [(0.5, True, 0.5), (0.4, False, 0.5), (0.5, True, 0.5), (float("-inf"), False, 0.5), (0.6, True, 0.6)]
    ):
        training.progress.epoch = epoch
        sidecar(tmp_path / BEST).write_text("thresholds")
        train_realnet.keep_best(training, {"test": metric}, "test", tmp_path)
        content = load_checkpoint(tmp_path / BEST)
        assert not (tmp_path / "ckpt_best_test.pth.tar").exists()
        assert (content["epoch"] == epoch) == saved
        assert content["best_metric"] == training.figures["best_metric"] == best
        # Thresholds stay as long as the checkpoint that they belong to.
        assert sidecar(tmp_path / BEST).exists() != saved


def test_each_selection_has_its_checkpoint_and_no_content_is_stored_twice(configured, tmp_path):
    figures = {"best_metric": -1.0, "best_synthetic": -1.0, "stale_validations": 0}
    training = training_of(configured("realnet", "trainer.patience=2"), nn.Linear(1, 1), figures=figures)
    saved = {}
    for epoch, (test, synthetic) in enumerate([(0.5, 0.5), (0.6, 0.4), (0.4, 0.7), (0.3, 0.7)]):
        training.progress.epoch = epoch
        training.measured = {"held_out": {"epoch": epoch}}
        train_realnet.keep_best(training, {"test": test, "synthetic": synthetic}, "synthetic", tmp_path)
        names = {"best": BEST, "test": "ckpt_best_test.pth.tar", "synthetic": "ckpt_best_synthetic.pth.tar"}
        paths = {name: tmp_path / file for name, file in names.items()}
        saved[epoch] = {name: load_checkpoint(path)["epoch"] for name, path in paths.items()}
        assert paths["best"].samefile(paths["synthetic"])
        assert paths["test"].samefile(paths["best"]) == (epoch == 0)
        assert load_checkpoint(paths["best"])["held_out"] == {"epoch": saved[epoch]["best"]}
    assert [saved[epoch]["test"] for epoch in range(4)] == [0, 1, 1, 1]
    # An equal metric is as good, so the newer checkpoint is kept, but it is no progress.
    assert [saved[epoch]["best"] for epoch in range(4)] == [0, 0, 2, 3]
    assert training.figures == {"best_metric": 0.6, "best_synthetic": 0.7, "stale_validations": 1}
    assert not training.out_of_patience
    train_realnet.keep_best(training, {"test": 0.9, "synthetic": 0.1}, "synthetic", tmp_path)
    assert training.out_of_patience
    assert training.is_over


@pytest.mark.parametrize(
    ("override", "lists", "anew"),
    [
        ("random_seed=100", ("8 images", "3 images"), ["best_metric"]),
        ("random_seed=100", ("7 images", "4 images"), ["best_synthetic"]),
        ("evaluator.key_metric=image", ("8 images", "4 images"), ["best_metric", "best_synthetic"]),
        ("random_seed=101", ("8 images", "4 images"), []),
    ],
)
def test_only_figures_of_other_images_or_another_metric_begin_anew(configured, tmp_path, override, lists, anew):
    first = {"best_metric": -1.0, "best_synthetic": -1.0, "stale_validations": 0}
    before = training_of(configured("realnet"), nn.Linear(1, 1), figures=first)
    before.figures = reached = {"best_metric": 0.5, "best_synthetic": 0.6, "stale_validations": 2}
    after = training_of(configured("realnet", override), nn.Linear(1, 1), figures=dict(first))
    after.train_list, after.test_list = lists
    after.resume(before.state_dict(), tmp_path)
    begun = [*anew, "stale_validations"] if anew else []
    assert after.figures == {name: first[name] if name in begun else reached[name] for name in reached}


def test_the_newest_checkpoint_may_be_the_best(configured, tmp_path):
    training = training_of(configured("realnet"), nn.Linear(1, 1), figures={"best_metric": -1.0})
    for epoch in range(2):
        (tmp_path / LAST).unlink(missing_ok=True)
        (tmp_path / LAST).write_text(str(epoch))
        sidecar(tmp_path / BEST).write_text("thresholds")
        train_realnet.link_newest(training, tmp_path)
        train_realnet.link_newest(training, tmp_path)  # as after a kill
        assert (tmp_path / BEST).samefile(tmp_path / LAST)
        assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST]


@pytest.mark.parametrize(
    ("wanted", "held_out", "tested", "expected"),
    [
        ("test", True, True, "test"),
        ("test", True, False, "synthetic"),
        ("test", False, False, "last"),
        ("synthetic", True, True, "synthetic"),
        ("synthetic", False, True, "last"),
        ("last", True, True, "last"),
    ],
)
def test_what_the_best_checkpoint_is_selected_by(wanted, held_out, tested, expected, configured):
    config = configured("realnet", f"evaluator.select={wanted}")
    assert train_realnet.selection(config, "dots", held_out, tested) == expected


BOTH = {"image_auroc": 0.9, "pixel_auroc": 0.6}


@pytest.mark.parametrize(
    ("key", "metrics", "expected"),
    [
        ("mean", BOTH, 0.75),
        ("image", BOTH, 0.9),
        ("pixel", BOTH, 0.6),
        ("mean", {"image_auroc": 0.9}, 0.9),
        ("pixel", {"image_auroc": 0.9}, 0.9),
        ("image", {"pixel_auroc": 0.6}, 0.6),
        ("mean", {}, 0.0),
    ],
)
def test_the_best_checkpoint_is_chosen_by_the_metric_of_the_settings(key, metrics, expected, configured, monkeypatch):
    assert validation.key_metric(metrics, key) == pytest.approx(expected)
    training = training_of(configured("realnet", f"evaluator.key_metric={key}"), nn.Linear(1, 1))
    monkeypatch.setattr(validation, "predict_maps", lambda *args, **kwargs: SimpleNamespace(finite=True))
    monkeypatch.setattr(validation, "validation_metrics", lambda scored: metrics)
    monkeypatch.setattr(validation, "heat_map_sheet", lambda scored, shown: np.zeros((1, 1, 3), np.uint8))
    test_set = MagicMock(samples=[SimpleNamespace(defect_type="good")], __len__=lambda self: 1)
    metric = validation.validate_test(training, test_set, [], MagicMock(), StopRequest(ALONE))
    assert metric == pytest.approx(expected)
