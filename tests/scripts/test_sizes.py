"""The scripts take any height and width; if a network cannot, the message names the nearest size that fits."""

import json

import pytest
from PIL import Image

import evaluation_realnet
import sample
import train_classifier
import train_diffusion
import train_realnet
from tests.in_process import run

WIDE = ["unet.pertrain_path=experiments/tiny/wide_diffusion/", "classifier=null"]
COMMON = ["--dataset", "tiny", "--device", "cpu", "--set", "trainer.max_epoch=1"]


@pytest.mark.parametrize("size", [(48, 80), (97, 61), (33, 128), (16, 16)])
def test_realnet_trains_and_evaluates_at_any_size(size, workspace, monkeypatch, capsys):
    name = "{}x{}".format(*size)
    settings = ["--class_name", "dots", "--set", f"dataset.input_size={list(size)}"]
    folders = [f"saver.{key}_dir=sizes_{name}_{key}/" for key in ("checkpoints", "log", "vis", "results")]
    arguments = [*COMMON, *settings, *(part for folder in folders for part in ("--set", folder))]
    code, _, err = run(train_realnet.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    code, _, err = run(evaluation_realnet.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    metrics = json.loads((workspace.out / f"sizes_{name}_results/metrics.json").read_text())["dots"]
    assert all(0 <= metrics[key] <= 1 for key in ("image_auroc", "pixel_auroc", "pro"))
    image = Image.open(workspace.out / f"sizes_{name}_vis/dots/spot/000.png")
    assert image.width >= 3 * size[1]
    assert image.height >= size[0]


@pytest.mark.parametrize("crop", [None, [16, 16]])
def test_sdas_draws_images_that_are_not_square(crop, workspace, monkeypatch, capsys):
    folders = ["--set", "saver.checkpoints_dir=wide_diffusion/", "--set", "saver.log_dir=wide_log/", "--overwrite"]
    sizes = ["--set", "dataset.input_size=[16, 32]", "--set", f"dataset.crop={crop or 'null'}"]
    code, _, err = run(train_diffusion.main, [*COMMON, *folders, *sizes], workspace.root, monkeypatch, capsys)
    assert code == 0, err
    folders[1] = "saver.checkpoints_dir=wide_classifier/"
    sizes += ["--set", "classifier.classifier_pool=adaptive"] if crop else []
    code, _, err = run(train_classifier.main, [*COMMON, *folders, *sizes], workspace.root, monkeypatch, capsys)
    assert code == 0, err
    values = {
        "dataset.H": 16,
        "dataset.W": 32,
        "sample_number": 2,
        "unet.pertrain_path": "experiments/tiny/wide_diffusion/",
        "classifier.pertrain_path": "experiments/tiny/wide_classifier/",
        "workspace.root": "data/tiny/wide_sdas",
    }
    arguments = ["--dataset", "tiny", *(part for key, v in values.items() for part in ("--set", f"{key}={v}"))]
    arguments += ["--overwrite"]
    code, _, err = run(sample.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    assert Image.open(workspace.data / "wide_sdas/lines/rank0_1.jpg").size == (32, 16)


@pytest.mark.parametrize(
    ("script", "settings", "text"),
    [
        (train_diffusion, ["dataset.input_size=[17, 32]"], "dataset.input_size: [17, 32] does not fit 2 levels"),
        (train_classifier, ["dataset.input_size=[16, 33]"], "dataset.input_size: [16, 33] does not fit 2 levels"),
        (train_diffusion, ["dataset.crop=[16, 31]"], "dataset.crop: [16, 31] does not fit 2 levels"),
        (sample, ["dataset.H=15", *WIDE], "dataset.H, dataset.W: [15, 16] does not fit 2 levels"),
    ],
)
def test_the_nearest_size_that_fits_is_named(script, settings, text, workspace, monkeypatch, capsys):
    arguments = ["--dataset", "tiny", *(part for setting in settings for part in ("--set", setting))]
    code, _, err = run(script.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 2
    assert text in err
    assert "the nearest is [16, 32]" in err or "the nearest is [16, 16]" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "setting", "text"),
    [
        (train_diffusion, "dataset.crop=[16, 128]", "dataset.crop: [16, 128] is larger than dataset.input_size"),
        (train_classifier, "dataset.crop=[16, 16]", "classifier_pool: attention learns a vector for each position"),
    ],
)
def test_a_crop_that_cannot_work_is_refused(script, setting, text, workspace, monkeypatch, capsys):
    code, _, err = run(script.main, ["--dataset", "tiny", "--set", setting], workspace.root, monkeypatch, capsys)
    assert code == 2
    assert text in err
