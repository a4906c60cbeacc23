"""Hostile images through prepare_data.py and predict.py. For benchmarks/mutants.py."""

import argparse
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import predict
import prepare_data
from benchmarks.attacks.runs import Case, Outcome, Yard, command, flaws, trained


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    return _bytes(image, "PNG")


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(%pipe%touch OWNED) (w) file\nshowpage\n%%EOF\n"
)


def hostile_images() -> Iterator[tuple[str, bytes, bool | None]]:
    """(file name, content, whether it is an image that has to be used; None: either)."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (48, 40, 3), dtype=np.uint8))
    grey = rgb.convert("L")
    yield "eps.png", EPS, False
    yield "eps.eps", EPS, False
    yield "pdf.png", b"%PDF-1.4\n1 0 obj<<>>endobj\n", False
    yield "real.pdf.png", _bytes(rgb, "PDF"), False
    yield "svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", False
    yield "psd.png", b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 48, 40) + b"\0\x08\0\3" + bytes(12), False
    yield "ico.png", _bytes(rgb, "ICO"), False
    yield "ppm.png", _bytes(rgb, "PPM"), None
    yield "fits.png", b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(2800), False
    yield "gif.png", _bytes(rgb, "GIF"), None
    yield "tga.png", _bytes(rgb, "TGA"), None
    yield "icns.png", b"icns" + bytes(200), False
    yield "html.jpg", b"<html><script>alert(1)</script></html>", False
    yield "zeros.png", bytes(1000), False
    yield "empty.png", b"", False
    yield "large.png", _png_claiming(30_000, 30_000), False
    yield "larger.png", _png_claiming(2**31 - 1, 2**31 - 1), False
    yield "no_side.png", _png_claiming(0, 10), False
    yield "thin.png", _bytes(Image.new("RGB", (20_000, 1)), "PNG"), None
    yield "one.png", _bytes(Image.new("RGB", (1, 1)), "PNG"), None
    frames = [Image.fromarray(rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)) for _ in range(3)]
    yield "animated.png", _bytes(frames[0], "PNG", save_all=True, append_images=frames[1:]), None
    yield "animated.webp", _bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:]), None
    yield "pages.tif", _bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:]), True
    yield "bit.png", _bytes(grey.convert("1"), "PNG"), True
    yield "palette.png", _bytes(rgb.convert("P"), "PNG", transparency=3), True
    yield "alpha.png", _bytes(rgb.convert("RGBA"), "PNG"), True
    yield "grey_alpha.png", _bytes(rgb.convert("LA"), "PNG"), True
    yield "cmyk.jpg", _bytes(rgb.convert("CMYK"), "JPEG"), True
    yield "cmyk.tif", _bytes(rgb.convert("CMYK"), "TIFF"), None
    yield "lab.tif", _bytes(rgb.convert("LAB"), "TIFF"), None
    yield "sixteen.png", _bytes(Image.fromarray(rng.integers(0, 65535, (48, 40), dtype=np.uint16)), "PNG"), True
    yield "float.tif", _bytes(Image.fromarray(rng.random((48, 40), dtype=np.float32)), "TIFF"), None
    yield "nan.tif", _bytes(Image.fromarray(np.full((48, 40), np.nan, np.float32)), "TIFF"), False
    yield "int32.tif", _bytes(Image.fromarray(rng.integers(-9, 2**30, (48, 40), dtype=np.int32)), "TIFF"), None
    exif = Image.Exif()
    exif[0x0112] = 77
    yield "orientation.jpg", _bytes(rgb, "JPEG", exif=exif), True
    yield "exif.jpg", _bytes(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 40), True
    yield "comment.png", _bytes(rgb, "PNG") + b"trailing" * 1000, True
    yield "icc.png", _bytes(rgb, "PNG", icc_profile=b"broken profile"), True
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("TIFF", "tif"), ("WEBP", "webp")):
        data = _bytes(rgb, kind)
        yield f"cut_{kind}.{ending}", data[: len(data) * 2 // 3], False
        yield f"cut_{kind}_head.{ending}", data[:20], False
        spoiled = bytearray(data)
        for i in rng.integers(len(data) // 3, len(data), 12):
            spoiled[i] ^= 0x55
        yield f"spoiled_{kind}.{ending}", bytes(spoiled), None
        yield f"named_{kind}.png", data, None
    yield "bmp_size.bmp", _bytes(rgb, "BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bytes(100), False
    loop = bytearray(_bytes(rgb, "TIFF"))
    loop[4:8] = struct.pack("<I", 4)
    yield "loop.tif", bytes(loop), False
    text = _bytes(rgb, "PNG")
    bomb = b"zTXt" + b"a\0\0" + zlib.compress(bytes(2 * 10**8))
    yield (
        "text_bomb.png",
        text[:33] + struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb)) + text[33:],
        None,
    )


def special_files(folder: Path, good: bytes) -> Iterator[tuple[str, Callable[[], object]]]:
    """Things called x.png that are no plain files, and file names that are hard: (name, function that makes it)."""
    yield "folder.png", lambda: (folder / "folder.png").mkdir()
    yield "fifo.png", lambda: os.mkfifo(folder / "fifo.png")
    yield "gone.png", lambda: (folder / "gone.png").symlink_to("nowhere")
    yield "itself.png", lambda: (folder / "itself.png").symlink_to("itself.png")
    yield "zero.png", lambda: (folder / "zero.png").symlink_to("/dev/zero")
    yield "passwd.png", lambda: (folder / "passwd.png").symlink_to("/etc/passwd")
    names = [b"caf\xe9.png", b"\xff\xfe.png", b"x" * 251 + b".png", b"a\nb.png", b"\x1b[2J.png", b"=1+1.png",
             b"-rf.png",
             b"$(touch OWNED).png", b"`touch OWNED`.png", b"x|;e touch OWNED;#.png", b"a b .png", b"{}.png",
             b"%s%n.png",
             b".hidden.png", "\u202egnp.exe.png".encode(), b"a\\b.png", b"<script>.png"]  # fmt: skip
    for name in names:
        path = os.fsencode(folder) + b"/" + name
        yield repr(name), lambda path=path: _write(path, good)


def _write(path: bytes, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def images_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Hostile images through prepare_data.py and predict.py, each beside good ones."""
    list(trained(yard))
    checkpoint = yard.space / "experiments/tiny/realnet_checkpoints/dots"
    # Pillow hands EPS files to a program called gs; here, one that leaves a trace.
    program = yard.space / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {yard.space}/OWNED\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    rng = np.random.default_rng(1)
    good = [_bytes(Image.fromarray(rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)), "PNG") for _ in range(5)]
    files = [(name, data, wanted) for name, data, wanted in hostile_images()]
    folder = yard.space / "parts/bolts/good"
    makers = [(name, lambda n=name, d=data: (folder / n).write_bytes(d), wanted) for name, data, wanted in files]
    makers += [(name, make, None) for name, make in special_files(folder, good[4])]
    for name, make, wanted in makers:
        folder.mkdir(parents=True)
        for i, data in enumerate(good[:4]):
            (folder / f"{i}.png").write_bytes(data)
        make()
        outcome = command(prepare_data.main, ["--dataset", "Parts", "--root", "parts"], yard.space, args.seconds)
        lists = yard.space / "data/Parts/samples/train_bolts.json"
        tests = yard.space / "data/Parts/samples/test_bolts.json"
        listed = "".join(path.read_text(errors="replace") for path in (lists, tests) if path.is_file())
        yield Case(f"prepare: {name}", outcome, _image_verdict(outcome, yard, wanted, f"{name}" in listed))
        options = ["--checkpoint", checkpoint, "--input", folder, "--output", "out"]
        outcome = command(predict.main, options, yard.space, args.seconds)
        scores = yard.space / "out/scores.jsonl"
        scored = scores.is_file() and f'"{name}"' in scores.read_text(errors="replace")
        survivor = _image_verdict(outcome, yard, wanted, scored)
        if (yard.space / "out/scores.csv").is_file() and "\n=" in (yard.space / "out/scores.csv").read_text(
            errors="replace"
        ):
            survivor += "; a formula in scores.csv"
        yield Case(f"predict: {name}", outcome, survivor)
        for left in ("parts", "out", "data/Parts", "experiments/Parts"):
            shutil.rmtree(yard.space / left, ignore_errors=True)


def _image_verdict(outcome: Outcome, yard: Yard, wanted: bool | None, used: bool) -> str:
    said = Outcome(outcome.kind, outcome.code, outcome.message or outcome.out, outcome.out)
    problems = flaws(said, 30) + yard.broken_out()
    if wanted is not None and wanted != used:
        problems.append("used" if used else "not used")
    if "Warning" in outcome.message:
        problems.append(f"a warning of Python: {outcome.message.strip().splitlines()[0][-120:]}")
    return "; ".join(problems)
