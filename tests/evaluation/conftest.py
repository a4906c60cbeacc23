"""A trained and evaluated detector, for the tests of predict.py and export.py."""

import json

import pytest

import predict
from tests.conftest import Workspace
from tests.in_process import run


@pytest.fixture(scope="session")
def detector(workspace: Workspace) -> Workspace:
    """The workspace, with one class trained and evaluated."""
    settings = ["--class_name", "dots", "--set", "saver.checkpoints_dir=predict_checkpoints/"]
    folders = ["--set", "saver.log_dir=predict_log/", "--set", "saver.vis_dir=predict_vis/"]
    results = ["--set", "saver.results_dir=predict_results/"]
    workspace.run("train_realnet.py", *settings, *folders, *results)
    workspace.run("evaluation_realnet.py", *settings, *folders, *results)
    return workspace


@pytest.fixture
def score(detector, tmp_path, monkeypatch, capsys):
    """Runs predict.py on a folder; returns its exit code, stdout, stderr and the lines of scores.jsonl by file."""

    def call(folder, *options, output="out", checkpoint="experiments/tiny/predict_checkpoints/dots"):
        target = tmp_path / output
        arguments = ["--checkpoint", str(checkpoint), "--input", str(folder), "--output", str(target), *options]
        code, out, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
        file = target / "scores.jsonl"
        # parse_constant: NaN is not JSON.
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        return code, out, err, {line["file"]: line for line in lines}

    return call
