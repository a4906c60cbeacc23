"""synthesize.py: a folder of pairs that is a data set, the same for any number of ranks and after any interruption."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

import prepare_data
import synthesize
from datasets.images import read_image, read_mask
from datasets.lists import read_list
from datasets.pair_folders import PairFolder
from datasets.pair_types import chosen_types
from tests import in_process
from tests.conftest import CLASSES, Workspace
from utils.errors import RunError

TYPES = "cutpaste,self,noise"


@pytest.fixture
def command(workspace: Workspace, tmp_path: Path, monkeypatch, capsys):
    """Runs synthesize.py for the class dots in the workspace, into a folder of the test."""

    def run(*options: str, output: str = "pairs") -> tuple[int, str, str]:
        arguments = ["--dataset", "tiny", "--output", str(tmp_path / output), *options]
        if "--class_name" not in options:
            arguments += ["--class_name", "dots"]
        return in_process.run(synthesize.main, arguments, workspace.root, monkeypatch, capsys)

    return run


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "pairs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_output_is_a_data_set_that_prepare_data_reads(command, workspace, tmp_path, monkeypatch, capsys):
    code, out, err = command("--count", "10", "--class_name", "all", "--types", f"dtd,{TYPES}", "--format", "yolo")
    assert code == 0, err
    assert "dots: 10 pairs" in out
    for name in CLASSES:
        folder = tmp_path / "pairs" / name
        rows = table(folder)
        assert [Path(row["image"]).stem for row in rows] == [f"{i:06d}" for i in range(10)]
        for row in rows:
            image, mask = read_image(folder / row["image"]), read_mask(folder / row["mask"])
            original = read_image(workspace.data / "images" / row["good"])
            np.testing.assert_array_equal(image[mask == 0], original[mask == 0])
            assert set(np.unique(cv2.imread(str(folder / row["mask"]), cv2.IMREAD_GRAYSCALE))) <= {0, 255}
            assert bool(row["source"]) == (row["type"] == "dtd")
        assert read_image(folder / "preview.png").shape[1] == 6 * 128 + 5 * 4  # of 64 pixels, enlarged
    arguments = ["--dataset", "Pairs", "--root", str(tmp_path / "pairs")]
    code, out, err = in_process.run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 0, err
    assert "surplus" not in out
    for name in CLASSES:
        lists = {split: read_list(tmp_path / f"data/Pairs/samples/{split}_{name}.json", tmp_path / "data/Pairs/images")
                 for split in ("train", "test")}  # fmt: skip
        assert len(lists["train"]) == 8
        defective = [sample for sample in lists["test"] if sample.label]
        assert len(lists["test"]) - len(defective) == 4
        assert sorted(sample.filename for sample in defective) == sorted(
            f"{name}/{row['image']}" for row in table(tmp_path / "pairs" / name)
        )
        assert all(sample.maskname for sample in defective)


def test_yolo_and_coco_files_name_the_pairs_and_their_masks(command, tmp_path):
    for form in ("yolo", "coco"):
        assert command("--count", "8", "--types", TYPES, "--size", "input", "--format", form)[0] == 0
    folder = tmp_path / "pairs/dots"
    content = json.loads((folder / "annotations.json").read_text())
    settings = yaml.safe_load((folder / "yolo/data.yaml").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    assert list(names.values()) == list(settings["names"].values()) == TYPES.split(",")
    rows = {row["image"]: row for row in table(folder)}
    assert [image["file_name"] for image in content["images"]] == list(rows)
    for image in content["images"]:
        row = rows[image["file_name"]]
        mask = read_mask(folder / row["mask"])
        of_image = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert (image["height"], image["width"]) == mask.shape == (64, 64)
        assert sum(entry["area"] for entry in of_image) == mask.sum()
        assert {names[entry["category_id"]] for entry in of_image} == {row["type"]}
        split = "val" if row["index"] == "4" else "train"
        name = f"{split}/{row['type']}_{Path(row['image']).stem}"
        assert (folder / f"yolo/images/{name}.png").read_bytes() == (folder / row["image"]).read_bytes()
        lines = (folder / f"yolo/labels/{name}.txt").read_text().splitlines()
        assert len(lines) == len(of_image)
        assert {settings["names"][int(line.split()[0])] for line in lines} == {row["type"]}
    ids = [entry["id"] for entry in content["annotations"]]
    assert ids == sorted(set(ids))


def test_annotations_of_an_earlier_command_name_the_pairs_that_are_added(command, tmp_path):
    for options in (["3", "--format", "yolo"], ["3", "--format", "coco"], ["6"]):
        assert command("--types", TYPES, "--count", *options)[0] == 0
    folder = tmp_path / "pairs/dots"
    images = [row["image"] for row in table(folder)]
    assert len(images) == 6
    annotations = json.loads((folder / "annotations.json").read_text())
    assert [image["file_name"] for image in annotations["images"]] == images
    assert {entry["image_id"] for entry in annotations["annotations"]} == set(range(6))
    for kind in ("images", "labels"):
        assert len([path for path in (folder / "yolo" / kind).rglob("*") if path.is_file()]) == 6


def test_the_same_folder_for_any_ranks_and_threads_and_after_being_stopped(command, workspace, tmp_path, monkeypatch):
    options = ["--types", TYPES, "--format", "coco"]
    assert command("--count", "12", *options, "--set", "dataset.workers=2")[0] == 0
    expected = digests(tmp_path / "pairs")

    arguments = ["--class_name", "dots", "--count", "12", *options, "--output", str(tmp_path / "ranks")]
    workspace.run("synthesize.py", *arguments, ranks=2)
    assert digests(tmp_path / "ranks") == expected

    write, written = PairFolder.write, []

    def fails_after_five(folder: PairFolder, number: int, *pair):
        if len(written) == 5:
            raise RunError("the disk is full")
        written.append(number)
        return write(folder, number, *pair)

    monkeypatch.setattr(PairFolder, "write", fails_after_five)
    assert command("--count", "12", *options, output="stopped")[0] == 1
    # A process that is killed leaves a pair without its note, and a line cut off.
    (tmp_path / "stopped/dots/.pairs.rank0.jsonl").open("a").write('{"image": "te')
    del written[:]
    monkeypatch.setattr(PairFolder, "write", lambda *pair: written.append(pair[1]) or write(*pair))
    code, out, _ = command("--count", "12", *options, output="stopped")
    assert code == 0
    assert written == list(range(5, 12))
    assert "5 of them existed already" in out
    assert digests(tmp_path / "stopped") == expected

    assert command("--count", "7", *options, output="longer")[0] == 0
    del written[:]
    assert command("--count", "12", *options, output="longer")[0] == 0
    assert written == list(range(7, 12))
    assert digests(tmp_path / "longer") == expected


def test_a_folder_of_other_settings_is_refused_and_overwrite_replaces_it(command, tmp_path):
    assert command("--count", "4", "--types", TYPES, "--size", "input")[0] == 0
    before = digests(tmp_path / "pairs")
    for options, change in (
        (["--seed", "3", "--size", "input"], "seed: 100 -> 3"),
        (["--size", "native"], "size: 'input' -> 'native'"),
        (["--types", "noise", "--size", "input"], "types"),
        (["--set", "dataset.input_size=[32,32]", "--size", "input"], "input_size"),
    ):
        arguments = [*options, *([] if "--types" in options else ["--types", TYPES])]
        code, _, err = command("--count", "4", *arguments)
        assert code == 2
        assert change in err
        assert "--overwrite" in err
    assert digests(tmp_path / "pairs") == before
    assert command("--count", "3", "--types", "noise", "--seed", "3", "--overwrite")[0] == 0
    after = tmp_path / "pairs/dots"
    assert [path.name for path in (after / "test").iterdir() if path.name != "good"] == ["noise"]
    assert len(table(after)) == len(list((after / "ground_truth").rglob("*.png"))) == 3


def test_no_pairs_are_made_of_images_that_training_holds_out(command, tmp_path):
    held_out = ["--set", "dataset.train.validation_fraction=0.5"]
    assert command("--count", "16", "--types", "noise", *held_out)[0] == 0
    folder = tmp_path / "pairs/dots"
    train, test = ({path.stem for path in (folder / split / "good").iterdir()} for split in ("train", "test"))
    assert len(test) == 4
    assert not train & test
    assert {Path(row["good"]).stem for row in table(folder)} == train


def test_a_list_of_all_classes_gives_a_folder_for_each(command, tmp_path):
    unified = ["--class_name", "all", "--set", "dataset.train.meta_file=data/tiny/samples/train_uni.json"]
    assert command("--count", "3", "--types", TYPES, *unified)[0] == 0
    for name in CLASSES:
        assert all(row["good"].startswith(f"{name}/") for row in table(tmp_path / "pairs" / name))
        assert len(list((tmp_path / "pairs" / name / "train/good").iterdir())) == 8
        assert len(list((tmp_path / "pairs" / name / "test/good").iterdir())) == 4


def test_images_that_are_added_for_one_class_do_not_concern_the_others(command, workspace, tmp_path):
    for name in CLASSES:
        shutil.copytree(workspace.data / "images" / name / "test/spot", tmp_path / "drawn" / name)
    options = ["--types", "sdas", "--count", "2", "--set", f"dataset.train.sdas_dir={tmp_path}/drawn/{{}}"]
    options += ["--class_name", "all", "--set", "dataset.train.meta_file=data/tiny/samples/train_uni.json"]
    assert command(*options)[0] == 0
    shutil.copy(tmp_path / "drawn/lines/000.png", tmp_path / "drawn/lines/more.png")
    code, out, err = command(*options)
    assert code == 2
    assert "dots: 2 pairs" in out
    assert "pairs/lines: holds pairs of other settings (sources.sdas/lines" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "--count 0: at least 1"),
        (["--types", "sdass=1"], "'sdass' is no type; known are sdas, dtd, cutpaste, self, noise"),
        (["--types", "normal=0.5,noise=0.5"], "every pair has an anomaly"),
        (["--types", "noise=x"], "'x' is not a number"),
        (["--types", "noise=-1"], "has to be 0 or more"),
        (["--types", "noise=0"], "no type of anomaly has a share above 0"),
        (["--types", "noise=1,self"], "give every type a share, or none"),
        (["--types", "noise,noise"], "noise is there twice"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--class_name", "stars"], "known are dots, lines"),
        (["--types", "sdas", "--set", "dataset.train.sdas_dir=nowhere"], "run sample.py first"),
    ],
)
def test_wrong_use_is_told_in_a_line(options, message, command, tmp_path):
    code, _, err = command(*options)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) <= 2
    assert not (tmp_path / "pairs").exists()


def test_outputs_that_hold_something_else_are_left_alone(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = command("--types", TYPES, output="file")
    assert code == 2
    assert "is a file; name a folder" in err
    code, _, err = command("--types", TYPES, output="file/below")
    assert code == 2
    assert "file is a file, where a folder is needed" in err
    (tmp_path / "pairs/dots").mkdir(parents=True)
    (tmp_path / "pairs/dots/mine.txt").write_text("mine")
    code, _, err = command("--types", TYPES, "--overwrite")
    assert code == 2
    assert "holds mine.txt, which synthesize.py has not written" in err
    shutil.rmtree(tmp_path / "pairs")
    assert command("--types", TYPES, "--count", "2")[0] == 0
    (tmp_path / "pairs/dots/pairs.csv").write_text("image,mask\na,b\n")
    code, _, err = command("--types", TYPES, "--count", "2")
    assert code == 2
    assert "pairs.csv, line 2: is not as it was written; pass --overwrite" in err


def test_shares_need_not_add_up_and_are_in_one_order():
    types = chosen_types("noise=1, dtd=3", {})
    assert list(types.items()) == [("dtd", 0.75), ("noise", 0.25)]
    assert chosen_types("noise,dtd", {}) == {"dtd": 0.5, "noise": 0.5}
    assert chosen_types(None, {"normal": 0.5, "noise": 0.1, "sdas": 0.4}) == {"sdas": 0.8, "noise": 0.2}
