"""predict.py and export.py, with a detector trained by the scripts."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import export
import predict
from evaluation.thresholds import Thresholds, sidecar, write_thresholds
from tests.conftest import REPOSITORY
from tests.in_process import run
from tests.layout_trees import image_file

CLASS_FOLDER = "experiments/tiny/predict_checkpoints/dots"
TEST_FOLDER = "data/tiny/images/dots/test"


def rows_of(folder):
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_gives_scores_verdicts_and_pictures(detector, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    code, out, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 0, err
    rows = rows_of(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [line["file"] for line in lines]
    assert len(rows) == 8
    threshold = json.loads(sidecar(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar").read_text())["image"]
    for line in lines:
        assert line["verdict"] == ("anomalous" if line["score"] >= threshold else "normal")
        name = line["file"].removesuffix(".png")
        assert Image.open(tmp_path / f"out/heatmaps/{name}.png").size == (64, 64)
        mask = np.asarray(Image.open(tmp_path / f"out/masks/{name}.png"))
        assert mask.shape == (64, 64)
        assert np.mean(mask > 0) == pytest.approx(line["anomalous_share"], abs=1e-5)
    assert f"{sum(line['verdict'] == 'anomalous' for line in lines)} anomalous, 0 unreadable" in out


def test_verdicts_reach_the_best_f1_of_the_evaluation(detector, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    run(predict.main, [*arguments, "--no-pictures", "--batch-size", "3"], detector.root, monkeypatch, capsys)
    rows = rows_of(tmp_path / "out")
    assert not (tmp_path / "out/heatmaps").exists()
    flagged = np.array([row["verdict"] == "anomalous" for row in rows])
    truth = np.array([row["file"].startswith("spot") for row in rows])
    f1 = 2 * np.sum(flagged & truth) / (flagged.sum() + truth.sum())
    expected = json.loads((detector.out / "predict_results/metrics.json").read_text())["dots"]["image_f1"]
    assert f1 == pytest.approx(expected, abs=1e-9)


def test_two_hundred_images_with_twenty_broken(detector, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "new images"
    for i in range(200):
        size = tuple(int(v) for v in rng.integers(20, 120, 2))
        suffix = (".png", ".JPG", ".bmp", ".tif", ".webp")[i % 5]
        path = image_file(folder / f"lot {i % 3}/bild_ü{i:03d}{suffix}", i, size)
        if i % 10 == 0:
            path.write_bytes((b"", b"not an image", path.read_bytes()[:60])[i // 10 % 3])
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", str(folder), "--output", str(tmp_path / "out")]
    code, out, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 1
    assert len(rows_of(tmp_path / "out")) == 180
    assert len(err.splitlines()) == 20
    assert all(line.startswith(f"unreadable: {folder}") for line in err.splitlines())
    assert len(list((tmp_path / "out/masks").rglob("*.png"))) == 180
    assert "180 images" in out
    assert "20 unreadable" in out


def test_lists_names_on_stdin_and_single_images(detector, tmp_path, monkeypatch, capsys):
    names = [f"{TEST_FOLDER}/spot/00{i}.png" for i in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    inputs = {
        "list": str(tmp_path / "list.txt"),
        "image_list": "data/tiny/samples/test_dots.json",
        "stdin": "-",
        "image": names[0],
    }
    scores = {}
    for name, argument in inputs.items():
        monkeypatch.setattr(sys, "stdin", iter(f"{line}\n" for line in names))
        arguments = ["--checkpoint", f"{CLASS_FOLDER}/ckpt_best.pth.tar", "--input", argument]
        output = ["--output", str(tmp_path / name)]
        code, _, err = run(predict.main, [*arguments, *output], detector.root, monkeypatch, capsys)
        assert code == 0, err
        scores[name] = {row["file"].rpartition("/")[2]: float(row["score"]) for row in rows_of(tmp_path / name)}
    assert len(scores["list"]) == len(scores["stdin"]) == 3
    assert len(scores["image"]) == 1
    assert scores["list"] == pytest.approx(scores["stdin"], abs=1e-5)
    assert scores["image"]["000.png"] == pytest.approx(scores["list"]["000.png"], abs=1e-5)


def test_images_of_the_same_name_are_all_written(detector, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "a.jpg", "A.bmp"):
        image_file(tmp_path / "in" / name, name)
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert len(list((tmp_path / "out/heatmaps").iterdir())) == 3


def test_the_same_command_writes_the_same_bytes(detector, tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        arguments = ["--checkpoint", CLASS_FOLDER, "--input", TEST_FOLDER, "--output", str(tmp_path / name)]
        tiles = ["--tile", "32", "--overlap", "8"]
        assert run(predict.main, [*arguments, *tiles], detector.root, monkeypatch, capsys)[0] == 0
    first, second = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_thresholds_can_be_missing_or_on_the_command_line(detector, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "alone.pth.tar"
    shutil.copy(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", checkpoint)
    arguments = ["--checkpoint", str(checkpoint), "--input", TEST_FOLDER]
    code, out, _ = run(predict.main, [*arguments, "--output", str(tmp_path / "a")], detector.root, monkeypatch, capsys)
    assert code == 0
    assert "scores without verdicts" in out
    assert {row["verdict"] for row in rows_of(tmp_path / "a")} == {""}
    assert not (tmp_path / "a/masks").exists()
    forced = ["--output", str(tmp_path / "b"), "--threshold", "-1", "--pixel-threshold", "2"]
    run(predict.main, [*arguments, *forced], detector.root, monkeypatch, capsys)
    assert {row["verdict"] for row in rows_of(tmp_path / "b")} == {"anomalous"}
    assert {row["anomalous_share"] for row in rows_of(tmp_path / "b")} == {"0.0"}


def test_checkpoints_without_settings_need_them(detector, tmp_path, monkeypatch, capsys):
    content = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)
    path = tmp_path / "reference.pth.tar"
    torch.save({name: content[name] for name in ("epoch", "arch", "state_dict", "best_metric")}, path)
    arguments = ["--checkpoint", str(path), "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2
    assert "--config" in err
    arguments += ["--config", "experiments/tiny/realnet.yaml", "--threshold", "0.5"]
    assert run(predict.main, arguments, detector.root, monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"net": []}, "net: needs a part named backbone"),
        ({"dataset": 3}, "dataset"),
        ({"trainer": None, "dataset": {}}, "dataset.type"),
        ({"unknown": 1}, "unknown"),
        ({"evaluator": {"metrics": "all"}}, "evaluator"),
    ],
)
def test_spoiled_settings_in_a_checkpoint_are_named(changes, text, detector, tmp_path, monkeypatch, capsys):
    content = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)
    content["config"].update(changes)
    path = tmp_path / "spoiled.pth.tar"
    torch.save(content, path)
    arguments = ["--checkpoint", str(path), "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2, err
    assert f"{path}: " in err
    assert text in err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--checkpoint": "gone.pth.tar"}, "gone.pth.tar does not exist"),
        ({"--checkpoint": "experiments/tiny"}, "experiments/tiny/ckpt_best.pth.tar does not exist"),
        ({"--checkpoint": "experiments/tiny/realnet.yaml"}, "is not a checkpoint that can be loaded safely"),
        ({"--checkpoint": "broken.onnx"}, "broken.onnx is not a model that export.py wrote"),
        ({"--input": "gone"}, "--input gone does not exist"),
        ({"--input": "data/tiny/samples"}, "--input data/tiny/samples: holds no image"),
        ({"--input": "bad.txt"}, "bad.txt, line 1: not a JSON object with a filename"),
        ({"--tile": "8"}, "--tile 8: at least 16"),
        ({"--tile": "32", "--overlap": "32"}, "--overlap 32: has to lie in 0 .. 31"),
        ({"--overlap": "32"}, "--overlap needs --tile"),
        ({"--batch-size": "0"}, "--batch-size 0"),
    ],
)
def test_wrong_use_is_one_line(changes, text, detector, tmp_path, monkeypatch, capsys):
    (detector.root / "broken.onnx").write_bytes(b"no model")
    (detector.root / "bad.txt").write_text('{"file": 1}\n')
    options = {"--checkpoint": CLASS_FOLDER, "--input": TEST_FOLDER, "--output": str(tmp_path / "out"), **changes}
    arguments = [part for pair in options.items() for part in pair]
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2
    assert text in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_results_are_overwritten_only_on_request(detector, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    assert run(predict.main, arguments, detector.root, monkeypatch, capsys)[0] == 0
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2
    assert "--overwrite" in err
    assert run(predict.main, [*arguments, "--overwrite"], detector.root, monkeypatch, capsys)[0] == 0


# ---- export ----------------------------------------------------------------------------------------------------------


def test_exported_models_give_the_same_verdicts(detector, exported, tmp_path, monkeypatch, capsys):
    assert not (exported / "model.onnx.data").exists()
    assert_same_verdicts(exported / "model.onnx", detector, tmp_path, monkeypatch, capsys)


def test_weights_that_one_onnx_file_cannot_hold_lie_beside_it(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    arguments = ["--checkpoint", CLASS_FOLDER, "--output", str(tmp_path), "--format", "onnx"]
    code, out, err = run(export.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 0, err
    assert out.count("largest difference from PyTorch on 8 images") == 1
    assert (tmp_path / "model.onnx.data").exists()
    assert not (tmp_path / "model.pt2").exists()
    assert_same_verdicts(tmp_path / "model.onnx", detector, tmp_path, monkeypatch, capsys)


def assert_same_verdicts(model, detector, tmp_path, monkeypatch, capsys):
    results = []
    for checkpoint in (CLASS_FOLDER, str(model)):
        output = tmp_path / str(len(results))
        arguments = ["--checkpoint", checkpoint, "--input", TEST_FOLDER, "--output", str(output)]
        assert run(predict.main, arguments, detector.root, monkeypatch, capsys)[0] == 0
        results.append(rows_of(output))
    assert [row["verdict"] for row in results[0]] == [row["verdict"] for row in results[1]]
    scores = [[float(row["score"]) for row in rows] for rows in results]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_metadata_says_how_to_prepare_images(detector, exported, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    preprocessing = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert preprocessing["size"] == {"height": 64, "width": 64}
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    # Prepare an image by hand, as the metadata says.
    image = Image.open(detector.root / TEST_FOLDER / "spot/000.png").convert("RGB")
    values = (np.asarray(image, np.float32) / 255 - preprocessing["mean"]) / preprocessing["std"]
    maps, scores = session.run(None, {"image": values.astype(np.float32).transpose(2, 0, 1)[None]})
    assert maps.shape == (1, 64, 64)
    arguments = ["--checkpoint", CLASS_FOLDER, "--input", f"{TEST_FOLDER}/spot/000.png"]
    run(predict.main, [*arguments, "--output", str(tmp_path / "out")], detector.root, monkeypatch, capsys)
    assert float(rows_of(tmp_path / "out")[0]["score"]) == pytest.approx(float(scores[0]), abs=1e-4)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extras_are_named(missing, detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["--checkpoint", CLASS_FOLDER, "--output", str(tmp_path)]
    code, _, err = run(export.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 1
    assert f"{missing} is not installed; pip install -r requirements-export.txt" in err
    assert (REPOSITORY / "requirements-export.txt").is_file()


def test_each_class_of_a_multi_class_model_has_its_own_thresholds(detector, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "ckpt_best.pth.tar"
    shutil.copy(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", checkpoint)
    classes = {"strict": Thresholds(0.0, 0.0, "by hand"), "lenient": Thresholds(1.1, 1.1, "by hand")}
    fingerprint = json.loads(sidecar(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar").read_text())["fingerprint"]
    write_thresholds(checkpoint, Thresholds(0.5, 0.5, "by hand", classes=classes, fingerprint=fingerprint))
    common = ["--checkpoint", str(checkpoint), "--input", TEST_FOLDER, "--no-pictures", "--overwrite"]
    for name, verdict in (("strict", "anomalous"), ("lenient", "normal")):
        arguments = [*common, "--output", str(tmp_path / name), "--class_name", name]
        code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
        assert code == 0, err
        assert {row["verdict"] for row in rows_of(tmp_path / name)} == {verdict}
    arguments = [*common, "--output", str(tmp_path / "none"), "--class_name", "other"]
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2
    assert "no thresholds for the class 'other'; known are strict, lenient" in err


def test_an_export_is_not_replaced_unasked_and_flipped_bits_in_it_are_noticed(
    detector, exported, tmp_path, monkeypatch, capsys
):
    for file in exported.iterdir():
        shutil.copy2(file, tmp_path)
    models = [tmp_path / f"model.{ending}" for ending in ("onnx", "pt2")]
    before = [model.stat().st_mtime_ns for model in models]
    arguments = ["--checkpoint", CLASS_FOLDER, "--output", str(tmp_path), "--input", TEST_FOLDER]
    code, _, err = run(export.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 2
    assert "model.onnx already exists; choose another --output, or pass --overwrite" in err
    arguments += ["--overwrite", "--format", "torch"]
    assert run(export.main, arguments, detector.root, monkeypatch, capsys)[0] == 0
    assert [model.stat().st_mtime_ns == time for model, time in zip(models, before, strict=True)] == [True, False]
    for model in models:
        whole = bytearray(model.read_bytes())
        whole[len(whole) // 2] ^= 4
        model.write_bytes(whole)
        arguments = ["--checkpoint", str(model), "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
        code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
        assert code == 2
        assert f"{model.name} does not match" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 4}, "it takes 4 images at once"),
        ({"size": 32}, "its input has the shape"),
        ({"name": "picture"}, "its inputs are picture"),
        ({"output": "score"}, "no output called anomaly_map"),
        ({"config": "[1]"}, "its settings are [1], not a mapping"),
        ({"config": "[" * 60 + "]" * 60}, "not a mapping"),
        ({"thresholds": "3"}, "has to hold a JSON object"),
        ({"factor": 7.0}, "outside 0 .. 1"),
    ],
)
def test_foreign_onnx_files_are_refused_or_their_images_not_scored(
    change, says, detector, exported, tmp_path, monkeypatch, capsys
):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    metadata = onnxruntime.InferenceSession(str(exported / "model.onnx")).get_modelmeta().custom_metadata_map
    side, name, output = change.get("size", 64), change.get("name", "image"), change.get("output", "anomaly_map")
    shape = [change.get("batch", "N"), 3, side, side]
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "value"], [output]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("value", TensorProto.FLOAT, [], [change.get("factor", 0.5)]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    for key in ("config", "thresholds", "fingerprint"):
        model.metadata_props.add(key=key, value=change.get(key, metadata[key]))
    path = tmp_path / "foreign.onnx"
    onnx.save(model, str(path))
    arguments = ["--checkpoint", str(path), "--input", TEST_FOLDER, "--output", str(tmp_path / "out")]
    code, _, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
    assert code == (1 if "factor" in change else 2), err
    assert says in err
