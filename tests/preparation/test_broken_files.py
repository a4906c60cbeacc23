"""Broken and hostile archives, split files and image lists: each gives one clear line that names the file and line."""

import csv
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluation_realnet
import prepare_data
import train_realnet
from preparation import archives
from tests.in_process import run
from tests.layout_trees import image_file, official
from utils.config import load_config

# ---- archives --------------------------------------------------------------------------------------------------------


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_with(*members: str | tarfile.TarInfo, mode: str = "w") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, mode) as opened:
            for member in ("shots/good/1.png", "shots/good/2.png", *members):
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
                data = png() if info.isreg() else b""
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))

    return write


def tar_link(name: str, target: str, member_type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = member_type, target
    return info


def zip_with(*members: str, attributes: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as opened:
            for member in ("shots/good/1.png", *members):
                info = zipfile.ZipInfo(member)
                info.external_attr = (attributes if member in members else 0) << 16
                opened.writestr(info, png())

    return write


def cut(write: Callable[[Path], None], keep: float) -> Callable[[Path], None]:
    def write_and_cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return write_and_cut


def encrypted(path: Path) -> None:
    zip_with()(path)
    data = bytearray(path.read_bytes())
    # Bit 0 of the flags, in the local header and in the directory.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def wrong_checksum(path: Path) -> None:
    zip_with()(path)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


def bytes_of(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


ARCHIVES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    **{
        f"{suffix} with {name}": (f"a{suffix}", write(name), f"{name!r} would land outside")
        for name in ("../out.png", "/tmp/out.png", "shots/../../out.png", "C:/out.png")
        for suffix, write in ((".tar", tar_with), (".zip", zip_with))
    },
    "backslashes": ("a.zip", zip_with("..\\..\\out.png"), "'../../out.png' would land outside"),
    "a link outside": ("a.tar", tar_with(tar_link("s/x.png", "/etc/passwd", tarfile.SYMTYPE)), "s/x.png is a link"),
    "a hard link": ("a.tar", tar_with(tar_link("s/x.png", "../../x", tarfile.LNKTYPE)), "s/x.png is a link"),
    "a device": ("a.tar", tar_with(tar_link("s/x.png", "", tarfile.CHRTYPE)), "s/x.png is a link or a device"),
    "a pipe": ("a.tar", tar_with(tar_link("s/x.png", "", tarfile.FIFOTYPE)), "s/x.png is a link or a device"),
    "a zipped link": ("a.zip", zip_with("s/x.png", attributes=stat.S_IFLNK | 0o777), "s/x.png is a link"),
    "a name twice in a tar": ("a.tar", tar_with("shots/good/1.png"), "holds shots/good/1.png twice"),
    "a file that is a folder": ("a.zip", zip_with("shots/good/1.png/x.png"), "is both a file and a folder"),
    "half a tar": ("a.tar", cut(tar_with(), 0.07), "a.tar is not a readable archive"),
    "half a tar.gz": ("a.tar.gz", cut(tar_with(mode="w:gz"), 0.5), "a.tar.gz is not a readable archive"),
    "half a tar.xz": ("a.tar.xz", cut(tar_with(mode="w:xz"), 0.5), "a.tar.xz is not a readable archive"),
    "half a tar.bz2": ("a.tar.bz2", cut(tar_with(mode="w:bz2"), 0.5), "a.tar.bz2 is not a readable archive"),
    "half a zip": ("a.zip", cut(zip_with(), 0.5), "a.zip is not a readable archive"),
    "an empty file as a zip": ("a.zip", bytes_of(b""), "a.zip is not a readable archive"),
    "an empty file as a tar.xz": ("a.tar.xz", bytes_of(b""), "a.tar.xz is not a readable archive"),
    "text as a tar": ("a.tar", bytes_of(b"hello" * 300), "a.tar is not a readable archive"),
    "a zip called tar": ("a.tar", zip_with(), "a.tar is not a readable archive"),
    "a password": ("a.zip", encrypted, "a.zip: File"),
    "a wrong checksum": ("a.zip", wrong_checksum, "a.zip is not a readable archive (Bad CRC-32"),
    "an archive without members": ("a.zip", lambda path: zipfile.ZipFile(path, "w").close(), "no images found"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_broken_and_hostile_archives_are_refused_as_a_whole(case, tmp_path, monkeypatch, capsys):
    name, write, text = ARCHIVES[case]
    folder = tmp_path / "deep/er"
    folder.mkdir(parents=True)
    write(folder / name)
    arguments = ["--dataset", "parts", "--root", name]
    code, out, err = run(prepare_data.main, arguments, folder, monkeypatch, capsys)
    assert code == 2, out + err
    assert text in err
    assert len(err.splitlines()) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / name]
    assert not Path("/tmp/out.png").exists()


# ---- VisA's split file -----------------------------------------------------------------------------------------------

GOOD_LINE = "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,"
SPLIT_LINES: dict[str, tuple[str, int, str]] = {
    "a short line": ("pcb1,train,normal", 1, "has 3 columns instead of 5"),
    "a long line": (GOOD_LINE + ",x", 1, "has 6 columns instead of 5"),
    "an unknown class": (GOOD_LINE.replace("pcb1,", "pcb9,", 1), 1, "'pcb9' is not a class"),
    "an unknown split": (GOOD_LINE.replace("train", "val"), 1, "split 'val'"),
    "an unknown label": (GOOD_LINE.replace("normal", "fine"), 1, "label 'fine'"),
    "an anomaly to train on": (GOOD_LINE.replace("normal", "anomaly"), 1, "is an anomaly, but listed for training"),
    "a path outside the folder": (GOOD_LINE.replace("pcb1/", "../pcb1/"), 1, "lies outside the data set's folder"),
    "an absolute path": (GOOD_LINE.replace("pcb1/", "/pcb1/"), 1, "lies outside the data set's folder"),
    "an image twice": (GOOD_LINE, 1, "is already in line 2"),
    "a missing image": (GOOD_LINE.replace("0000", "0777"), 0, "0777.JPG does not exist"),
    "a missing mask": (
        "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/007.JPG,pcb1/Data/Masks/Anomaly/999.png",
        0,
        "pcb1/Data/Masks/Anomaly/999.png does not exist",
    ),
}


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    root = tmp_path_factory.mktemp("visa")
    official("VisA", root)
    image_file(root / "pcb1/Data/Images/Anomaly/007.JPG", 7)
    lines = list(csv.reader((root / "split_csv/1cls.csv").read_text().splitlines()))
    kept = [line for line in lines if line[0] in ("object", "pcb1")]
    return root, "\n".join(",".join(line) for line in kept) + "\n"


def prepare_visa(root: Path, text: bytes, folder: Path, monkeypatch, capsys) -> tuple[int, str, str]:
    (root / "split_csv/1cls.csv").write_bytes(text)
    return run(prepare_data.main, ["--dataset", "VisA", "--root", str(root)], folder, monkeypatch, capsys)


@pytest.mark.parametrize("case", SPLIT_LINES)
def test_a_bad_line_of_the_split_file_is_named(case, visa, tmp_path, monkeypatch, capsys):
    line, expected, text = SPLIT_LINES[case]
    root, lines = visa
    number = len(lines.splitlines()) + 1
    code, _, _ = prepare_visa(root, (lines + line + "\n").encode(), tmp_path, monkeypatch, capsys)
    assert code == expected
    findings = (tmp_path / "data/VisA/findings.txt").read_text().splitlines()
    where = f"split_csv/1cls.csv, line {number}"
    assert len([finding for finding in findings if where in finding and text in finding]) == 1


@pytest.mark.parametrize("text", [b"", b"image,label\n", b"\xff\xfe\x00bad"], ids=["empty", "other columns", "binary"])
def test_a_file_that_is_not_a_split_file_is_named(text, visa, tmp_path, monkeypatch, capsys):
    code, _, err = prepare_visa(visa[0], text, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "split_csv/1cls.csv" in err
    assert len(err.splitlines()) == 1


# ---- image lists, in the scripts that read them ----------------------------------------------------------------------

FIRST = {"filename": "dots/train/good/000.png", "label": 0, "clsname": "dots"}


def line(**changes: object) -> str:
    return json.dumps({**FIRST, "filename": "dots/train/good/001.png", **changes})


LISTS: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{", "line 2: not a JSON object"),
    "a list": ("[]", "line 2: has to be a JSON object"),
    "nested deep": ("[" * 100_000, "line 2: not a JSON object"),
    "no file name": ('{"label": 0}', "line 2: has to be a JSON object with a filename"),
    "a number as file name": (line(filename=7), "line 2: has to be a JSON object with a filename"),
    "no label": ('{"filename": "dots/train/good/001.png"}', "line 2: label is None"),
    "a label of 2": (line(label=2), "line 2: label is 2"),
    "a label as text": (line(label="0"), "line 2: label is '0'"),
    "a path outside the folder": (line(filename="../samples/x.png"), "line 2: ../samples/x.png lies outside"),
    "a path outside with backslashes": (line(filename="..\\samples\\x.png"), "lies outside"),
    "an absolute path": (line(filename="/etc/hostname"), "line 2: /etc/hostname lies outside"),
    "a path on a drive": (line(filename="C:/x.png"), "line 2: C:/x.png lies outside"),
    "a missing image": (line(filename="dots/no.png"), "line 2: dots/no.png does not exist under"),
    "a folder": (line(filename="dots/train/good"), "is a folder, not an image"),
    "a name with a NUL": (line(filename="dots/a\0.png"), "line 2: "),
    "a very long name": (line(filename="x" * 5000), "is not a file name"),
    "half a surrogate pair": ('{"filename": "dots/\\ud800.png", "label": 0, "clsname": "dots"}', "line 2: "),
    "an image twice": (line(filename=FIRST["filename"]), "line 2: dots/train/good/000.png is already in line 1"),
    "no class": (json.dumps({"filename": "lone.png", "label": 0}), "line 2: has no clsname"),
    "a class with slashes": (line(clsname="../../x"), "line 2: clsname '../../x' holds a slash"),
    "a class of dots": (line(clsname=".."), "line 2: clsname '..' begins with a dot"),
    "a missing mask": (line(label=1, maskname="dots/m.png"), "line 2: dots/m.png does not exist"),
    "a mask outside the folder": (line(label=1, maskname="../m.png"), "line 2: ../m.png lies outside"),
    "a number as mask": (line(label=1, maskname=3), "line 2: maskname is 3"),
    "not UTF-8": (b"\xff\xfe\xfa", "not UTF-8 text"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_bad_line_of_a_list_is_named(case, workspace, tmp_path, monkeypatch, capsys):
    content, text = LISTS[case]
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "train_dots.json").write_bytes(json.dumps(FIRST).encode() + b"\n" + data + b"\n")
    arguments = ["--dataset", "tiny", "--class_name", "dots"]
    meta = ["--set", f"dataset.train.meta_file={tmp_path}/train_{{}}.json", "--set", "saver.log_dir=broken_log/"]
    code, _, err = run(train_realnet.main, [*arguments, *meta], workspace.root, monkeypatch, capsys)
    assert code == 2
    assert str(tmp_path / "train_dots.json") in err
    assert text in err
    assert len(err.splitlines()) == 1


def test_an_empty_list_and_a_folder_in_its_place_are_named(workspace, tmp_path, monkeypatch, capsys):
    (tmp_path / "train_dots.json").write_text("\n")
    (tmp_path / "train_lines.json").mkdir()
    for name, text in (("dots", "holds no image"), ("lines", "does not exist")):
        arguments = ["--dataset", "tiny", "--class_name", name, "--set", "saver.log_dir=broken_log/"]
        meta = ["--set", f"dataset.train.meta_file={tmp_path}/train_{{}}.json"]
        code, _, err = run(train_realnet.main, [*arguments, *meta], workspace.root, monkeypatch, capsys)
        assert code == 2
        assert f"train_{name}.json" in err
        assert text in err


def test_evaluation_without_test_images_says_what_it_needs(workspace, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_dots.json").write_text("")
    arguments = ["--dataset", "tiny", "--class_name", "dots", "--set", "saver.log_dir=broken_log/"]
    meta = ["--set", f"dataset.test.meta_file={tmp_path}/test_{{}}.json"]
    code, _, err = run(evaluation_realnet.main, [*arguments, *meta], workspace.root, monkeypatch, capsys)
    assert code == 2
    assert "test_dots.json: holds no image; evaluation needs good and defective test images" in err


def test_there_are_more_than_sixty_cases():
    assert len(ARCHIVES) + len(SPLIT_LINES) + len(LISTS) > 60


def test_an_archive_that_claims_to_unpack_to_far_too_much_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archives, "MOST_UNCHECKED", 10_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("parts/train/good/0.png", bytes(3_000_000))
    arguments = ["--dataset", "parts", "--root", "bomb.zip"]
    code, _, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "bomb.zip: claims to unpack to 2 MiB, over 200 times its size" in err
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").rglob("*.png"))


def test_links_out_of_the_folder_need_an_option_that_reaches_the_settings(tmp_path, monkeypatch, capsys):
    for i in range(3):
        image_file(tmp_path / f"elsewhere/{i}.png", i)
    (tmp_path / "shots/train").mkdir(parents=True)
    (tmp_path / "shots/train/good").symlink_to(tmp_path / "elsewhere")
    arguments = ["--dataset", "parts", "--root", "shots"]
    code, _, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "train/good/0.png is reached by a link that leads out of this folder; pass --copy" in err
    code, _, err = run(prepare_data.main, [*arguments, "--follow-links"], tmp_path, monkeypatch, capsys)
    assert code == 0, err
    assert load_config(tmp_path / "experiments/parts/realnet.yaml").dataset.image_reader.kwargs.follow_links is True


def test_what_a_killed_preparation_had_unpacked_is_cleared(tmp_path, monkeypatch, capsys):
    image_file(tmp_path / "data/parts/.part-abc/x/0.png", 0)
    for i in range(3):
        image_file(tmp_path / f"shots/train/good/{i}.png", i)
    arguments = ["--dataset", "parts", "--root", "shots"]
    code, _, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 0, err
    assert not (tmp_path / "data/parts/.part-abc").exists()


def test_a_folder_whose_name_is_not_utf8_is_named_and_the_rest_prepared(tmp_path, monkeypatch, capsys):
    for i in range(3):
        image_file(tmp_path / f"shots/train/good/{i}.png", i)
        image_file(tmp_path / f"shots/test/good/{i}.png", f"test{i}")
    image_file(tmp_path / os.fsdecode(b"shots/test/bro\xffken/0.png"), "broken")
    arguments = ["--dataset", "parts", "--root", "shots"]
    code, out, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 1
    assert err.count("its name is not UTF-8; rename it") == 1, err
    assert (tmp_path / "data/parts/samples/train_parts.json").is_file()
    assert "Traceback" not in out + err
