"""synthesize.py --source edit with a diffusion model that is not trained, but changes what it edits."""

import csv

import numpy as np
import pytest
import torch
import yaml

import synthesize
from datasets.images import read_image, read_mask
from models.sdas import create_diffusion_unet
from tests.conftest import UNET, settings
from tests.in_process import run
from tests.rule_filled import fill

COMMAND = ["--config", "experiments/edited/realnet.yaml", "--source", "edit", "--count", "10", "--size", "native"]


@pytest.fixture(scope="module")
def edited(workspace):
    """The workspace with experiments/edited/, whose model knows the class dots only."""
    folder = workspace.root / "experiments/edited"
    config = settings("data/tiny", "experiments/edited")
    network = {**{key: value for key, value in UNET.items() if key != "pertrain_path"}, "class_number": 1}
    config["sample"] |= {"unet": {"pertrain_path": "experiments/edited/diffusion_checkpoints/"}, "classifier": None}
    config["sample"]["dataset"] = {"batch_size": 3}
    (folder / "diffusion_checkpoints").mkdir(parents=True)
    content = {"epoch": 1, "arch": network, "classes": ["dots"], "input_size": [32, 32]}
    content["state_dict"] = fill(create_diffusion_unet(**network)).state_dict()
    torch.save(content, folder / "diffusion_checkpoints/ckpt_1.pth.tar")
    for name in ("sample", "realnet"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config[name]))
    return workspace


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_edits_keep_all_pixels_outside_their_masks_for_any_number_of_ranks(edited, monkeypatch, capsys):
    code, out, err = run(
        synthesize.main, [*COMMAND, "--class_name", "dots", "--output", "edits"], edited.root, monkeypatch, capsys
    )
    assert code == 0, err
    assert "10 pairs (edit 10)" in out
    folder = edited.root / "edits/dots"
    with open(folder / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        good, image = read_image(edited.data / "images" / row["good"]), read_image(folder / row["image"])
        mask = read_mask(folder / row["mask"]) > 0
        np.testing.assert_array_equal(image[~mask], good[~mask])
        assert (image != good)[mask].any(axis=1).mean() > 0.8
        assert row["type"] == "edit"
        assert 0.2 <= float(row["depth"]) <= 0.6
        assert 0.1 <= float(row["strength"]) <= 0.3
        assert float(row["opacity"]) == 1
    # 8 good images: the ninth pair is of the first again, but another one.
    assert rows[8]["good"] == rows[0]["good"]
    assert rows[8]["depth"] != rows[0]["depth"]

    edited.run("synthesize.py", *COMMAND, "--class_name", "dots", "--output", "edits_2", ranks=2)
    assert files_of(edited.root / "edits_2/dots") == files_of(folder)

    # They are what the anomaly type edit trains on; more of them, and of other depths, are other pairs.
    arguments = [*COMMAND, "--class_name", "dots", "--output", "edits", "--depth", "0.3", "0.6"]
    code, _, err = run(synthesize.main, arguments, edited.root, monkeypatch, capsys)
    assert code == 2
    assert "holds pairs of other settings" in err
    assert "depth" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_name", "lines"], "the classes of the diffusion model are dots, not lines"),
        (["--class_name", "dots", "--depth", "0.6", "0.2"], "--depth 0.6 0.2: is not a range"),
        (["--class_name", "dots", "--depth", "0.5", "1.5"], "<= 1"),
        (["--class_name", "dots", "--strength", "-1", "1"], "--strength -1 1: is not a range"),
        (["--class_name", "dots", "--types", "dtd"], "--types: belongs to --source blend"),
        (["--class_name", "dots", "--source", "blend", "--strength", "0", "1"], "--strength: belongs to --source edit"),
        (["--class_name", "dots", "--source", "blend", "--types", "edit"], "made by --source edit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, edited, monkeypatch, capsys):
    code, _, err = run(synthesize.main, [*COMMAND, "--output", "none", *arguments], edited.root, monkeypatch, capsys)
    assert code == 2
    assert message in err
    assert not (edited.root / "none").exists()


def test_a_missing_model_is_named(edited, monkeypatch, capsys):
    path = edited.root / "experiments/edited/sample.yaml"
    text = path.read_text()
    for write, message in (
        (path.unlink, "which names the diffusion model, does not exist"),
        (lambda: path.write_text(text.replace("diffusion_checkpoints", "gone")), "gone"),
        (lambda: path.write_text(f"{text}\nsampler: dpmpp_2m\n"), "dpmpp_2m adds no noise"),
    ):
        write()
        arguments = [*COMMAND, "--class_name", "dots", "--output", "none"]
        code, _, err = run(synthesize.main, arguments, edited.root, monkeypatch, capsys)
        assert code == 2
        assert message in err
    path.write_text(text)


def test_edits_that_do_not_show_end_with_advice(edited, monkeypatch, capsys):
    arguments = [*COMMAND, "--class_name", "dots", "--output", "none", "--depth", "0", "0", "--strength", "0", "0"]
    monkeypatch.setattr("preparation.edit_pairs.ATTEMPTS", 2)
    monkeypatch.setattr("models.sdas.edit.VISIBLE", 300.0)
    code, _, err = run(synthesize.main, arguments, edited.root, monkeypatch, capsys)
    assert code == 1
    assert "no edit shows on it or the 3 images after it, in 2 tries each; raise --depth" in err
