"""The contact sheet of what training will see."""

import numpy as np
from PIL import Image

from preparation import preview
from tests.conftest import settings
from utils.config import checked


def captions_of(data, monkeypatch, **train) -> list[str]:
    """The captions of the sheet's rows, each of which holds eight pictures."""
    config = settings(str(data), "out")["realnet"]
    config["dataset"]["train"].update(train)
    rows = []
    monkeypatch.setattr(preview, "contact_sheet", lambda given: rows.extend(given) or np.zeros((1, 1, 3), np.uint8))
    preview.preview_sheet(checked(config, "realnet.yaml").dataset, "dots", 0)
    assert all(len(images) == 8 for caption, images in rows[3:])
    return [caption for caption, _ in rows if caption]


def test_every_type_that_there_are_images_for_has_a_row(tiny_data, monkeypatch):
    types = {"normal": 0.4, "dtd": 0.35, "noise": 0.25}
    rows = captions_of(tiny_data, monkeypatch, dtd_dir=str(tiny_data / "images/lines/train"), anomaly_types=types)
    assert [row.split(":")[0] for row in rows[3:]] == ["cutpaste", "self", "noise", "dtd"]
    told = ["not trained on", "not trained on", "25% of the training", "35% of the training"]
    assert [words in row for words, row in zip(told, rows[3:], strict=True)] == [True] * 4
    rows = captions_of(tiny_data, monkeypatch, dtd_dir=None, sdas_dir=str(tiny_data / "images/{}/test"))
    assert [row.split(":")[0] for row in rows[3:]] == ["cutpaste", "self", "noise", "sdas"]


def test_pairs_that_are_trained_on_have_a_row(tiny_data, monkeypatch):
    folder = tiny_data / "edit/dots"
    folder.mkdir(parents=True)
    good = sorted((tiny_data / "images/dots/train/good").iterdir())[:3]
    with Image.open(good[0]) as image:
        mask = Image.new("L", image.size)
    mask.paste(255, (2, 2, 8, 8))
    mask.save(folder / "mask.png")
    lines = [f"{path},mask.png,dots/train/good/{path.name},edit" for path in good]
    (folder / "pairs.csv").write_text("\n".join(["image,mask,good,type", *lines]), encoding="utf-8")
    types = {"normal": 0.5, "edit": 0.5}
    rows = captions_of(tiny_data, monkeypatch, anomaly_types=types, edit_dir=str(tiny_data / "edit/{}"))
    edits = [row for row in rows if row.startswith("edit:")]
    assert len(edits) == 1
    assert "50% of the training" in edits[0]
