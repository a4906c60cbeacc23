"""The anomaly type edit: training on pairs that were written before."""

import csv

import numpy as np
import pytest
from easydict import EasyDict
from PIL import Image

from datasets.build import build_realnet_train_set, check_realnet_data
from datasets.images import read_image
from tests.conftest import settings, write_png
from utils.config import checked
from utils.errors import UsageError

SIDE = 64


@pytest.fixture
def pairs(tiny_data):
    """Pairs of the first two images of the class dots, and one of another type."""
    folder = tiny_data / "edit/dots"
    rows = []
    for number, good in enumerate(("dots/train/good/000.png", "dots/train/good/001.png")):
        image, mask = read_image(tiny_data / "images" / good).copy(), np.zeros((SIDE, SIDE), np.uint8)
        mask[5 + number : 20, 8:30] = 255
        image[mask > 0] = (250, 20, 90 + number)
        write_png(folder / f"test/edit/{number:06d}.png", image[..., ::-1])
        write_png(folder / f"ground_truth/edit/{number:06d}_mask.png", mask)
        place = f"edit/{number:06d}"
        rows.append(
            {"image": f"test/{place}.png", "mask": f"ground_truth/{place}_mask.png", "good": good, "type": "edit"}
        )
    rows.append({**rows[0], "image": "test/dtd/000002.png", "type": "dtd"})
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def config_of(data, **train) -> EasyDict:
    config = settings(str(data), str(data))["realnet"]
    config["dataset"]["train"] |= {"anomaly_types": {"edit": 1.0}, "edit_dir": f"{data}/edit/{{}}", **train}
    return EasyDict(checked(config, data / "realnet.yaml", "realnet")).dataset


def test_a_pair_of_its_own_image_gets_the_same_augmentation(tiny_data, pairs):
    train_set = build_realnet_train_set(config_of(tiny_data, hflip=True, vflip=True, jitter=0.3), "dots", 3)
    turned = set()
    for epoch in range(12):
        drawn = train_set.draw(epoch, 1)
        mask = drawn.anomaly.mask > 0
        assert drawn.anomaly.file.path.name == "000001.png"
        assert mask.sum() == 14 * 22
        rows, columns = np.nonzero(mask)
        turned.add((int(rows.min()), int(columns.min())))
        blended = drawn.anomaly.blend(drawn.image)
        np.testing.assert_array_equal(blended[~mask], drawn.image[~mask])
        # All of the source is the good image, in the same place and as bright, but for the anomaly.
        np.testing.assert_array_equal(drawn.anomaly.source[~mask], drawn.image[~mask])
        assert len(np.unique(blended[mask], axis=0)) == 1
    assert turned == {(6, 8), (6, 34), (44, 8), (44, 34)}


def test_an_image_without_a_pair_gets_the_changed_region_of_another(tiny_data, pairs):
    train_set = build_realnet_train_set(config_of(tiny_data), "dots", 3)
    used = set()
    for epoch in range(12):
        drawn = train_set.draw(epoch, 5)
        used.add(drawn.anomaly.file.path.name)
        mask = drawn.anomaly.mask > 0
        blended = drawn.anomaly.blend(drawn.image)
        assert (blended[mask][:, :2] == (250, 20)).all()
        np.testing.assert_array_equal(blended[~mask], drawn.image[~mask])
    assert used == {"000000.png", "000001.png"}


def test_a_broken_pair_is_left_out(tiny_data, pairs, caplog):
    (pairs / "ground_truth/edit/000001_mask.png").write_bytes(b"none")
    with caplog.at_level("WARNING", logger="realnet"):
        train_set = build_realnet_train_set(config_of(tiny_data), "dots", 3)
    assert "1 of 2 images cannot be read" in caplog.text
    assert {train_set.draw(epoch, 1).anomaly.file.path.name for epoch in range(4)} == {"000000.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "pairs.csv").unlink(), "pairs.csv does not exist; run synthesize.py --source edit"),
        (lambda folder: (folder / "pairs.csv").write_text("a,b\n1,2\n"), "lacks the column image"),
        (lambda folder: write_rows(folder, [dict.fromkeys(("image", "mask", "good", "type"), "x")]), "holds no pair"),
        (lambda folder: [path.unlink() for path in (folder / "test/edit").iterdir()], "no pair in"),
    ],
)
def test_a_folder_without_pairs_is_refused(tiny_data, pairs, change, message):
    change(pairs)
    with pytest.raises(UsageError, match=message):
        check_realnet_data(config_of(tiny_data), "dots")


def test_without_a_folder_the_setting_is_named(tiny_data):
    with pytest.raises(UsageError, match=r"dataset\.train\.edit_dir: not set"):
        check_realnet_data(config_of(tiny_data, edit_dir=None), "dots")


def test_pairs_of_another_size_are_resized_with_their_masks(tiny_data, pairs):
    for path in (pairs / "test/edit/000000.png", pairs / "ground_truth/edit/000000_mask.png"):
        with Image.open(path) as image:
            image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST).save(path)
    drawn = build_realnet_train_set(config_of(tiny_data), "dots", 3).draw(0, 0)
    assert drawn.anomaly.mask.sum() == 15 * 22
    assert drawn.anomaly.source.shape == (SIDE, SIDE, 3)
