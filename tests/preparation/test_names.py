"""What the words in names of folders and files say, and what prepare_data.py makes of such folders."""

import doctest
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import prepare_data
from preparation import names
from preparation.names import BAD, GOOD, TEST, TRAIN, UNCLEAR, read_name
from tests.in_process import run
from tests.layout_trees import image_file, mask, mvtec_class, ok_ko_class

KINDS = {
    GOOD: (
        "good", "Good parts", "good_0", "0_good", "OK_parts", "OKParts", "okay", "normal_images", "PASS", "passed",
        "accepted", "goodparts", "gut", "Gutteile", "Gute Teile", "i.O.", "IO", "fehlerfrei", "bon", "Pièces bonnes",
        "conforme", "buenas", "buono", "goed", "Годные", "良品", "良品图片", "正常", "合格品", "无缺陷", "正常な画像",
        "양품", "정상", "defect-free", "no defects", "non_defective", "without cracks", "ohne Fehler", "sans défaut",
        "Ｇｏｏｄ", "no_1_good", "train_good", "OK图", "OK品", "ok样本", "无NG", "in Ordnung",
    ),
    BAD: (
        "bad", "Bad - crack", "1_bad", "NG", "NG_parts", "NGparts", "nok", "N-OK", "n_ok", "not ok", "KO", "not good",
        "NotGood", "notgood", "no good", "abnormal_images", "Anomalies", "defects", "defective", "fail", "rejected",
        "schlecht", "Schlechtteile", "nicht gut", "n.i.O.", "NIO", "Ausschuss", "Fehler", "mauvais", "défauts",
        "pas bon", "non conforme", "malo", "defectuoso", "difettosi", "defeito", "слом брак", "不良品", "不合格",
        "不正常", "异常", "划痕", "キズ", "불량", "비정상", "crack", "Scratches", "broken_large", "test_bad",
        "NG图", "NG品", "ng样本", "不OK", "未OK", "有缺陷", "NG_划痕", "nicht in Ordnung", "Ausschussware", "scrapped",
    ),
    UNCLEAR: ("positive", "Negative images", "pos", "true", "clean", "OK_NG", "good and bad", "陽性", "false positive",
        "正样本",
    ),
    None: (
        "bottle", "metal_nut", "hazelnut", "IO_module", "okra", "passport", "cable_swap", "color", "image 7", "{}",
        "01", "positive_pole", "notebook", "MT_Free", "abc", "nuts", "badge", "goodyear", "normandy", "connector",
        "3f2a9c1e-bad0-4c1d-8bad-0c0ffee0bad1", "9e1bad7c4f", "0ok1ng2", "c4bad1d3f00d",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, listed in KINDS.items() for name in listed])
def test_words_inside_a_name_say_whether_it_is_good(kind, name):
    assert read_name(name).kind == kind


def test_names_of_splits_and_masks():
    splits = {
        name: read_name(name).split for name in ("Training images", "test-set", "val", "训练", "测试集", "drop test")
    }
    assert list(splits.values()) == [TRAIN, TEST, TEST, TRAIN, TEST, TEST]
    assert [name for name in splits if not read_name(name).is_split] == ["drop test"]
    assert read_name("test_good").split == TEST
    assert not read_name("test_good").is_split
    masks = ("masks", "Crack masks", "ground truth", "ground_truth", "GT", "掩码", "Masken")
    assert all(read_name(name).mask for name in masks)
    assert not read_name("unmasked").mask
    assert read_name("Bad - crack").core == read_name("crack masks").core == "crack"


def test_examples_in_the_docstring_hold():
    result = doctest.testmod(names)
    assert result.attempted == 2
    assert result.failed == 0


# ---- folders ---------------------------------------------------------------------------------------------------------

Prepare = Callable[..., tuple[str, str]]


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys) -> Prepare:
    def call(*arguments: object, code: int = 0, root: str = "shots") -> tuple[str, str]:
        given = ["--dataset", "parts", *(["--root", root] if root else []), *map(str, arguments)]
        status, out, err = run(prepare_data.main, given, tmp_path, monkeypatch, capsys)
        assert status == code, out + err
        assert code != 2 or len(err.splitlines()) == 1
        return out, err

    return call


def fill(root: Path, counts: dict[str, int], suffix: str = ".png") -> None:
    """Make images: {"good": 3} makes good/0.png .. good/2.png."""
    for folder, count in counts.items():
        for i in range(count):
            image_file(root / "shots" / folder / f"{i}{suffix}", (folder, i))


def listed(root: Path, name: str = "parts") -> tuple[list[str], list[str], list[str]]:
    """File names of training images, and of good and defective test images."""
    train, test = (
        [json.loads(line) for line in (root / f"data/parts/samples/{split}_{name}.json").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert not any(line["label"] for line in train)
    good, bad = ([line["filename"] for line in test if line["label"] == label] for label in (0, 1))
    return [line["filename"] for line in train], good, bad


PAIRS = [
    ("Good parts", "Bad - crack"),
    ("OK_parts", "NG_parts"),
    ("normal_images", "abnormal_images"),
    ("0_good", "1_bad"),
    ("gut", "schlecht"),
    ("good", "not good"),
    ("OK", "NOK"),
    ("Pièces bonnes", "défauts"),
    ("良品", "不良品"),
    ("正常", "异常"),
    ("合格", "不合格"),
    ("양품", "불량"),
    ("годные", "брак"),
    ("i.O", "n.i.O"),
    ("defect-free", "defective"),
    ("pass", "oil"),
]


@pytest.mark.parametrize(("good", "bad"), PAIRS)
def test_two_folders_are_one_class_of_good_and_defective_images(good, bad, tmp_path, prepare):
    fill(tmp_path, {good: 5, bad: 3})
    mask(tmp_path / "shots" / bad / "1_mask.png")
    out, _ = prepare()
    train, test_good, test_bad = listed(tmp_path)
    assert {Path(name).parent.name for name in train + test_good} == {good}
    assert (len(train), len(test_good)) == (4, 1)
    assert test_bad == [f"{bad}/{i}.png" for i in range(3)]
    lines = {tuple(line.split("  ")[0].split()): line for line in out.splitlines()}
    assert lines[tuple(good.split())].endswith("5  good, for training and testing")
    assert lines[tuple(bad.split())].endswith(f"3  defect type {bad}, 1 with a mask")


def test_folders_that_say_their_split(tmp_path, prepare):
    fill(tmp_path, {"train_good": 4, "test_good": 2, "test_bad": 3})
    out, _ = prepare()
    train, good, bad = listed(tmp_path)
    assert [{Path(name).parts[0] for name in names} for names in (train, good, bad)] == [
        {"train_good"}, {"test_good"}, {"test_bad"}
    ]  # fmt: skip
    assert "with a split" in out


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"train/good": 4, "test/good parts": 2, "test/crack": 3}, (4, 2, 3)),
        ({"Training images": 4, "Test images/OK": 2, "Test images/NG": 3}, (4, 2, 3)),
        ({"train/images": 4, "val/ok": 2, "val/ng": 3}, (4, 2, 3)),
        ({"good": 4, "test/good": 2, "test/bad": 3}, (4, 2, 3)),
        ({"train": 4, "bad": 3}, (4, 0, 3)),
        ({"good/train": 4, "good/test": 2, "bad/test": 3}, (4, 2, 3)),
        ({"test/good": 5, "test/bad": 3}, (4, 1, 3)),
        ({"训练/良品": 4, "测试/良品": 2, "测试/划痕": 3}, (4, 2, 3)),
        ({"data/good": 5, "data/scratch": 3}, (4, 1, 3)),
    ],
)
def test_splits_in_other_words_and_places(counts, expected, tmp_path, prepare):
    fill(tmp_path, counts)
    out, _ = prepare()
    assert tuple(map(len, listed(tmp_path))) == expected
    assert "surplus" not in out


def test_file_names_say_it_where_no_folder_does(tmp_path, prepare):
    for i in range(5):
        image_file(tmp_path / f"shots/good_{i}.png", i)
    for i in range(3):
        image_file(tmp_path / f"shots/bad_{i}.png", -1 - i)
    mask(tmp_path / "shots/bad_1_mask.png")
    image_file(tmp_path / "shots/7.png", "x")
    out, _ = prepare()
    train, good, bad = listed(tmp_path)
    assert all(name.startswith("good_") for name in train + good)
    assert (len(train), len(good), bad) == (4, 1, ["bad_0.png", "bad_1.png", "bad_2.png"])
    assert "surplus: 7.png: its name does not say whether it is good" in out
    assert ".            3  defective, by the files' names, 1 with a mask" in out
    assert ".            5  good, for training and testing, by the files' names" in out


def test_a_class_is_not_taken_for_a_kind(tmp_path, prepare):
    mvtec_class(tmp_path / "shots/normal bolts")
    ok_ko_class(tmp_path / "shots/crack bolts")
    fill(tmp_path, {"IO_module": 3, "CPU_module": 3})
    prepare()
    names = sorted(path.name for path in (tmp_path / "data/parts/samples").glob("train_*"))
    assert names == [f"train_{n}.json" for n in ("CPU_module", "IO_module", "crack bolts", "normal bolts", "uni")]


UNCLEAR_FOLDERS = {
    # case: (folders, what is said)
    "positive and negative": (
        ["positive", "negative"],
        "not clear which folder holds good images (negative, positive)",
    ),
    "positive and negative to test": (
        ["train/good", "test/pos", "test/neg"],
        "test: not clear which folder holds good",
    ),
    "0 and 1": (["0", "1"], "not clear which folder holds good images (0, 1)"),
    "bad alone": (["bad"], "shots/bad: has no folder of good images beside it"),
    "bad with kinds": (["bad/crack", "bad/cut"], "shots/bad: has no folder of good images beside it"),
    "kinds alone": (["MT_Free", "MT_Crack"], "shots/MT_Crack: has no folder of good images beside it"),
    "images beside bad": (["", "bad"], "shots/bad: has no folder of good images beside it"),
    "images beside bad, in a class": (
        ["bolts", "bolts/bad", "nuts"],
        "shots/bolts/bad: has no folder of good images beside",
    ),
    "both in one": (["good", "OK_NG"], "not clear which folder holds good images (OK_NG)"),
    "days to train on": (
        ["train/day1", "train/day2", "test/bad"],
        "train: not clear which folder holds good images (day1",
    ),
    "good bolts and nuts": (["good bolts", "good nuts"], "good bolts, good nuts may be several classes"),
    "two products": (["ok bolts", "ok nuts", "ng bolts", "ng nuts"], "may be several classes"),
    "a good one and others": (["good bolts", "nuts"], "not clear whether nuts is a defect of good bolts"),
}


@pytest.mark.parametrize("case", UNCLEAR_FOLDERS)
def test_unclear_folders_are_refused(case, tmp_path, prepare):
    folders, text = UNCLEAR_FOLDERS[case]
    fill(tmp_path, dict.fromkeys(folders, 2))
    _, err = prepare(code=2)
    assert text in err
    assert "--good DIR... --defects DIR..." in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("names", [("positive_0", "negative_0"), ("bad_0", "img_1"), ("neg_0", "neg_1")])
def test_unclear_file_names_are_refused(names, tmp_path, prepare):
    for name in names:
        image_file(tmp_path / f"shots/{name}.png", name)
    _, err = prepare(code=2)
    assert "not clear from the file names which images are good" in err
    assert not (tmp_path / "data").exists()


def test_a_folder_called_bad_is_no_training_set(tmp_path, prepare):
    fill(tmp_path, {"bad": 3})
    _, err = prepare(root="shots/bad", code=2)
    assert "is called bad, so its images look defective" in err
    prepare("--good", "shots/bad", root="shots/bad")


def test_what_nothing_takes_is_reported(tmp_path, prepare):
    fill(tmp_path, {"bolts/good": 5, "bolts/bad": 2, "nuts/bad": 3, "washers/2024/day1": 4, "bolts/good/masks": 1})
    out, _ = prepare()
    assert "surplus: nuts/bad: 3 images that nothing uses: defective ones, without a folder of good images" in out
    assert "surplus: washers/2024/day1: 4 images that nothing uses" in out
    assert "surplus: bolts/good/masks: 1 mask of good images, which need none" in out
    assert not (tmp_path / "data/parts/samples/train_nuts.json").exists()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"2026-11-29": 4, "2026-11-30": 3}, (7, 0, 0)),
        ({"20261129/OK": 4, "20261129/NG": 1, "20261130_1400/OK": 6, "20261130_1400/NG": 2}, (8, 2, 3)),
        ({"good/29.11.2026": 4, "good/30.11.2026": 1, "bad/30.11.2026": 2}, (4, 1, 2)),
    ],
)
def test_dates_are_neither_classes_nor_kinds_of_defects(counts, expected, tmp_path, prepare):
    fill(tmp_path, counts)
    out, _ = prepare()
    assert tuple(map(len, listed(tmp_path))) == expected
    assert "defect type 30.11.2026" not in out
    assert len(list((tmp_path / "data/parts/samples").glob("train_*"))) == 2  # and of all classes


def test_what_network_drives_leave_behind_is_no_image(tmp_path, prepare):
    fill(tmp_path, {"good": 5, "bad": 2, "good/@eaDir/0.png": 2, "#recycle": 3, "good/$RECYCLE.BIN": 1})
    out, _ = prepare()
    assert tuple(map(len, listed(tmp_path))) == (4, 1, 2)
    assert "findings: 1 without a mask" in out


def test_validation_images_beside_a_test_folder_are_reported(tmp_path, prepare):
    fill(tmp_path, {"train/good": 3, "test/good": 2, "test/bad": 2, "validation/good": 4})
    out, _ = prepare()
    assert tuple(map(len, listed(tmp_path))) == (3, 2, 2)
    assert "surplus: validation/good: 4 images that nothing uses" in out


def test_masks_are_no_training_images(tmp_path, prepare):
    fill(tmp_path, {"Good parts": 5, "Bad - crack": 2})
    mask(tmp_path / "shots/Good parts/1_mask.png")
    mask(tmp_path / "shots/Good parts/2 mask.png")
    mask(tmp_path / "shots/Good parts/77_mask.png")
    mask(tmp_path / "shots/Bad - crack masks/0.png")
    mask(tmp_path / "shots/Masks/crack/1.png")
    out, _ = prepare()
    train, good, bad = listed(tmp_path)
    assert sorted(train + good) == [f"Good parts/{i}.png" for i in range(5)]
    assert len(bad) == 2
    assert out.count("looks like the mask of a good image; it is left out") == 3
    test = [json.loads(line) for line in (tmp_path / "data/parts/samples/test_parts.json").read_text().splitlines()]
    assert {line.get("maskname") for line in test} == {None, "Bad - crack masks/0.png", "Masks/crack/1.png"}


def test_masks_beside_the_class_folders_are_found(tmp_path, prepare):
    fill(tmp_path, {"bolts/good": 5, "bolts/bad": 2, "nuts/good": 5, "nuts/bad": 2})
    for name in ("bolts", "nuts"):
        mask(tmp_path / f"shots/masks/{name}/bad/1.png")
    prepare()
    lines = (tmp_path / "data/parts/samples/test_uni.json").read_text().splitlines()
    found = {line["filename"]: line["maskname"] for line in map(json.loads, lines) if "maskname" in line}
    assert found == {f"{name}/bad/1.png": f"masks/{name}/bad/1.png" for name in ("bolts", "nuts")}


# ---- images that their masks say something about -----------------------------------------------------------------


def with_masks(root: Path, images: str, masks: str, marked: range, empty: range) -> None:
    """Images and their masks; {} in the paths stands for the number."""
    for number in (*marked, *empty):
        image_file(root / "shots" / images.format(number), (images, number))
        mask(root / "shots" / masks.format(number), value=255 if number in marked else 0)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}.png", "masks/{}.png"),
        ("{}.png", "ground_truth/{}.png"),
        ("photos/{}.png", "photos/{}_label.png"),
        ("images/{}.png", "masks/mask_{}.png"),
        ("images/{}.jpg", "masks/{}.jpg.png"),
        ("images/{} Pr\u00fcfung.png", "masks/{} Pru\u0308fung_mask.png"),
    ],
)
def test_where_no_name_says_it_masks_do(images, masks, tmp_path, prepare):
    with_masks(tmp_path, images, masks, range(2), range(2, 7))
    out, _ = prepare()
    train, good, bad = listed(tmp_path)
    assert sorted(train + good) == [images.format(number) for number in range(2, 7)]
    assert (len(good), bad) == (1, [images.format(number) for number in range(2)])
    assert "by their masks, 2 with a mask" in out
    assert "surplus" not in out


def test_masks_say_it_in_training_and_test_folders_too(tmp_path, prepare):
    with_masks(tmp_path, "train/{}.png", "train/{}_GT.png", range(2), range(2, 7))
    with_masks(tmp_path, "test/{}.png", "test/{}_GT.png", range(10, 13), range(13, 15))
    out, _ = prepare()
    train, good, bad = listed(tmp_path)
    assert train == [f"train/{number}.png" for number in range(2, 7)]
    assert (good, len(bad)) == ([f"test/{number}.png" for number in (13, 14)], 3)
    assert "surplus: train/1.png: its mask marks a defect; training uses good images only" in out
    with_masks(tmp_path, "test/images/{}.png", "test/masks/{}.png", range(20, 22), range(22, 23))
    prepare("--overwrite")
    assert tuple(map(len, listed(tmp_path))) == (5, 3, 5)


def test_masks_of_all_images_leave_none_that_is_good(tmp_path, prepare):
    with_masks(tmp_path, "images/{}.png", "masks/{}.png", range(3), range(0))
    _, err = prepare(code=2)
    assert "the masks of its 3 images all mark something, so none is good" in err
    prepare("--good", "images")


def test_images_of_a_folder_that_says_nothing_are_not_taken_for_defective(tmp_path, prepare):
    fill(tmp_path, {"train/good": 5, "test/images": 3, "test/crack": 2})
    out, _ = prepare()
    assert tuple(map(len, listed(tmp_path))) == (5, 0, 2)
    assert "surplus: test/images: 3 images; nothing says whether they are good" in out


# ---- folders that the user names -------------------------------------------------------------------------------------


def test_chosen_folders_of_any_name(tmp_path, prepare):
    fill(tmp_path, {"negative": 5, "positive/a": 2, "positive/b": 1, "other": 2, "third": 1})
    mask(tmp_path / "shots/overlays/a/1.png")
    out, _ = prepare("--good", "negative", "--defects", "positive", "--masks", "shots/overlays")
    train, good, bad = listed(tmp_path)
    assert (len(train), len(good), bad) == (4, 1, ["positive/a/0.png", "positive/a/1.png", "positive/b/0.png"])
    assert "positive/a       2  defect type a, 1 with a mask" in out
    assert "surplus: other: 2 images that nothing uses" in out
    assert "surplus: third/0.png: an image that nothing uses" in out


def test_chosen_folders_keep_their_split_and_need_no_root(tmp_path, prepare):
    fill(tmp_path, {"train/x": 4, "test/x": 2, "test/y": 3})
    prepare("--good", "shots/train/x", "shots/test/x", "--defects", "shots/test/y", root="")
    assert tuple(map(len, listed(tmp_path))) == (4, 2, 3)
    assert (tmp_path / "data/parts/images").resolve() == (tmp_path / "shots").resolve()


def test_a_chosen_folder_inside_another_is_taken_once(tmp_path, prepare):
    fill(tmp_path, {"": 5, "bad": 2})
    prepare("--good", ".", "--defects", "bad")
    train, good, bad = listed(tmp_path)
    assert (len(train), len(good), bad) == (4, 1, ["bad/0.png", "bad/1.png"])


def test_a_chosen_folder_is_no_defect_type_of_the_folder_above_it(tmp_path, prepare):
    fill(tmp_path, {"a": 3, "b": 2, "c": 2})
    mask(tmp_path / "shots/painted/1.png")
    # An option may stand twice.
    out, _ = prepare("--good", "a", "--good", "b", "--defects", ".", "c", "--masks", "painted")
    train, good, bad = listed(tmp_path)
    assert sorted(Path(name).parent.name for name in train + good) == [*"aaabb"]
    assert bad == ["c/0.png", "c/1.png"]
    assert "surplus" not in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--defects", "bad"], "--good is missing"),
        (["--good", "gone"], "--good gone: there is no such folder"),
        (["--good", "good", "--defects", "good"], "is also named by --good"),
        (["--good", "good", "--defects", "elsewhere"], "--defects elsewhere: lies outside of --root shots"),
        (["--good", "empty"], "--good empty: holds no images"),
    ],
)
def test_wrong_choices_are_refused(arguments, text, tmp_path, prepare):
    fill(tmp_path, {"good": 3, "bad": 3})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shots/empty").mkdir()
    _, err = prepare(*arguments, code=2)
    assert text in err
    assert not (tmp_path / "data").exists()
