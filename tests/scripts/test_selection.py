"""Held-out good images through all commands: selection without the test list, thresholds, patience, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluation_realnet
import predict
import train_realnet
from datasets.build import build_held_out_set, build_realnet_train_set, choose_held_out
from evaluation.detector import Detector
from tests.in_process import run
from utils.checkpoint import BEST, LAST, load_checkpoint
from utils.config import load_config

HOLD_OUT = ["dataset.train.validation_fraction=0.5", "evaluator.select=synthetic"]
FILES = {name: f"ckpt_best_{name}.pth.tar" for name in ("test", "synthetic")}


@pytest.fixture
def call(workspace, tmp_path, monkeypatch, capsys):
    """call(main, *"key=value" or options): runs a command on one class, in folders of its own; returns its output."""
    folders = [f"saver.{key}_dir={tmp_path / key}" for key in ("checkpoints", "log", "vis", "results")]

    def run_it(main, *arguments: str, code: int = 0) -> str:
        settings = [part for value in folders for part in ("--set", value)]
        for value in arguments:
            settings += ["--set", value] if "=" in value and not value.startswith("-") else [value]
        common = ["--dataset", "tiny", "--class_name", "dots", "--device", "cpu"]
        found, out, err = run(main, [*common, *settings], workspace.root, monkeypatch, capsys)
        assert found == code, err
        return out if code == 0 else err

    return run_it


def test_a_detector_is_chosen_and_judged_without_the_test_list(call, workspace, tmp_path, monkeypatch, capsys):
    out = call(train_realnet.main, *HOLD_OUT, "trainer.max_epoch=3")
    assert "dots: 4 training images, 4 held out, 8 test images" in out
    folder = tmp_path / "checkpoints/dots"
    best = load_checkpoint(folder / BEST)
    assert (folder / BEST).samefile(folder / FILES["synthetic"])
    assert best["best_synthetic"] >= load_checkpoint(folder / LAST)["best_synthetic"]
    held_out = best["held_out"]
    assert len(held_out["files"]["dots"]) == len(held_out["normal"]["dots"]["scores"]) == 4

    images = workspace.root / "data/tiny/images"
    # The thresholds are those of the scores that prediction gives on the held-out images.
    detector = Detector.load(folder)
    scores = sorted(detector(images / file).score for file in held_out["files"]["dots"])
    assert np.allclose(scores, held_out["normal"]["dots"]["scores"], atol=1e-6)
    assert max(scores) < detector.thresholds.image

    def predicted(*options: str) -> tuple[str, list[dict]]:
        target = ["--checkpoint", str(folder), "--input", str(images / "dots/test"), "--output", str(tmp_path / "out")]
        code, out, err = run(predict.main, [*target, "--overwrite", *options], workspace.root, monkeypatch, capsys)
        assert code == 0, err
        return out, [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]

    text, before = predicted()
    assert "at most 1% of good images flagged, by 4 held-out good images (an estimate: 4 images can promise 20%" in text
    raw = {line["file"]: line for line in predicted("--raw-scores")[1]}
    assert raw[before[0]["file"]]["threshold"] == pytest.approx(detector.thresholds.image, abs=1e-6)
    for line in before:
        assert line["threshold"] == 0.5
        assert (line["score"] >= 0.5) == (line["verdict"] == "anomalous")
        assert line["verdict"] == raw[line["file"]]["verdict"]
        assert line["verdict"] == "normal" or line["anomalous_share"] > 0
    assert sorted(before, key=lambda line: line["score"]) == sorted(before, key=lambda line: raw[line["file"]]["score"])
    lenient = predicted("--target-fpr", "0.4", "--raw-scores")[1]
    assert lenient[0]["threshold"] < raw[lenient[0]["file"]]["threshold"]

    out = call(evaluation_realnet.main)
    sidecar = json.loads((folder / "ckpt_best.thresholds.json").read_text())
    assert sidecar["image"] == pytest.approx(detector.thresholds.image)
    assert sidecar["chosen_on"] == "held-out good images of train_dots.json"
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())["dots"]
    expected = sum(line["verdict"] == "anomalous" for line in before if "/good/" in f"/{line['file']}")
    assert (metrics["good_images"], metrics["good_flagged"]) == (4, expected)
    assert metrics["image_auroc_low"] <= metrics["image_auroc"] <= metrics["image_auroc_high"]
    assert "dots: " in out
    assert "of 4 good images called anomalous" in out
    rows = json.loads((tmp_path / "results/metrics_by_selection.json").read_text())
    on_test, without, gap = rows.values()
    assert list(rows)[1] == "dots: chosen without test (synthetic anomalies)"
    assert without == metrics
    assert gap["image_auroc"] == pytest.approx(on_test["image_auroc"] - without["image_auroc"])

    assert "--target-fpr 0: held-out good images can promise no such rate" in call(
        evaluation_realnet.main, "--target-fpr", "0", code=2
    )
    call(evaluation_realnet.main, "--threshold-rule", "best-f1")
    assert json.loads((folder / "ckpt_best.thresholds.json").read_text())["rule"] == "best F1 on the evaluation set"
    # The checkpoint still knows its held-out images.
    text, chosen = predicted("--target-fpr", "0.4")
    assert "at most 40% of good images flagged, by 4 held-out good images" in text
    assert chosen[0]["threshold"] == pytest.approx(lenient[0]["threshold"])


def test_a_test_list_without_defects_chooses_no_checkpoint(call, workspace, tmp_path):
    lines = (workspace.data / "samples/test_dots.json").read_text().splitlines()
    good = tmp_path / "good_dots.json"
    good.write_text("\n".join(line for line in lines if json.loads(line)["label"] == 0) + "\n")
    listed = [f"dataset.test.meta_file={tmp_path}/good_{{}}.json"]
    out = call(train_realnet.main, *HOLD_OUT, "trainer.max_epoch=1", *listed)
    assert "ckpt_best.pth.tar (synthetic " in out
    folder = tmp_path / "checkpoints/dots"
    assert not (folder / "ckpt_best_test.pth.tar").exists()
    call(evaluation_realnet.main, *listed)
    assert json.loads((folder / "ckpt_best.thresholds.json").read_text())["class_name"] == "dots"
    assert not list((tmp_path / "results").glob("metrics_by_selection.*"))


def test_tiles_have_a_threshold_of_their_own(call, workspace, tmp_path, monkeypatch, capsys):
    call(train_realnet.main, *HOLD_OUT, "trainer.max_epoch=1")
    folder = tmp_path / "checkpoints/dots"
    # Tables that this evaluation does not make are not left beside its own.
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results/metrics_by_selection.md").write_text("of an earlier evaluation")
    said = call(evaluation_realnet.main, "--tile", "32", "--overlap", "8", "--no-pictures")
    assert " --tile 32 --overlap 8 --input" in said
    assert not list((tmp_path / "results").glob("metrics_by_selection.*"))
    call(evaluation_realnet.main, "--no-pictures")
    sidecar = json.loads((folder / "ckpt_best.thresholds.json").read_text())
    tiled = sidecar["tiled"]["32/8"]
    assert len(tiled["normal"]["scores"]) == 4
    assert tiled["normal"]["scores"] != sidecar["normal"]["scores"]
    target = ["--checkpoint", str(folder), "--input", str(workspace.data / "images/dots/test"), "--raw-scores"]
    for overlap, expected in (("8", tiled["image"]), ("4", sidecar["image"])):
        options = [*target, "--output", str(tmp_path / f"out{overlap}"), "--tile", "32", "--overlap", overlap]
        code, out, _ = run(predict.main, options, workspace.root, monkeypatch, capsys)
        assert code == 0
        line = json.loads((tmp_path / f"out{overlap}/scores.jsonl").read_text().splitlines()[0])
        assert line["threshold"] == pytest.approx(expected, abs=1e-6)
        assert ("evaluation_realnet.py --tile 32 --overlap 4" in out) == (overlap == "4")


def test_a_run_without_progress_ends_and_says_so_when_resumed(call, tmp_path):
    settings = [*HOLD_OUT, "trainer.patience=2", "trainer.max_epoch=40", "trainer.optimizer.kwargs.lr=1e-9"]
    call(train_realnet.main, *settings)
    last = load_checkpoint(tmp_path / "checkpoints/dots" / LAST)
    assert last["stale_validations"] == 2
    assert last["epoch"] < 40
    out = call(train_realnet.main, *settings, "--resume")
    assert "nothing is left to do: 2 validations without a better checkpoint (trainer.patience) are done" in out


def test_a_resumed_run_holds_out_and_selects_the_same(call, tmp_path):
    settings = [*HOLD_OUT, "trainer.max_epoch=4"]
    call(train_realnet.main, *settings)
    folder = tmp_path / "checkpoints/dots"
    whole = {name: load_checkpoint(folder / name) for name in (BEST, LAST, *FILES.values())}
    call(train_realnet.main, *HOLD_OUT, "trainer.max_epoch=2", "--overwrite")
    call(train_realnet.main, *settings, "--resume")
    for name, before in whole.items():
        after = load_checkpoint(folder / name)
        for key in ("epoch", "best_metric", "best_synthetic", "held_out"):
            assert after[key] == before[key], (name, key)
        assert all(torch.equal(after["state_dict"][key], value) for key, value in before["state_dict"].items())


def test_patience_can_be_set_when_a_run_is_resumed(call, tmp_path):
    call(train_realnet.main, "trainer.max_epoch=1")
    call(train_realnet.main, "trainer.max_epoch=2", "trainer.patience=5", "--resume")
    assert load_checkpoint(tmp_path / "checkpoints/dots" / LAST)["stale_validations"] <= 1


def test_the_last_checkpoint_may_be_the_one_that_is_used(call, tmp_path):
    call(train_realnet.main, "dataset.train.validation_fraction=0.5", "evaluator.select=last")
    folder = tmp_path / "checkpoints/dots"
    assert (folder / BEST).samefile(folder / LAST)
    assert Detector.load(folder).thresholds.normal is not None
    out = call(evaluation_realnet.main)
    assert "warning" not in out.split("dots: pictures")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluator.select=synthetic"],
            "evaluator.select: synthetic needs held-out good images; set dataset.train.vali",
        ),
        (["evaluator.select=last", "trainer.patience=3"], "evaluator.select: last leaves nothing to be patient for"),
        (["dataset.train.validation_fraction=0.8"], "dataset.train.validation_fraction"),
    ],
)
def test_a_selection_that_cannot_be_made_is_one_error(settings, message, call):
    assert message in call(train_realnet.main, *settings, code=2)


def test_without_held_out_images_their_rule_is_refused(call):
    call(train_realnet.main, "trainer.max_epoch=1")
    err = call(evaluation_realnet.main, "--threshold-rule", "held-out", code=2)
    assert "ckpt_best.pth.tar has no held-out good images; train it with dataset.train.validation_fraction" in err


# ---- the held-out images ---------------------------------------------------------------------------------------------


def test_validation_images_are_the_same_each_time_and_of_all_types(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)
    config = load_config(workspace.out / "realnet.yaml", ["dataset.train.validation_fraction=0.5"], "realnet")
    held_out = choose_held_out(config.dataset, "dots", 1)
    assert held_out == choose_held_out(config.dataset, "dots", 1)
    train_set = build_realnet_train_set(config.dataset, "dots", 1, held_out)
    assert not {sample.filename for sample in train_set.samples} & set(held_out)
    assert len(train_set) + len(held_out) == 8
    images = build_held_out_set(config.dataset, "dots", train_set, held_out)
    again = build_held_out_set(config.dataset, "dots", train_set, held_out)
    assert [sample.label for sample in images.samples] == [0] * 4 + [1] * (len(images) - 4)
    assert len(images) >= 4 + 20
    assert {sample.defect_type for sample in images.samples[4:]} == {"dtd", "cutpaste", "self", "noise"}
    for index, sample in enumerate(images.samples):
        first, second = images[index], again[index]
        assert torch.equal(first["image"], second["image"])
        assert bool(first["mask"].any()) == bool(sample.label)
        assert sample.mask_known


def test_the_presets_hold_out_images():
    for path in sorted(Path("experiments/presets").glob("*.yaml")):
        preset = yaml.safe_load(path.read_text())
        assert preset["dataset"]["train"]["validation_fraction"] == 0.2
        assert preset["evaluator"]["select"] == "synthetic"
