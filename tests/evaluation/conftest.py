"""A trained and evaluated detector, for the tests of predict.py and export.py."""

import json
from pathlib import Path

import pytest

import predict
from tests import quick_start
from tests.conftest import REPOSITORY, Workspace, script_environment
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


@pytest.fixture(scope="session")
def exported(detector: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the detector as model.onnx and model.pt2; copy them to change them."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    command = [str(REPOSITORY / "export.py"), "--checkpoint", "experiments/tiny/predict_checkpoints/dots"]
    done = quick_start.run([*command, "--output", str(folder)], detector.root, script_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference from PyTorch on 8 images") == 2
    return folder


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
