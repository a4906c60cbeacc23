"""Broken image folders and wrong use: each gives one clear line that names the file, and leaves nothing behind.

Together with test_broken_files.py, these are more than a hundred broken inputs.
"""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from tests.in_process import run
from tests.layout_trees import image_file, mask, mvtec_class

Break = Callable[[Path], object]


# ---- a folder with one problem: it is named, and the rest is prepared ------------------------------------------------

GOOD, BAD, MASK = "shots/train/good/001.png", "shots/test/cut/001.png", "shots/ground_truth/cut/001_mask.png"


def truncated(path: str, suffix: str = ".png", keep: float = 0.5) -> Break:
    def change(root: Path) -> None:
        full = root / path
        broken = full.with_suffix(suffix)
        if broken != full:
            image_file(broken, 7)
            full.unlink()
        broken.write_bytes(broken.read_bytes()[: int(keep * broken.stat().st_size)])

    return change


def content(path: str, data: bytes) -> Break:
    return lambda root: (root / path).write_bytes(data)


def folder_named(path: str) -> Break:
    def change(root: Path) -> None:
        (root / path).unlink(missing_ok=True)
        (root / path).mkdir()

    return change


def dangling(path: str) -> Break:
    def change(root: Path) -> None:
        (root / path).unlink()
        (root / path).symlink_to(root / "gone.png")

    return change


def huge_header(root: Path) -> None:
    """A PNG that claims 100000 x 100000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (root / GOOD).write_bytes(data)


def damaged(root: Path) -> None:
    data = bytearray((root / GOOD).read_bytes())
    data[60:90] = os.urandom(30)
    (root / GOOD).write_bytes(data)


def floating(root: Path) -> None:
    Image.fromarray(np.zeros((40, 48), np.float32)).save(root / "shots/train/good/float.tif")


def not_utf8(root: Path) -> None:
    shutil.copy(root / GOOD, os.fsencode(root / "shots/train/good/") + b"/caf\xe9.png")


def moved(path: str, to: str) -> Break:
    return lambda root: (root / path).rename(root / to)


def looped(root: Path) -> None:
    (root / "shots/test/cut/again").symlink_to(root / "shots/test")


FOLDERS: dict[str, tuple[Break, int, str]] = {
    # problem: (function that makes it, exit code, printed text)
    **{
        f"truncated {suffix}": (
            truncated(GOOD, suffix),
            1,
            f"unreadable: train/good/001{suffix}: is not a readable image",
        )
        for suffix in (".png", ".jpg", ".bmp", ".tif", ".webp")
    },
    **{
        f"{percent} % of a PNG": (truncated(GOOD, keep=percent / 100), 1, "unreadable: train/good/001.png: is not")
        for percent in (0, 1, 20, 80)
    },
    "truncated test image": (truncated(BAD), 1, "unreadable: test/cut/001.png: is not"),
    "text as an image": (content(GOOD, b"a note"), 1, "unreadable: train/good/001.png: is not"),
    "a web page as an image": (content(GOOD, b"<html>404</html>"), 1, "unreadable: train/good/001.png: is not"),
    "a PDF as an image": (content(GOOD, b"%PDF-1.7\n"), 1, "unreadable: train/good/001.png: is not"),
    "zeros as an image": (content(GOOD, bytes(5000)), 1, "unreadable: train/good/001.png: is not"),
    "a JPEG's start alone": (content(GOOD, b"\xff\xd8\xff\xe0"), 1, "unreadable: train/good/001.png: is not"),
    "an empty bitmap": (content(GOOD, b"BM" + bytes(60)), 1, "unreadable: train/good/001.png: is not"),
    "a TIFF without pages": (content(GOOD, b"II*\0\0\0\0\0"), 1, "unreadable: train/good/001.png: is not"),
    "damaged bytes": (damaged, 1, "unreadable: train/good/001.png: is not"),
    "a decompression bomb": (huge_header, 1, "unreadable: train/good/001.png: is not"),
    "floating-point values": (floating, 1, "unreadable: train/good/float.tif: holds floating-point values"),
    "a folder named x.png": (folder_named("shots/train/good/x.png"), 1, "train/good/x.png: is a folder, not an image"),
    "a folder in place of a mask": (folder_named(MASK), 1, "ground_truth/cut/001_mask.png: is a folder"),
    "a link to nothing": (dangling(GOOD), 1, "unreadable: train/good/001.png: is a broken link"),
    "a name that is not UTF-8": (not_utf8, 1, "its name is not UTF-8; rename it"),
    "a loop of links": (looped, 0, "surplus: test/cut/again: is a link to a folder above it"),
    "no suffix": (moved(GOOD, "shots/train/good/image"), 0, "surplus: train/good/image: is not an image"),
    "a wrong suffix": (moved(GOOD, "shots/train/good/1.dat"), 0, "surplus: train/good/1.dat: is not an image"),
    "a raw image": (moved(BAD, "shots/test/cut/1.nef"), 0, "surplus: test/cut/1.nef: is not an image"),
    "a text beside images": (content("shots/test/good/a.txt", b"x"), 0, "surplus: test/good/a.txt: is not an image"),
    "an image neither good nor defective": (
        lambda root: image_file(root / "shots/test/x.png", 1),
        0,
        "surplus: test/x.png: is not in a folder that says",
    ),
    "defects to train on": (
        lambda root: image_file(root / "shots/train/bad/x.png", 1),
        0,
        "surplus: train/bad: 1 image that is not good;",
    ),
    "a truncated mask": (truncated(MASK), 1, "unreadable: ground_truth/cut/001_mask.png: mask is not a readable"),
    "an empty file as a mask": (content(MASK, b""), 1, "unreadable: ground_truth/cut/001_mask.png: mask is not"),
    "text as a mask": (content(MASK, b"mask"), 1, "unreadable: ground_truth/cut/001_mask.png: mask is not"),
    "a mask of another size": (
        lambda root: mask(root / MASK, (48, 40)),
        0,
        "ground_truth/cut/001_mask.png: mask is 40x48 pixels, but the image is 48x40",
    ),
    "an all-zero mask": (
        lambda root: mask(root / MASK, value=0),
        0,
        "ground_truth/cut/001_mask.png: mask is empty",
    ),
    "a missing mask": (
        lambda root: (root / MASK).unlink(),
        0,
        "without a mask: test/cut/001.png: has no mask",
    ),
    "a mask without an image": (
        lambda root: mask(root / "shots/ground_truth/cut/9_mask.png"),
        0,
        "surplus: ground_truth/cut/9_mask.png: is a mask without a defective image",
    ),
    "two masks": (
        lambda root: mask(root / "shots/ground_truth/cut/001.png"),
        0,
        "ambiguous: test/cut/001.png: ground_truth/cut/001.png and ground_truth/cut/001_mask.png could be its mask",
    ),
    "two images of the same name": (
        lambda root: image_file(root / "shots/test/cut/001.jpg", 5),
        0,
        "ambiguous: test/cut/001.jpg: 001.jpg and 001.png would share the mask",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_one_problem_in_a_folder_is_named(case, tmp_path, monkeypatch, capsys):
    change, expected, text = FOLDERS[case]
    mvtec_class(tmp_path / "shots")
    change(tmp_path)
    code, out, err = run(prepare_data.main, ["--dataset", "parts", "--root", "shots"], tmp_path, monkeypatch, capsys)
    assert code == expected, out + err
    named = [line for line in (out + err).splitlines() if text in line]
    assert len(named) == 1, out + err
    # The lists are complete except for unreadable files.
    for split, count in (("train", 3), ("test", 6)):
        lines = (tmp_path / f"data/parts/samples/{split}_parts.json").read_text().splitlines()
        assert abs(len(lines) - count) <= 1
        for line in map(json.loads, lines):
            for name in filter(None, (line["filename"], line.get("maskname"))):
                Image.open(tmp_path / "data/parts/images" / name).load()


# ---- wrong use: one line, exit code 2, and nothing is written --------------------------------------------------------


def only(path: str) -> Break:
    def change(root: Path) -> None:
        shutil.rmtree(root / "shots")
        image_file(root / path, 1)

    return change


def emptied(root: Path) -> None:
    shutil.rmtree(root / "shots")
    (root / "shots").mkdir()


def all_broken(root: Path) -> None:
    for path in (root / "shots/train/good").iterdir():
        path.write_bytes(b"")


def nothing(root: Path) -> None:
    del root


def renamed_class(name: str) -> Break:
    def change(root: Path) -> None:
        shutil.rmtree(root / "shots")
        for i in range(2):
            image_file(root / "shots" / name / f"good/{i}.png", i)
            image_file(root / "shots" / "other" / f"good/{i}.png", -i)

    return change


OWN = ["--dataset", "parts", "--root", "shots"]
USES: dict[str, tuple[Break, list[str], str]] = {
    "no folder": (nothing, ["--dataset", "parts", "--root", "gone"], "--root gone does not exist"),
    "no root": (nothing, ["--dataset", "parts"], "--root is missing"),
    "an image as root": (nothing, ["--dataset", "parts", "--root", GOOD], "neither a folder nor an archive"),
    "an empty folder": (emptied, OWN, "shots: no images found; expected"),
    "a folder of texts": (only("shots/a.txt.png/x.gif"), OWN, "shots/a.txt.png: no images found"),
    "defects alone": (only("shots/bad/1.png"), OWN, "shots/bad: has no folder of good images beside it"),
    "ko alone": (only("shots/KO/1.png"), OWN, "shots/KO: has no folder of good images beside it"),
    "no good image can be read": (all_broken, OWN, "no readable image of a good part"),
    "a class called uni": (renamed_class("uni"), OWN, "a class cannot be called 'uni'"),
    "a class called all": (renamed_class("all"), OWN, "a class cannot be called 'all'"),
    "a class with a comma": (renamed_class("a,b"), OWN, "a class cannot be called 'a,b'"),
    "a class with braces": (renamed_class("{}"), OWN, "a class cannot be called '{}'"),
    **{
        f"a data set called {name!r}": (nothing, ["--dataset", name, "--root", "shots"], f"--dataset {name}")
        for name in ("../up", "/tmp/x", "a b", "1st", "a:b", ".hidden", "mvtec", "visa", "demo", "yes", "null")
    },
    "a test fraction of 2": (nothing, [*OWN, "--test-fraction", "2"], "--test-fraction 2.0"),
    "a second split": (nothing, [*OWN, "--test-fraction", "0.5"], "already say what is trained and tested on"),
    "an input size of 0": (nothing, [*OWN, "--input-size", "0", "256"], "--input-size 0 256"),
    "settings for a known data set": (
        nothing,
        ["--dataset", "MPDD", "--root", "shots", "--foreground", "auto"],
        "not for MPDD",
    ),
    "another data set than named": (nothing, ["--dataset", "MPDD", "--root", "shots"], "holds none of the classes"),
    "a preview without settings": (nothing, ["--dataset", "parts", "--preview"], "experiments/parts/realnet.yaml"),
    "no textures": (emptied, ["--dataset", "DTD", "--root", "shots"], "shots: no textures found"),
}


@pytest.mark.parametrize("case", USES)
def test_wrong_use_prints_one_line_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    change, arguments, text = USES[case]
    mvtec_class(tmp_path / "shots")
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 2, out + err
    assert text in err
    assert len(err.splitlines()) == 1
    written = set(tmp_path.rglob("*")) - set(before)
    assert not [path for path in written if path.is_file() or path.is_symlink()]


def test_a_class_folder_in_place_of_the_data_set_is_recognised(tmp_path, monkeypatch, capsys):
    mvtec_class(tmp_path / "mvtec/bottle")
    arguments = ["--dataset", "MVTec-AD", "--root", "mvtec/bottle"]
    code, _, err = run(prepare_data.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "pass the folder above it" in err


def test_there_are_more_than_sixty_cases():
    assert len(FOLDERS) + len(USES) > 60
