"""What predict.py does with images, folders and results that are not as they should be."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation_realnet
import export
from datasets import images as images_module
from evaluation.detector import Detector
from evaluation.inputs import find_inputs
from tests.in_process import run
from tests.layout_trees import image_file
from utils.errors import RunError, UsageError
from utils.pictures import heat_overlay

CLASS_FOLDER = "experiments/tiny/predict_checkpoints/dots"
TEST_FOLDER = "data/tiny/images/dots/test"


# ---- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_a_failure_and_no_verdict(value, score, tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "d.png"):
        image_file(tmp_path / "in" / name, name)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "in/c.png")
    maps = Detector.maps

    def spoiled(self, images):
        values = maps(self, images).copy()
        for i, image in enumerate(images):
            if image.min() == 255:
                values[i, :2, :2] = value
        return values

    monkeypatch.setattr(Detector, "maps", spoiled)
    code, out, err, lines = score(tmp_path / "in")
    assert code == 1
    assert set(lines) == {"a.png", "b.png", "d.png"}
    assert (tmp_path / "out/scores.csv").read_text().count("\n") == 1 + 3
    assert len(err.splitlines()) == 1
    assert err.startswith(
        f"not scored: {tmp_path / 'in/c.png'}: the model's weights, score or anomaly map hold values that"
    )
    assert "3 images" in out
    assert "0 unreadable, 1 not scored" in out


def test_a_detector_gives_no_verdict_without_numbers(detector):
    loaded = Detector.load(detector.root / CLASS_FOLDER, device="cpu")
    broken = Detector(loaded.config, loaded.thresholds, lambda x: np.full((len(x), 64, 64), np.nan, np.float32))
    image = np.zeros((64, 64, 3), np.uint8)
    detection = next(broken.detect([image]))
    assert not detection.finite
    assert detection.is_anomalous is None
    assert detection.mask is None
    with pytest.raises(RunError, match="not numbers"):
        broken(image)


@pytest.mark.parametrize("spoiled", ["rrs.bn_idx.running_mean", "rrs"])
def test_weights_that_are_not_finite_fail(spoiled, score, detector, tmp_path, monkeypatch, capsys):
    content = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)
    for name, tensor in content["state_dict"].items():
        if name.startswith(spoiled) and tensor.is_floating_point():
            content["state_dict"][name] = torch.full_like(tensor, torch.nan)
    torch.save(content, tmp_path / "nan.pth.tar")
    arguments = ["--checkpoint", str(tmp_path / "nan.pth.tar"), "--output", str(tmp_path / "exported")]
    arguments += ["--input", TEST_FOLDER]
    code, _, err = run(export.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 1
    assert "are not finite; train it again" in err
    assert not (tmp_path / "exported").exists()
    arguments = ["--dataset", "tiny", "--class_name", "dots", "--checkpoint", str(tmp_path / "nan.pth.tar")]
    for name in ("log", "vis", "results"):
        arguments += ["--set", f"saver.{name}_dir=nan_{name}/"]
    code, _, err = run(evaluation_realnet.main, arguments, detector.root, monkeypatch, capsys)
    assert code == 1
    assert "are not finite; train it again" in err
    assert not list(tmp_path.glob("*.thresholds.json"))
    code, _, err, lines = score(TEST_FOLDER, "--threshold", "0.5", checkpoint=tmp_path / "nan.pth.tar")
    assert code == 1
    assert not lines
    assert err.count("not scored: ") == 8


@pytest.mark.parametrize("outputs", [(np.nan, 0.0), (0.0, np.nan), (0.0, np.inf), (0.1, 0.0)])
def test_an_export_that_differs_or_is_not_finite_fails_its_check(outputs, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    expected = [np.zeros((2, 4, 4)), np.zeros(2)]
    export.compare(tmp_path / "model.onnx", expected, expected)
    with pytest.raises(RunError, match="do not use it"):
        export.compare(tmp_path / "model.onnx", expected, [a + b for a, b in zip(expected, outputs, strict=True)])


@pytest.mark.parametrize("option", ["--threshold", "--pixel-threshold"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_thresholds_have_to_be_finite(option, value, score, tmp_path):
    code, _, err, _ = score(TEST_FOLDER, f"{option}={value}")
    assert code == 2
    assert f"{option} {value}: has to be a finite number" in err
    assert not (tmp_path / "out").exists()


def test_a_heat_map_of_equal_bounds_has_its_colours():
    image, values = np.zeros((2, 2, 3), np.uint8), np.array([[0.2, 0.5], [0.5, 0.9]], np.float32)
    with np.errstate(all="raise"):
        drawn = heat_overlay(image, values, 0.5, 0.5)
    assert drawn[0, 0, 2] > drawn[0, 0, 0]  # below: blue
    assert drawn[1, 1, 0] > drawn[1, 1, 2]  # above: red


# ---- what is in a folder ---------------------------------------------------------------------------------------------


def test_links_are_followed_once_and_hidden_folders_are_not(score, tmp_path):
    folder = tmp_path / "in"
    image_file(folder / "real/a.png", 1)
    image_file(tmp_path / "elsewhere/lot/b.png", 2)
    image_file(folder / ".hidden/c.png", 3)
    image_file(folder / "__MACOSX/d.png", 4)
    image_file(tmp_path / "above.png", 5)
    (folder / "again").symlink_to("real")  # sorted before `real`, which has the name
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "real/loop").symlink_to("..")
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere/back").symlink_to(folder)
    code, _, err, lines = score(folder)
    assert code == 0, err
    assert list(lines) == ["linked/lot/b.png", "real/a.png"]


def test_what_is_not_read_is_counted_and_told(score, tmp_path):
    folder = tmp_path / "in"
    image_file(folder / "a.png", 1)
    for name in ("b.gif", "c.GIF", "d"):
        Image.new("RGB", (8, 8)).save(folder / name, "GIF")
    (folder / "e.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    (folder / "notes.txt").write_text("BM is no bitmap here")
    (folder / "gone.png").symlink_to("nowhere.png")
    code, out, err, lines = score(folder)
    assert code == 1
    assert list(lines) == ["a.png"]
    assert "4 files were not read: .gif, .heic, d\n" in out
    assert err == f"unreadable: {folder / 'gone.png'} does not exist\n"
    (folder / "a.png").unlink()
    (folder / "gone.png").unlink()
    code, _, err, _ = score(folder, output="other")
    assert code == 2
    assert "holds no image (4 files were not read: .gif, .heic, d)" in err


def test_a_single_image_is_read_whatever_its_ending(score, tmp_path):
    image_file(tmp_path / "a.png", 1)
    shutil.copy(tmp_path / "a.png", tmp_path / "a.dat")
    code, _, err, lines = score(tmp_path / "a.dat")
    assert code == 0, err
    assert list(lines) == ["a.dat"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_not_utf8(score, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    image_file(folder / "a.png", 1)
    odd = os.fsdecode(b"caf\xe9.png")
    os.rename(folder / "a.png", folder / odd)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"no image")
    for output, source in (("folder", folder), ("list", tmp_path / "list.txt"), ("stdin", "-")):
        (tmp_path / "list.txt").write_bytes(os.fsencode(folder) + b"/caf\xe9.png\n")
        monkeypatch.setattr(sys, "stdin", iter([os.fsencode(folder) + b"/caf\xe9.png\n"]))
        code, _, err, lines = score(source, output=output)
        assert code == (1 if output == "folder" else 0), err
        assert [os.fsencode(os.path.basename(name)) for name in lines] == [b"caf\xe9.png"]
        (line,) = lines.values()
        assert (tmp_path / output / line["heatmap"]).is_file()
        assert line["heatmap"].endswith(f"{os.path.splitext(odd)[0]}.png")
    code, out, err, _ = score(folder, "--continue", output="folder")
    assert "1 image was scored before" in out
    assert (tmp_path / "folder/scores.csv").read_text().count("\n") == 1 + 1


def test_whatever_one_image_raises_the_others_are_scored(score, tmp_path, monkeypatch):
    for i in range(5):
        image_file(tmp_path / f"in/{i}.png", i, (40, 30 + i))
    detect, read = Detector.maps, images_module.Preprocessing.read_full

    def maps(self, images):
        if any(image.shape[:2] == (40, 31) or image.shape[:2] == (31, 40) for image in images):
            raise MemoryError("no room")
        return detect(self, images)

    def read_full(self, path):
        if path.name == "3.png":
            raise RecursionError("deep")
        return read(self, path)

    monkeypatch.setattr(Detector, "maps", maps)
    monkeypatch.setattr(images_module.Preprocessing, "read_full", read_full)
    code, out, err, lines = score(tmp_path / "in")
    assert code == 1
    assert list(lines) == ["0.png", "2.png", "4.png"]
    assert f"not scored: {tmp_path / 'in/1.png'}: MemoryError: no room" in err
    assert f"unreadable: {tmp_path / 'in/3.png'}: RecursionError: deep" in err
    assert "1 unreadable, 1 not scored" in out


def test_masks_and_results_below_the_input_are_not_scored(score, tmp_path):
    folder = tmp_path / "in"
    masks = "a_mask.png", "A_label.png", "lot/b-GT.png"
    for name in ("a.png", "lonely_mask.png", "lot/b.jpg", *masks, "lot/ground_truth/b.png"):
        image_file(folder / name, name)
    for output in ("in/results", "in/results", "in"):
        code, out, err, lines = score(folder, "--overwrite", output=output)
        assert code == 0, err
        assert list(lines) == ["a.png", "lonely_mask.png", "lot/b.jpg"]
        assert "left out: masks that lie beside their images (x_mask.png beside x.png): 3" in out
    assert "left out: masks or results, not images to score: lot/ground_truth/, results/" in out
    # The folder now holds results of its own, and those of another run.
    code, out, err, lines = score(folder, output="elsewhere")
    assert list(lines) == ["a.png", "lonely_mask.png", "lot/b.jpg"]
    assert "heatmaps/, masks/, lot/ground_truth/, results/heatmaps/, results/masks/" in out
    # A mask folder that is named itself is scored.
    assert list(score(folder / "lot/ground_truth", output="masks")[3]) == ["b.png"]


def test_the_first_page_of_a_tiff_is_used_and_told(score, tmp_path):
    first, second = (Image.open(image_file(tmp_path / f"{i}.png", i)).convert("RGB") for i in range(2))
    (tmp_path / "in").mkdir()
    first.save(tmp_path / "in/pages.tif", save_all=True, append_images=[second, second])
    first.save(tmp_path / "in/single.tif")
    code, out, err, lines = score(tmp_path / "in")
    assert code == 0, err
    assert lines["pages.tif"]["score"] == pytest.approx(lines["single.tif"]["score"], abs=1e-5)
    assert "images with several pages, of which the first was scored: 1, pages.tif (3)\n" in out


def test_large_images_need_the_option_that_the_message_names(score, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    image_file(tmp_path / "in/large.png", 1, (300, 200))
    image_file(tmp_path / "in/small.png", 2, (50, 50))
    code, _, err, lines = score(tmp_path / "in", "--max-megapixels", "0.05")
    assert code == 1
    assert list(lines) == ["small.png"]
    assert f"unreadable: {tmp_path / 'in/large.png'} has 0.06 megapixels, above the limit of 0.05" in err
    assert "--max-megapixels" in err
    assert list(score(tmp_path / "in", "--max-megapixels", "0.06", output="b")[3]) == ["large.png", "small.png"]


def test_the_bits_of_a_camera_travel_in_the_checkpoint(score, detector, tmp_path):
    content = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)
    content["config"]["dataset"]["image_reader"]["kwargs"]["bits"] = 12
    torch.save(content, tmp_path / "twelve.pth.tar")
    grey = Image.open(detector.root / TEST_FOLDER / "spot/000.png").convert("L")
    (tmp_path / "in").mkdir()
    grey.save(tmp_path / "in/eight.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 16 + 7).save(tmp_path / "in/twelve.png")
    lines = score(tmp_path / "in", checkpoint=tmp_path / "twelve.pth.tar")[3]
    assert lines["twelve.png"]["score"] == pytest.approx(lines["eight.png"]["score"], abs=1e-5)
    # Without the setting, the image is nearly black.
    other = score(tmp_path / "in", output="b")[3]
    assert abs(other["twelve.png"]["score"] - other["eight.png"]["score"]) > 1e-3


def test_a_folder_above_the_checkpoint_or_of_exports_names_what_it_holds(score, tmp_path):
    _, _, err, _ = score(TEST_FOLDER, checkpoint="experiments/tiny/predict_checkpoints")
    assert "experiments/tiny/predict_checkpoints holds no ckpt_best.pth.tar; name one of" in err
    assert CLASS_FOLDER in err
    (tmp_path / "model.onnx").touch()
    _, _, err, _ = score(TEST_FOLDER, checkpoint=tmp_path)
    assert f"{tmp_path / 'model.onnx'}" in err
    (tmp_path / "empty").mkdir()
    _, _, err, _ = score(TEST_FOLDER, checkpoint=tmp_path / "empty")
    assert "does not exist; train_realnet.py writes it" in err
    _, _, err, _ = score(TEST_FOLDER, checkpoint=tmp_path / "other.onnx")
    assert "does not exist; export.py writes it" in err


def test_pictures_that_other_commands_drew_are_not_scored(score, tmp_path):
    folder = tmp_path / "in"
    for name in ("a.png", "exp/realnet_vis/dots/x.png", "data/preview/dots.png", "own_vis/b.png", "preview/c.png"):
        image_file(folder / name, name)
    (folder / "exp/realnet.yaml").write_text("net: []")
    (folder / "data/samples").mkdir()
    code, out, err, lines = score(folder)
    assert code == 0, err
    assert list(lines) == ["a.png", "own_vis/b.png", "preview/c.png"]
    assert "data/preview/, exp/realnet_vis/" in out


def test_foreign_mask_folders_and_tables_are_refused(score, tmp_path):
    image_file(tmp_path / "in/a.png", "a")
    image_file(tmp_path / "own/masks/a.png", "mask")
    before = (tmp_path / "own/masks/a.png").read_bytes()
    code, _, err, _ = score(tmp_path / "in", "--overwrite", output="own")
    assert code == 2
    assert "own/masks exists, but is no result of predict.py" in err
    assert (tmp_path / "own/masks/a.png").read_bytes() == before
    (tmp_path / "scores.csv").write_text("file,score\na.png,0.5\n")
    code, _, err, _ = score(tmp_path / "scores.csv", output="other")
    assert code == 2
    assert "scores.csv: is a table" in err


def test_scores_of_a_few_images_are_printed_and_a_finished_run_says_so(score, tmp_path):
    image_file(tmp_path / "in/a.png", "a")
    code, out, err, lines = score(tmp_path / "in", "--threshold", "0")
    assert code == 0, err
    assert f"{lines['a.png']['score']:.4f}  anomalous  a.png" in out
    code, out, err, _ = score(tmp_path / "in", "--threshold", "0", "--continue")
    assert code == 0, err
    assert "1 image was scored before; all are done" in out


def test_a_list_from_windows_may_go_up_folders(tmp_path):
    image_file(tmp_path / "shots/lot 1/a.png", 1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/new.txt").write_text("\ufeff..\\shots\\lot 1\\a.png\r\n", encoding="utf-8")
    (found,) = find_inputs(str(tmp_path / "lists/new.txt"), None, []).images
    assert found.path.is_file()


def test_a_text_file_that_lists_no_image_that_exists_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# RealNet\n\nFind defects on parts\n")
    (tmp_path / "moved.json").write_text('{"filename": "bolts/a.png"}\n')
    for name, count in {"README.md": 2, "moved.json": 1}.items():
        with pytest.raises(UsageError, match=rf"{name}: none of the {count} images that it lists exists, e\.g\. "):
            find_inputs(str(tmp_path / name), str(tmp_path / "images"), [])


def test_a_line_that_is_too_long_for_a_path_does_not_end_the_others(tmp_path):
    image_file(tmp_path / "a.png", 1)
    (tmp_path / "list.txt").write_text(f"{'x' * 300}\na.png\n")
    long, found = find_inputs(str(tmp_path / "list.txt"), None, []).images
    assert long.name == "x" * 300
    assert found.path == tmp_path / "a.png"
