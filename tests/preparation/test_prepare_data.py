"""prepare_data.py: official layouts, the user's own images, what it refuses, and what it writes."""

import json
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import prepare_data
from datasets.catalog import CATALOG
from datasets.lists import read_list
from tests import in_process, quick_start
from tests.conftest import REPOSITORY, script_environment
from tests.layout_trees import BAD, GOOD, TRAIN, image_file, mask, mvtec_class, official, ok_ko_class
from utils.config import load_config

ROOTS = {"VisA reshaped": "VisA"}


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run prepare_data.py in an empty folder."""

    def run(*arguments: object, code: int = 0) -> Done:
        status, out, err = in_process.run(prepare_data.main, map(str, arguments), tmp_path, monkeypatch, capsys)
        assert status == code, out + err
        return Done(status, out, err)

    return run


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the benchmarks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["MVTec-AD", "MPDD", "BTAD", "VisA", "VisA reshaped"])
def test_official_layouts_give_complete_lists(tree, tmp_path, prepare):
    dataset = ROOTS.get(tree, tree)
    official(tree, tmp_path / "download/some folder")
    done = prepare("--dataset", dataset, "--root", "download")
    info, samples = CATALOG[dataset], tmp_path / "data" / dataset / "samples"
    images = tmp_path / "data" / dataset / info.type
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        f"{split}_{name}.json" for split in ("train", "test") for name in (*info.classes, "uni")
    )
    defect_types = 2 if info.layout.startswith("C/train/good") else 1
    for name in info.classes:
        train, test = (read_list(samples / f"{split}_{name}.json", images) for split in ("train", "test"))
        assert [sample.label for sample in train] == [0] * TRAIN
        assert sum(sample.label for sample in test) == defect_types * BAD
        assert len(test) == GOOD + defect_types * BAD
        assert all(sample.maskname for sample in test if sample.label)
        assert {sample.clsname for sample in train + test} == {name}
        for sample in test:
            if sample.label:
                stem = Path(sample.filename).stem
                assert Path(sample.maskname).stem in (stem, f"{stem}_mask")
    assert len(read_list(samples / "train_uni.json", images)) == TRAIN * len(info.classes)
    # The generated tree has other counts than published, and prepare_data.py says so for every class.
    first, (published, _) = next(iter(info.counts.items()))
    assert f"{first}: {TRAIN} training images (published: {published})" in done.out
    assert "unreadable" not in done.out
    assert done.err == ""


@pytest.mark.parametrize("tree", ["MVTec-AD", "MPDD", "BTAD", "VisA", "VisA reshaped"])
def test_official_lists_train_for_a_step(tree, tmp_path, prepare):
    dataset = ROOTS.get(tree, tree)
    official(tree, tmp_path / "tree")
    official("DTD", tmp_path / "dtd")
    prepare("--dataset", dataset, "--root", "tree")
    prepare("--dataset", "DTD", "--root", "dtd")
    settings = {
        "structure": "[{name: block1, layers: [{idx: layer1, planes: 64}], stride: 4}]",
        "net.backbone.kwargs": "{backbone: resnet18, weights: random}",
        "net.afs.kwargs.init_bsn": 1,
        "net.rrs.kwargs.mode_numbers": "[8, 8]",
        "dataset.train.anomaly_types": "{normal: 0.5, dtd: 0.5}",
        "dataset.input_size": "[64, 64]",
        "dataset.workers": 0,
        "trainer.max_epoch": 1,
    }
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / dataset).mkdir()
    text = (REPOSITORY / "experiments" / dataset / "realnet.yaml").read_text()
    (tmp_path / "experiments" / dataset / "realnet.yaml").write_text(text)
    name = CATALOG[dataset].classes[-1]
    command = [str(REPOSITORY / "train_realnet.py"), "--dataset", dataset, "--class_name", name]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = quick_start.run(command, tmp_path, script_environment())
    assert done.returncode == 0, done.stderr
    assert "pixel_auroc" in done.stdout
    assert (tmp_path / "experiments" / dataset / "realnet_checkpoints" / name / "ckpt_best.pth.tar").is_file()


def test_findings_of_an_incomplete_download(tmp_path, prepare):
    official("MPDD", tmp_path / "tree")
    for path in (tmp_path / "tree/tubes").rglob("*.png"):
        path.unlink()
    (tmp_path / "tree/connector/ground_truth/crack/000_mask.png").unlink()
    mask(tmp_path / "tree/connector/ground_truth/crack/077_mask.png")
    mvtec_class(tmp_path / "tree/gearbox")
    good = tmp_path / "tree/metal_plate/train/good/001.png"
    good.write_bytes(good.read_bytes()[:100])
    done = prepare("--dataset", "MPDD", "--root", "tree", code=1)
    written = (tmp_path / "data/MPDD/findings.txt").read_text()
    assert "missing: tubes: the whole class" in written
    assert "without a mask: connector/test/crack/000.png: has no mask" in done.out
    assert "surplus: connector/ground_truth/crack/077_mask.png: is a mask without" in done.out
    assert "surplus: gearbox: is not a class of the data set" in done.out
    assert "unreadable: metal_plate/train/good/001.png: is not a readable image" in done.err
    assert "1 unreadable, 1 without a mask" in done.out
    assert "metal_plate/train/good/001.png" in written
    assert len(lines_of(tmp_path / "data/MPDD/samples/train_metal_plate.json")) == TRAIN - 1
    assert not (tmp_path / "data/MPDD/samples/train_tubes.json").exists()


def test_textures_are_found_and_counted(tmp_path, prepare):
    official("DTD", tmp_path / "tree")
    done = prepare("--dataset", "DTD", "--root", tmp_path / "tree")
    assert "6 textures in 3 folders" in done.out
    assert "missing: images: 6 here, 5640 published; any number will do" in done.out
    assert len(list((tmp_path / "data/DTD/images").rglob("*.jpg"))) == 6
    assert not (tmp_path / "data/DTD/samples").exists()


def test_copies_instead_of_links(tmp_path, prepare):
    official("BTAD", tmp_path / "tree")
    (tmp_path / "tree/01/train/ok/readme.txt").write_text("not to be copied")
    prepare("--dataset", "BTAD", "--root", "tree")
    target = tmp_path / "data/BTAD/btad"
    assert target.is_symlink()
    prepare("--dataset", "BTAD", "--root", "tree", "--copy")
    assert not target.is_symlink()
    assert not (target / "01/train/ok/readme.txt").exists()
    read_list(tmp_path / "data/BTAD/samples/test_uni.json", target)
    changed = target / "01/train/ok/0000.bmp"
    image_file(changed, "other")
    done = prepare("--dataset", "BTAD", "--root", "tree", "--copy", code=2)
    assert str(changed.relative_to(tmp_path)) in done.err
    done = prepare("--dataset", "BTAD", "--root", "tree", code=2)
    assert "--root data/BTAD/btad" in done.err
    prepare("--dataset", "BTAD", "--root", target)


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz", ".zip"])
def test_archives_work_like_folders(suffix, tmp_path, prepare):
    official("BTAD", tmp_path / "BTech")
    archive = tmp_path / f"btad{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for path in sorted((tmp_path / "BTech").rglob("*")):
                opened.write(path, path.relative_to(tmp_path))
    else:
        with tarfile.open(archive, f"w:{suffix[5:]}") as opened:
            opened.add(tmp_path / "BTech", "BTech")
    prepare("--dataset", "BTAD", "--root", archive)
    target = tmp_path / "data/BTAD/btad"
    assert len(read_list(tmp_path / "data/BTAD/samples/train_uni.json", target)) == 3 * TRAIN
    assert os.access(target, os.R_OK | os.X_OK)
    assert not target.is_symlink()
    before = sorted(target.rglob("*"))
    assert "already exists" in prepare("--dataset", "BTAD", "--root", archive, code=2).err
    assert sorted(target.rglob("*")) == before


# ---- the user's own images -------------------------------------------------------------------------------------------


def test_own_images_in_the_layout_of_mvtec(tmp_path, prepare):
    mvtec_class(tmp_path / "shots", suffix=".jpg")
    done = prepare("--dataset", "MyParts", "--root", "shots")
    train = lines_of(tmp_path / "data/MyParts/samples/train_MyParts.json")
    test = lines_of(tmp_path / "data/MyParts/samples/test_MyParts.json")
    assert len(train) == TRAIN
    assert sum("maskname" in line for line in test) == 2 * BAD
    assert test[-1 - GOOD] == {
        "filename": "test/cut/001.jpg",
        "label": 1,
        "label_name": "defective",
        "clsname": "MyParts",
        "maskname": "ground_truth/cut/001_mask.png",
    }
    config = load_config(tmp_path / "experiments/MyParts/realnet.yaml")
    assert config.dataset.input_size == [224, 288]
    assert "so they are enlarged; --input-size 32 64 would be faster" in done.out
    assert config.dataset.foreground == "none"
    assert load_config(tmp_path / "experiments/MyParts/sample.yaml").classifier is None
    assert not (tmp_path / "experiments/MyParts/classifier.yaml").exists()
    assert "python train_realnet.py --dataset MyParts --class_name MyParts" in done.out


def test_a_folder_per_class_in_different_layouts(tmp_path, prepare):
    ok_ko_class(tmp_path / "shots/nuts")
    for i in range(20):
        image_file(tmp_path / f"shots/bolts/good/{i}.PNG", ("bolt", i), format="PNG")
    for i in range(5):
        image_file(tmp_path / f"shots/bolts/bad/{i}.PNG", ("bad", i), format="PNG")
        mask(tmp_path / f"shots/bolts/masks/{i}.png")
    for i in range(4):
        image_file(tmp_path / f"shots/washers/{i}.webp", ("washer", i))
    prepare("--dataset", "MyParts", "--root", "shots")
    samples, images = tmp_path / "data/MyParts/samples", tmp_path / "data/MyParts/images"
    bolts = read_list(samples / "test_bolts.json", images)
    assert len(read_list(samples / "train_bolts.json", images)) == 16
    assert [sample.label for sample in bolts] == [0] * 4 + [1] * 5
    assert [sample.maskname for sample in bolts if sample.label] == [f"bolts/masks/{i}.png" for i in range(5)]
    assert len(read_list(samples / "train_washers.json", images)) == 4
    assert (samples / "test_washers.json").read_text() == ""
    assert len(read_list(samples / "train_uni.json", images)) == TRAIN + 16 + 4
    for name in ("diffusion.yaml", "classifier.yaml"):
        config = yaml.safe_load((tmp_path / "experiments/MyParts" / name).read_text())
        assert (config.get("unet") or config["classifier"])["class_number"] == 3
    for path in (tmp_path / "experiments/MyParts").iterdir():
        load_config(path)
        assert "mvtec" not in path.read_text()


def test_a_split_follows_its_seed_and_fraction(tmp_path, prepare):
    for i in range(20):
        image_file(tmp_path / f"shots/ok/{i:02d}.png", i)
        image_file(tmp_path / f"shots/ko/{i:02d}.png", -i - 1)

    def split(*arguments: object) -> list[str]:
        prepare("--dataset", "parts", "--root", "shots", "--overwrite", *arguments)
        return [line["filename"] for line in lines_of(tmp_path / "data/parts/samples/train_parts.json")]

    assert len(split()) == 16
    assert split("--seed", 1) == split("--seed", 1) != split("--seed", 2)
    assert len(split("--test-fraction", 0.5)) == 10


def test_if_all_images_are_good_all_are_for_training(tmp_path, prepare):
    for i in range(6):
        image_file(tmp_path / f"shots/{i}.png", i)
    out = prepare("--dataset", "parts", "--root", "shots").out
    assert len(lines_of(tmp_path / "data/parts/samples/train_parts.json")) == 6
    assert lines_of(tmp_path / "data/parts/samples/test_parts.json") == []
    # There is nothing to evaluate on.
    assert "predict.py --checkpoint experiments/parts/realnet_checkpoints/parts" in out
    assert "evaluation_realnet.py" not in out
    out = prepare("--dataset", "parts", "--root", "shots", "--test-fraction", "0.5", "--overwrite").out
    assert "evaluation_realnet.py" in out
    assert len(lines_of(tmp_path / "data/parts/samples/test_parts.json")) == 3


def test_masks_beside_their_images_and_inside_the_defect_folder(tmp_path, prepare):
    image_file(tmp_path / "shots/good/0.png", 0)
    image_file(tmp_path / "shots/good/1.png", 1)
    for defect_type in ("a", "b"):
        image_file(tmp_path / f"shots/{defect_type}/7.jpg", defect_type)
    mask(tmp_path / "shots/a/7_mask.png")
    mask(tmp_path / "shots/b/ground_truth/7.png")
    prepare("--dataset", "parts", "--root", "shots")
    test = lines_of(tmp_path / "data/parts/samples/test_parts.json")
    assert {line.get("maskname") for line in test if line["label"]} == {"a/7_mask.png", "b/ground_truth/7.png"}


def test_names_with_spaces_and_other_scripts(tmp_path, prepare):
    for i in range(5):
        image_file(tmp_path / f"我的 图片/良品/bild {i} ü.PNG", i, format="PNG")
    image_file(tmp_path / "我的 图片/划痕/é.TIF", "x", format="TIFF")
    prepare("--dataset", "teile", "--root", "我的 图片", "--preview")
    files = [line["filename"] for line in lines_of(tmp_path / "data/teile/samples/test_teile.json")]
    assert "划痕/é.TIF" in files
    assert (tmp_path / "data/teile/preview/teile.png").is_file()


def test_near_duplicates_over_the_split_are_reported(tmp_path, prepare):
    mvtec_class(tmp_path / "shots", defect_types=["crack"])
    for i in range(8):
        image_file(tmp_path / f"shots/train/good/1{i}.png", ("more", i))
    original = Image.open(tmp_path / "shots/train/good/12.png")
    brighter = np.clip(np.asarray(original).astype(float) * 1.1, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).save(tmp_path / "shots/test/good/again.jpg", quality=80)
    done = prepare("--dataset", "parts", "--root", "shots")
    assert (
        "on both sides of the split: test/good/again.jpg: is nearly the same as the training image train/good/12.png"
        in done.out
    )
    assert "findings: 1 on both sides of the split" in done.out


def test_near_duplicates_stay_on_one_side_of_a_made_split(tmp_path, prepare):
    for i in range(12):
        path = image_file(tmp_path / f"shots/good/{i:02d}_a.png", i)
        Image.open(path).save(tmp_path / f"shots/good/{i:02d}_b.jpg", quality=90)
    image_file(tmp_path / "shots/bad/0.png", "bad")
    done = prepare("--dataset", "parts", "--root", "shots", "--test-fraction", "0.5")
    train = {line["filename"][5:7] for line in lines_of(tmp_path / "data/parts/samples/train_parts.json")}
    test = {line["filename"][5:7] for line in lines_of(tmp_path / "data/parts/samples/test_parts.json")}
    assert len(train) == 6
    assert not train & test
    assert "both sides" not in done.out


def test_lists_and_settings_that_differ_are_not_lost(tmp_path, prepare):
    mvtec_class(tmp_path / "shots")
    prepare("--dataset", "parts", "--root", "shots")
    samples, settings = tmp_path / "data/parts/samples/train_parts.json", tmp_path / "experiments/parts/realnet.yaml"
    edited = settings.read_text() + "# edited\n"
    settings.write_text(edited)
    done = prepare("--dataset", "parts", "--root", "shots")
    assert "experiments/parts/realnet.yaml is kept as it is (delete it to have it written anew)" in done.out
    done = prepare("--dataset", "parts", "--root", "shots", "--input-size", "64", "96")
    assert re.search(
        r"realnet.yaml is kept as it is: it has dataset.input_size .*, not \[64, 96\]; .*avgpool_size .*\(delete it",
        done.out,
    )
    assert settings.read_text() == edited
    image_file(tmp_path / "shots/train/good/new.png", "new")
    before = samples.read_text()
    assert "--overwrite" in prepare("--dataset", "parts", "--root", "shots", code=2).err
    assert samples.read_text() == before
    prepare("--dataset", "parts", "--root", "shots", "--overwrite")
    assert len(lines_of(samples)) == TRAIN + 1
    assert settings.read_text() == edited


def test_sizes_that_the_diffusion_model_cannot_draw_are_rounded_up_for_it(tmp_path, prepare):
    mvtec_class(tmp_path / "shots")
    done = prepare("--dataset", "parts", "--root", "shots", "--input-size", 119, 193, "--foreground", "auto")
    config = load_config(tmp_path / "experiments/parts/realnet.yaml")
    assert config.dataset.input_size == [119, 193]
    assert "enlarged" not in done.out  # the size was chosen
    assert config.dataset.foreground == "auto"
    assert load_config(tmp_path / "experiments/parts/diffusion.yaml").dataset.input_size == [128, 224]
    sample = load_config(tmp_path / "experiments/parts/sample.yaml").dataset
    assert (sample.H, sample.W) == (128, 224)
    assert "draws 128x224" in done.out


REAL = REPOSITORY.parent / "shared/real"


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not there")
@pytest.mark.parametrize(
    ("folder", "counts"), [("magnetic_tile", (348, 90, 170, 170)), ("nomask/crackforest", (150, 50, 50, 0))]
)
def test_real_photographs(folder, counts, tmp_path, prepare):
    done = prepare("--dataset", "real", "--root", REAL / folder)
    train, test = (lines_of(tmp_path / f"data/real/samples/{split}_real.json") for split in ("train", "test"))
    defective = [line for line in test if line["label"]]
    masked = [line for line in defective if "maskname" in line]
    assert (len(train), len(test) - len(defective), len(defective), len(masked)) == counts
    # Their authors split by physical tile and by place, so no test image nearly equals a training image.
    assert "both sides" not in done.out


def test_preview_shows_the_available_images(tmp_path, prepare):
    mvtec_class(tmp_path / "shots")
    done = prepare("--dataset", "parts", "--root", "shots", "--preview", "--preset", "paper")
    assert "no sdas images in data/parts/sdas/parts yet" in done.out
    sheet = tmp_path / "data/parts/preview/parts.png"
    first = sheet.read_bytes()
    for i in range(3):
        image_file(tmp_path / f"data/parts/sdas/parts/rank0_{i}.jpg", i)
    done = prepare("--dataset", "parts", "--preview")
    assert "yet" not in done.out
    assert sheet.read_bytes() != first
    # The sheet has at most eight columns, three rows of images and two of each of four types.
    width, height = Image.open(sheet).size
    assert width > 7 * 192
    assert height > 11 * 140
