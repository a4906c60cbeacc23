"""sample.py, run as a user runs it: which images it draws, and the pictures that it writes instead."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images import read_image
from tests.conftest import CLASSES, settings


def sampled_images(folder: Path) -> dict[int, np.ndarray]:
    return {int(path.stem.split("_")[1]): np.asarray(Image.open(path)) for path in folder.glob("*.jpg")}


def strengths_in(folder: Path) -> dict[int, float]:
    """The strengths of the images that are there, by index."""
    with (folder / "strengths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {path.name for path in folder.glob("*.jpg")}
    return {int(Path(row["image"]).stem.split("_")[1]): float(row["strength"]) for row in rows}


def test_sampling_depends_on_seed_class_and_index_only(diffusion, classifier):
    root = diffusion.data / "sdas"
    diffusion.run("sample.py")
    plain = {name: sampled_images(root / name) for name in CLASSES}
    assert {name: sorted(images) for name, images in plain.items()} == {name: list(range(5)) for name in CLASSES}
    assert plain["dots"][0].shape == (16, 16, 3)
    assert not np.array_equal(plain["dots"][0], plain["lines"][0])
    strengths = strengths_in(root / "dots")
    assert sorted(strengths) == list(range(5))
    assert all(0.1 <= s <= 0.2 for s in strengths.values())

    # Existing images are kept; a missing one is drawn again, identically.
    untouched = root / "dots/rank0_0.jpg"
    stamp = untouched.stat().st_mtime_ns
    (root / "dots/rank0_2.jpg").unlink()
    done = diffusion.run("sample.py", "--class_name", "dots")
    assert "4 of them existed already" in done.stdout
    assert untouched.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(sampled_images(root / "dots")[2], plain["dots"][2])
    assert strengths_in(root / "dots") == strengths

    diffusion.run("sample.py", "--overwrite", ranks=2)
    for name in CLASSES:
        assert len(list((root / name).glob("rank*.jpg"))) == 5
        assert any(path.name.startswith("rank1_") for path in (root / name).iterdir())
        for i, image in sampled_images(root / name).items():
            np.testing.assert_array_equal(image, plain[name][i])
    assert strengths_in(root / "dots") == strengths

    diffusion.run("sample.py", "--class_name", "dots", "--overwrite", "--set", "dataset.batch_size=1")
    for i, image in sampled_images(root / "dots").items():
        assert np.abs(image.astype(int) - plain["dots"][i]).max() <= 8  # JPEG of values rounded the other way
        assert np.abs(image.astype(int) - plain["dots"][i]).mean() < 0.05

    diffusion.run("sample.py", "--class_name", "dots", "--overwrite", "--seed", "5")
    assert not np.array_equal(sampled_images(root / "dots")[0], plain["dots"][0])


def test_sampling_options_change_the_images(diffusion, classifier):
    root = diffusion.data / "options"
    seen = set()
    for options in (
        [],
        ["--no-classifier"],
        ["--sampler", "ddim", "--strength", "0.01", "0.03"],
        ["--sampler", "dpmpp_2m_sde", "--steps", "4"],
        ["--steps", "2"],
        ["--strength", "0.5", "0.9"],
        ["--set", "start_depth=[0.3, 0.6]"],
        ["--set", "color_mode=GRAY"],
    ):
        arguments = ["--set", f"workspace.root={root}", "--set", "sample_number=1", "--overwrite"]
        arguments += ["--set", "classifier_scale=30"]
        diffusion.run("sample.py", "--class_name", "dots", *arguments, *options)
        image = sampled_images(root / "dots")[0]
        seen.add(image.tobytes())
    assert np.ptp(image, axis=2).max() <= 8  # the last one is grey but for JPEG's rounding
    assert len(seen) == 8


def test_sampling_without_a_classifier_section(diffusion):
    config = settings("data/tiny", "experiments/tiny")["sample"]
    path = diffusion.write_settings("sample_unguided", {**config, "classifier": None})
    root = diffusion.data / "unguided"
    diffusion.run("sample.py", "--config", str(path), "--set", f"workspace.root={root}", "--class_name", "lines")
    assert sorted(sampled_images(root / "lines")) == list(range(5))


def test_preview_draws_a_strip_and_nothing_else(diffusion, classifier):
    root = diffusion.data / "previewed"
    diffusion.run("sample.py", "--preview", "--set", f"workspace.root={root}")
    for name in CLASSES:
        strip = np.asarray(Image.open(diffusion.out / f"sample_vis/{name}.png"))
        assert strip.shape[1] == 7 * 64 + 6 * 4  # images of 16 pixels, enlarged
    assert not root.exists()


def test_a_sheet_of_the_steps_is_drawn_and_nothing_else(diffusion, classifier):
    root = diffusion.data / "stepped"
    done = diffusion.run("sample.py", "--class_name", "dots", "--set", f"workspace.root={root}", "--save-steps")
    assert "dots: 4 steps" in done.stdout
    assert not root.exists()
    sheet = np.asarray(Image.open(diffusion.out / "sample_vis/dots_steps.png"))
    assert sheet.shape[1] == 4 * 64 + 3 * 4  # images of 16 pixels, enlarged


def test_images_are_reconstructed_with_their_differences(diffusion):
    photos = [str(path) for path in sorted((diffusion.data / "images/dots/train/good").iterdir())[:3]]
    arguments = ["--no-classifier", "--set", "dataset.batch_size=2", "--reconstruct", *photos]
    failed = diffusion.run("sample.py", *arguments, code=2)
    assert "--class_name is missing, one of dots, lines" in failed.stderr
    done = diffusion.run("sample.py", *arguments, "--class_name", "dots")
    means = [float(value) for value in re.findall(r"by (\d+\.\d+) grey levels", done.stdout)]
    assert len(means) == 3
    sheet = np.asarray(Image.open(diffusion.out / "sample_vis/dots_reconstruction.png")).astype(int)
    top, side = 18 + 18, (sheet.shape[1] - 2 * 4) // 3  # images of 16 pixels, enlarged
    cells = (sheet[top : top + side, (side + 4) * i :][:, :side] for i in range(3))
    image, recon, difference = (cell[:: side // 16, :: side // 16] for cell in cells)
    np.testing.assert_array_equal(image, read_image(photos[0], (16, 16)))
    assert np.abs(image - recon).mean() == pytest.approx(means[0], abs=0.01)
    np.testing.assert_array_equal(difference[..., 0], (4 * np.abs(image - recon).max(axis=2)).clip(0, 255))
