"""The result files of predict.py and evaluation_realnet.py, interrupted runs, tiles, and predictions of model.pt2."""

import csv
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.lists import Sample
from evaluation.detector import Detector
from evaluation.exported import read_program
from evaluation.inputs import ResultNames
from evaluation.prediction_files import Results
from evaluation.results import draw_images, evaluate_class
from evaluation.score import ScoredImages
from evaluation.tables import COLUMNS, write_tables
from evaluation.thresholds import Thresholds
from models.realnet import RealNet
from tests.layout_trees import image_file
from utils.distributed import Run
from utils.errors import RunError, Stopped, UsageError
from utils.prefetch import groups, prefetch
from utils.signals import StopRequest

ALONE = Run(0, 1, torch.device("cpu"))
CLASS_FOLDER = "experiments/tiny/predict_checkpoints/dots"
TEST_FOLDER = "data/tiny/images/dots/test"


def csv_rows(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def scored_images(names, maps):
    samples = [Sample(name, int("good" not in name), "part") for name in names]
    maps = np.asarray(maps, np.float32)
    shown = {i: np.full((*maps.shape[1:], 3), 10 * i, np.uint8) for i in range(len(names))}
    return ScoredImages(samples, maps, maps.max(axis=(1, 2)), np.zeros(maps.shape, bool), shown)


def test_an_evaluation_of_maps_that_are_not_finite_fails():
    maps = np.random.default_rng(0).random((3, 8, 8))
    maps[2, 0, 0] = np.nan
    scored = scored_images(["part/test/good/0.png", "part/test/good/1.png", "part/test/hole/0.png"], maps)
    with pytest.raises(RunError, match=r"part/test/hole/0\.png: its anomaly map is not finite"):
        evaluate_class("part", scored)


def test_a_good_image_at_the_very_threshold_is_an_error():
    scored = scored_images(["part/test/good/0.png", "part/test/hole/0.png"], np.zeros((2, 8, 8)))
    result = evaluate_class("part", replace(scored, scores=np.array([0.5, 0.5])))
    result.thresholds = Thresholds(0.5, None, "by hand")
    assert (result.errors() > 0).tolist() == [True, False]


# ---- result files ----------------------------------------------------------------------------------------------------


def test_results_are_named_so_that_none_overwrites_another(score, tmp_path):
    names = ["night/0/x.png", "night/0/x.bmp", "day/0/x.png", "day/0/X.tif", "x_2.png", "x.png", "x.webp"]
    for i, name in enumerate(names):
        image_file(tmp_path / "in" / name, i)
    _, _, _, lines = score(tmp_path / "in")
    rows = csv_rows(tmp_path / "out")
    for kind, column in (("heatmaps", "heatmap"), ("masks", "mask")):
        written = [line[column] for line in lines.values()]
        assert len({name.lower() for name in written}) == len(names)
        on_disk = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / kind).rglob("*.png")]
        assert sorted(written) == sorted(on_disk)
        assert [row[column] for row in rows.values()] == written
    assert lines["day/0/x.png"]["heatmap"].startswith("heatmaps/day/0/")
    # A mask lies beside its heat map.
    assert {line["heatmap"][8:] == line["mask"][5:] for line in lines.values()} == {True}
    score(tmp_path / "in", "--no-pictures", output="none")
    assert {(row["heatmap"], row["mask"]) for row in csv_rows(tmp_path / "none").values()} == {("", "")}


def test_a_folder_named_like_an_image_is_no_result_file():
    names = ResultNames()
    assert [names.of(name) for name in ("x.png", "x.png/y.png", "../x.jpg", "/")] == ["x", "x_png/y", "x_2", "image"]


def test_pictures_of_the_evaluation_do_not_overwrite_each_other(tmp_path):
    names = ["part/test/good/x.png", "part/test/good/x.bmp", "part/test/night/0/a.png", "part/test/day/0/a.png"]
    names += ["part/test/day/1/a.png"]
    scored = scored_images(names, np.random.default_rng(0).random((5, 8, 8)))
    draw_images(evaluate_class("part", scored), scored, 0, tmp_path, ALONE, StopRequest(ALONE))
    assert len(list(tmp_path.rglob("*.png"))) == 5
    stop = StopRequest(ALONE)
    stop.signal = 2
    with pytest.raises(Stopped):
        draw_images(evaluate_class("part", scored), scored, 0, tmp_path, ALONE, stop)
    assert (tmp_path / "good/x.png").is_file()
    assert (tmp_path / "good/x_2.png").is_file()


def test_thresholds_are_written_with_six_digits(score, tmp_path):
    score(TEST_FOLDER, "--threshold", "0.12345678901")
    assert {row["threshold"] for row in csv_rows(tmp_path / "out").values()} == {"0.123457"}


def test_the_table_of_defects_says_so(tmp_path):
    row = dict.fromkeys(COLUMNS, 0.5)
    for name, heading in (("metrics", "class"), ("metrics_by_defect", "defect")):
        write_tables(tmp_path, name, {"part/hole": row}, {})
        assert (tmp_path / f"{name}.csv").read_text().startswith(f"{heading},image_auroc")
        assert (tmp_path / f"{name}.md").read_text().startswith(f"| {heading} | image AUROC")


def test_an_interrupted_run_continues(score, tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        image_file(tmp_path / "in" / name, i)
    image_file(tmp_path / "in/2.bmp", 7)
    expected = score(tmp_path / "in", output="whole")[3]

    maps, calls = Detector.maps, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return maps(self, images)

    monkeypatch.setattr(Detector, "maps", interrupted)
    code, out, _, lines = score(tmp_path / "in", "--batch-size", "1")
    assert code == 130
    assert list(lines) == list(expected)[:3]
    assert "stopped after 3 images; the same command with --continue scores the others" in out
    # A killed run leaves half a line.
    for name, text in (("scores.jsonl", '{"file": "3.png", "sco'), ("scores.csv", "3.png,0.1")):
        with open(tmp_path / "out" / name, "a") as file:
            file.write(text)
    calls[:] = [0] * 10
    code, out, _, lines = score(tmp_path / "in", "--continue", "--batch-size", "1")
    assert code == 0
    assert len(calls) == 10 + 4
    assert "3 images were scored before" in out
    assert list(lines) == list(expected)
    for name, line in expected.items():
        assert lines[name] == {**line, "score": pytest.approx(line["score"], abs=1e-5)}
    assert list(csv_rows(tmp_path / "out")) == list(expected)
    assert f"{len(expected)} images" in out


def test_only_the_same_run_continues(score, tmp_path):
    assert score(TEST_FOLDER, "--continue")[0] == 0  # nothing to continue: starts
    # Earlier versions did not say the precision.
    run_file = tmp_path / "out/predict.json"
    earlier = json.loads(run_file.read_text())
    assert earlier.pop("precision") == "fp32"
    run_file.write_text(json.dumps(earlier))
    assert score(TEST_FOLDER, "--continue")[0] == 0
    options = ["--threshold", "0.7", "--precision", "bf16"]
    assert "precision fp32, now bf16" in score(TEST_FOLDER, "--continue", *options)[2]
    code, _, err, _ = score(TEST_FOLDER, "--continue", "--threshold", "0.7")
    assert code == 2
    assert "holds results of another run (threshold " in err
    assert ", now 0.7)" in err
    code, _, err, _ = score(TEST_FOLDER)
    assert code == 2
    assert "--continue" in err
    (tmp_path / "out/predict.json").unlink()
    assert "pass --overwrite" in score(TEST_FOLDER, "--continue")[2]


@pytest.mark.parametrize("heat_maps", ["jpg", "none"])
def test_lines_name_the_pictures_that_are_written(heat_maps, score, tmp_path):
    for name in ("x.png", "x.bmp", "x.jpg/y.png"):
        image_file(tmp_path / "in" / name, 1)
    lines = score(tmp_path / "in", "--heatmaps", heat_maps)[3].values()
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = sorted(path.as_posix() for path in files if len(path.parts) > 1)
    assert written == sorted(line[kind] for line in lines for kind in ("heatmap", "mask") if line[kind])
    assert {line["mask"][-4:] for line in lines} == {".png"}
    assert {line["heatmap"] and line["heatmap"][-4:] for line in lines} == {".jpg" if heat_maps == "jpg" else None}
    # The names before are known: nothing is overwritten.
    image_file(tmp_path / "in/x.webp", 2)
    again = score(tmp_path / "in", "--heatmaps", heat_maps, "--continue")[3]
    assert again["x.webp"]["mask"] == "masks/x_3.png"


def test_a_picture_that_cannot_be_written_is_named_and_ends_the_run(score, tmp_path):
    for i in range(6):
        image_file(tmp_path / f"in/{i}.png", i)
    assert score(tmp_path / "in", "--batch-size", "2")[0] == 0
    for name in ("scores.jsonl", "heatmaps/3.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/heatmaps/3.png").mkdir()
    code, _, err, lines = score(tmp_path / "in", "--batch-size", "2", "--overwrite")
    assert code == 1
    assert "out/heatmaps/3.png: cannot be written" in err.splitlines()[-1]
    assert list(lines) == ["0.png", "1.png", "2.png"]


def test_images_are_drawn_while_others_are_scored(score, tmp_path, monkeypatch):
    for i in range(3):
        image_file(tmp_path / f"in/{i}.png", i)
    maps, draw, calls, second = Detector.maps, Results.draw, [], threading.Event()

    def counted(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            second.set()
        return maps(self, images)

    def waiting(self, name, *arguments):
        assert name != "0" or second.wait(timeout=60)
        return draw(self, name, *arguments)

    monkeypatch.setattr(Detector, "maps", counted)
    monkeypatch.setattr(Results, "draw", waiting)
    code, _, err, lines = score(tmp_path / "in", "--batch-size", "1")
    assert (code, list(lines)) == (0, ["0.png", "1.png", "2.png"]), err


def test_what_was_begun_before_an_error_is_not_lost():
    def items():
        yield from (1, 2)
        raise RunError("no more")

    results = prefetch(lambda item: 10 * item, items(), 4, drain=True)
    assert [next(results), next(results)] == [10, 20]
    with pytest.raises(RunError, match="no more"):
        next(results)
    assert list(prefetch(str, iter([1, 2]), 0)) == ["1", "2"]


def test_results_do_not_wait_for_slow_items():
    taken = []

    def slow():
        for item in range(5):
            taken.append(item)
            time.sleep(0.05)
            yield item

    for result in prefetch(lambda item: item, slow(), 5):
        # One item is taken for each result, and what a thread took to compute the first.
        assert len(taken) <= result + 4


# ---- precision -------------------------------------------------------------------------------------------------------


def test_thresholds_of_another_precision_are_refused(score, detector, tmp_path, monkeypatch):
    code, _, err, _ = score(TEST_FOLDER, "--precision", "bf16")
    assert code == 2
    assert "were chosen on scores in fp32, and those in bf16 differ; evaluate again with --precision bf16" in err
    assert not (tmp_path / "out").exists()
    loaded = Detector.load(detector.root / CLASS_FOLDER, precision="bf16")
    with pytest.raises(UsageError, match="pass --threshold"):
        loaded(np.zeros((8, 8, 3), np.uint8))
    dtypes = []

    def forward(self, batch, train=False):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return {"anomaly_score": batch["image"][:, :1].sigmoid()}

    monkeypatch.setattr(RealNet, "forward", forward)
    image_file(tmp_path / "in/0.png", 0)
    lines = score(tmp_path / "in", "--precision", "bf16", "--threshold", "0.5")[3]
    # The pixel threshold was chosen in fp32, too.
    assert (lines["0.png"]["threshold"], lines["0.png"]["mask"]) == (0.5, None)
    assert score(tmp_path / "in", output="fp32")[0] == 0
    assert dtypes == [torch.bfloat16, None]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_exported_models_run_in_float32_only(ending, tmp_path):
    (tmp_path / f"model.{ending}").touch()
    with pytest.raises(UsageError, match=rf"--precision fp16: .*model\.{ending} runs in fp32 only"):
        Detector.load(tmp_path / f"model.{ending}", precision="fp16")


# ---- tiles, ranks, memory --------------------------------------------------------------------------------------------


def test_tiles_with_a_threshold_for_whole_images_warn_once(score):
    text = "was chosen on whole images, and tiles score differently"
    out = score(TEST_FOLDER, "--tile", "32")[1]
    assert out.count(text) == 1
    # What was promised for whole images is not said of tiles.
    assert ": chosen on whole images\n" in out
    assert "good images flagged" not in out
    assert text not in score(TEST_FOLDER, "--tile", "32", "--threshold", "0.5", output="b")[1]
    assert text not in score(TEST_FOLDER, output="c")[1]


def test_the_overlap_fits_a_small_tile(score, tmp_path):
    default = score(TEST_FOLDER, "--tile", "32")[3]
    assert default == score(TEST_FOLDER, "--tile", "32", "--overlap", "8", output="b")[3]
    assert json.loads((tmp_path / "out/predict.json").read_text())["overlap"] == 8


def test_ranks_left_in_the_environment_do_not_matter(score, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "x"}.items():
        monkeypatch.setenv(name, value)
    start = time.perf_counter()
    code, _, err, _ = score("gone")
    assert code == 2
    assert err == "error: --input gone does not exist\n"
    assert time.perf_counter() - start < 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert score(TEST_FOLDER)[0] == 0


def test_few_pixels_are_read_ahead():
    lock, held, most = threading.Lock(), 0, 0

    def read(size):
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        return size

    sizes = [10, 10, 50, 90, 5, 5, 5, 5, 5, 5, 30]
    got = []
    for size in prefetch(read, sizes, 4, pixels=lambda size: size, most=60):
        time.sleep(0.01)
        with lock:
            held -= size
        got.append(size)
    assert got == sizes
    # What is read ahead, and the item in hand: 90 is alone, as is what comes before it.
    assert most <= 90 + 50
    assert list(groups(sizes, 3, lambda size: size, 60))[:3] == [[10, 10], [50], [90]]


def test_tiled_images_are_held_one_at_a_time(score, tmp_path, monkeypatch):
    for i in range(4):
        image_file(tmp_path / f"in/{i}.png", i, (80, 80))
    detect, sizes = Detector.detect, []

    def counted(self, images, tiles=None):
        sizes.append(len(images))
        return detect(self, images, tiles)

    monkeypatch.setattr(Detector, "detect", counted)
    assert score(tmp_path / "in", "--tile", "64", "--threshold", "0.5")[0] == 0
    assert sizes == [1, 1, 1, 1]


# ---- model.pt2 -------------------------------------------------------------------------------------------------------


def test_an_exported_program_carries_its_metadata_and_is_never_run(score, detector, exported, monkeypatch):
    path = exported / "model.pt2"
    extra = {"config": "", "thresholds": "", "preprocessing": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["preprocessing"])["size"] == {"height": 64, "width": 64}
    assert json.loads(extra["config"])["dataset"]["input_size"] == [64, 64]
    monkeypatch.setattr(torch.export, "load", pytest.fail)
    code, _, err, lines = score(TEST_FOLDER, checkpoint=path)
    assert code == 0, err
    expected = score(TEST_FOLDER, output="b")[3]
    assert {name: line["verdict"] for name, line in lines.items()} == {n: e["verdict"] for n, e in expected.items()}
    assert {line["verdict"] for line in lines.values()} <= {"normal", "anomalous"}
    for name, line in lines.items():
        assert line["score"] == pytest.approx(expected[name]["score"], abs=1e-5)
    state = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)["state_dict"]
    read = read_program(path)[0]
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("content", [b"no zip", b"cut"])
def test_damaged_programs_are_named(content, score, detector, tmp_path):
    path = tmp_path / "model.pt2"
    if content == b"cut":
        torch.save({"a": 1}, path)
        content = path.read_bytes()
    path.write_bytes(content)
    code, _, err, _ = score(TEST_FOLDER, checkpoint=path)
    assert code == 2
    assert f"{path} is not a model that this version of export.py wrote" in err
    assert len(err.splitlines()) == 1


def test_a_program_that_names_more_than_its_bytes_is_refused(tmp_path):
    from evaluation.exported import _tensor

    meta = {"sizes": [{"as_int": 100}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "dtype": 7}
    with pytest.raises((RuntimeError, UsageError)):
        _tensor(bytes(8), meta)
