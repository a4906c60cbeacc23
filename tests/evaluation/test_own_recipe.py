"""The recipe for data sets of one's own, through all commands: other starts, the residual's map, averaged weights."""

import json

import numpy as np
import pytest
import torch

import evaluation_realnet
import export
import predict
import train_realnet
from evaluation.detector import Detector
from tests.in_process import run
from utils.checkpoint import BEST, LAST, load_checkpoint

RECIPES = [("identity", "both", None), ("identity", "residual+novelty", None), ("subspace", "residual", 0.5)]


@pytest.mark.parametrize(
    ("start", "score", "ema"), RECIPES, ids=["identity, both", "identity, novelty", "subspace, residual, averaged"]
)
def test_a_detector_trains_evaluates_predicts_and_exports(start, score, ema, workspace, tmp_path, monkeypatch, capsys):
    recon = f"{{num_res_blocks: 1, channel_mult: [1, 2], attention_mult: [], start: {start}}}"
    values = [f"net.recon.kwargs={recon}", f"evaluator.score={score}", "trainer.max_step=3"]
    values += [] if ema is None else [f"trainer.ema_decay={ema}"]
    values += ["trainer.schedule={type: cosine, warmup_steps: 1}"]
    values += [f"saver.{key}_dir={tmp_path / key}" for key in ("checkpoints", "log", "vis", "results")]
    common = ["--dataset", "tiny", "--class_name", "dots", "--device", "cpu"]
    options = [part for value in values for part in ("--set", value)]

    def call(main, *arguments: str) -> str:
        code, out, err = run(main, arguments, workspace.root, monkeypatch, capsys)
        assert (code, err) == (0, "")
        return out

    out = call(train_realnet.main, *common, *options)
    assert ("normal subspace of block1: " in out) == (start == "subspace" or "novelty" in score)
    folder = tmp_path / "checkpoints/dots"
    best, last = load_checkpoint(folder / BEST), load_checkpoint(folder / LAST)
    # What was validated is what is saved for use.
    assert "ema_state_dict" not in best
    averaged = last["state_dict" if ema is None else "ema_state_dict"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in averaged.items())
    means = best["state_dict"]["score.statistics.block1_mean"]
    assert (means > 0).all()
    assert not torch.equal(means, torch.ones_like(means))
    projections = [name for name in best["state_dict"] if name.endswith("block1_subspace.weight")]
    assert len(projections) == (start == "subspace") + ("novelty" in score)
    for name in projections:
        weight = best["state_dict"][name]
        assert torch.allclose(weight @ weight, weight, atol=1e-4)
        assert 0 < torch.trace(weight) < len(weight)

    folders = [part for value in values if value.startswith("saver.") for part in ("--set", value)]
    call(evaluation_realnet.main, *common, *folders)
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())["dots"]
    assert 0 <= metrics["image_auroc"] <= 1
    call(export.main, "--checkpoint", str(folder), "--output", str(tmp_path / "exported"), "--format", "onnx")
    images = "data/tiny/images/dots/test"
    call(predict.main, "--checkpoint", str(folder), "--input", images, "--output", str(tmp_path / "out"))
    image = next((workspace.root / images / "spot").iterdir())
    ours, exported = (Detector.load(path)(image) for path in (folder, tmp_path / "exported/model.onnx"))
    assert np.allclose(ours.map, exported.map, atol=1e-4)
    assert ours.score == pytest.approx(exported.score, abs=1e-4)
