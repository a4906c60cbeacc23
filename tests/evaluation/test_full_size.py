"""Pixel metrics at the images' own sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation_realnet
import train_realnet
from datasets.images import Preprocessing
from datasets.lists import ImageList, Sample
from datasets.realnet import RealNetTestSet
from evaluation.metrics import flat_pixels, image_scores, pixel_ranking
from evaluation.results import evaluate_class
from evaluation.score import ScoredImages, at_own_sizes
from tests.in_process import run
from utils.distributed import Run

RUN = Run(0, 1, torch.device("cpu"))


def as_objects(arrays):
    held = np.empty(len(arrays), object)
    for index, array in enumerate(arrays):
        held[index] = array
    return held


@pytest.fixture
def test_set(tmp_path):
    """Two good and two defective images of four sizes; a defect has two pixels."""
    samples = []
    for index, (width, height) in enumerate([(64, 48), (100, 75), (200, 150), (16, 12)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{index}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[7, 5:7] = 255
        Image.fromarray(mask).save(tmp_path / f"{index}_mask.png")
        samples.append(Sample(f"{index}.png", int(index > 1), "x", f"{index}_mask.png" if index > 1 else None))
    return RealNetTestSet(ImageList(samples, tmp_path), Preprocessing((12, 16), (0.5,) * 3, (0.5,) * 3))


def test_a_defect_of_two_pixels_counts_at_full_size(test_set):
    maps = np.random.default_rng(0).random((4, 12, 16)).astype(np.float32) / 2
    maps[2:, :2, :3] = 0.9
    masks = np.stack([test_set.mask(index) for index in range(4)]).astype(bool)
    scored = ScoredImages(test_set.samples, maps, image_scores(maps, (4, 4)), masks)
    full = at_own_sizes(scored, test_set, RUN, None)
    assert [mask.sum() for mask in masks] == [0, 0, 0, 2]
    assert [mask.sum() for mask in full.masks] == [0, 0, 2, 2]
    assert [values.shape for values in full.maps] == [(48, 64), (75, 100), (150, 200), (12, 16)]
    # An image of the input size keeps its map, bit for bit.
    assert np.array_equal(full.maps[3], maps[3])
    at_input, at_full = (evaluate_class("x", images, target_fpr=0.25) for images in (scored, full))
    assert at_full.metrics["aupimo"] == 0.5  # the second defect lies where the map is low
    assert at_input.metrics["aupimo"] == 0
    assert at_full.thresholds.image == at_input.thresholds.image
    assert at_full.metrics["image_auroc"] == at_input.metrics["image_auroc"]
    normal = np.concatenate([values.ravel() for values in full.maps[:2]])
    assert 0.2 < np.mean(normal >= at_full.thresholds.pixel) <= 0.25


def test_separate_maps_rank_like_stacked_ones():
    rng = np.random.default_rng(0)
    masks, maps = rng.random((5, 9, 8)) < 0.2, rng.integers(0, 9, (5, 9, 8)).astype(np.float32)
    stacked, separate = pixel_ranking(maps, masks), pixel_ranking(as_objects(maps), as_objects(masks))
    for name, value in vars(stacked).items():
        np.testing.assert_array_equal(getattr(separate, name), value)
    assert flat_pixels(maps).base is maps


def test_the_tables_name_the_size(workspace, monkeypatch, capsys):
    folders = [f"saver.{key}_dir=full_{key}/" for key in ("checkpoints", "log", "vis", "results")]
    common = ["--dataset", "tiny", "--device", "cpu", "--class_name", "dots", "--set", "trainer.max_epoch=1"]
    common += ["--set", "dataset.input_size=[32, 32]", *(part for folder in folders for part in ("--set", folder))]
    code, _, err = run(train_realnet.main, common, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    results = {}
    for options in ((), ("--full-size",)):
        code, out, err = run(evaluation_realnet.main, [*common, *options], workspace.root, monkeypatch, capsys)
        assert code == 0, err
        note = "the images' own sizes" if options else "the model's input size"
        folder = workspace.out / "full_results"
        for text in (out, (folder / "metrics.md").read_text(), (folder / "metrics_by_defect.md").read_text()):
            assert note in text
        results[options] = json.loads((folder / "metrics.json").read_text())["dots"]
    at_input, at_full = results.values()
    assert at_input.keys() == at_full.keys()
    assert all(at_input[name] == at_full[name] for name in at_input if name.startswith("image"))
    assert at_input["pixel_auroc"] != at_full["pixel_auroc"]
