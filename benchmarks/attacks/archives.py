"""Hostile archives through prepare_data.py. For benchmarks/mutants.py."""

import argparse
import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import prepare_data
from benchmarks.attacks.exports import exports
from benchmarks.attacks.images import png
from benchmarks.attacks.runs import Case, Outcome, Yard, command, verdict


def hostile_archives(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """(name, path, whether it may be accepted)."""
    rng = np.random.default_rng(0)
    image = [png(Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))) for _ in range(6)]
    base = {f"bolts/{kind}/{i}.png": image[3 * (kind == "bad") + i] for kind in ("good", "bad") for i in range(3)}

    def zipped(more: list[tuple[str | zipfile.ZipInfo, bytes]], members: dict = base, **options: Any) -> Path:
        path = folder / "a.zip"
        path.unlink(missing_ok=True)
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in [*members.items(), *more]:
                archive.writestr(name, data)
        return path

    def tarred(more: list[tuple[str, bytes, dict[str, Any]]], mode: str = "w", ending: str = ".tar") -> Path:
        path = folder / f"a{ending}"
        path.unlink(missing_ok=True)
        with tarfile.open(path, mode) as archive:
            for name, data, extra in [*((name, data, {}) for name, data in base.items()), *more]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for key, value in extra.items():
                    setattr(info, key, value)
                archive.addfile(info, io.BytesIO(data))
        return path

    yield "zip good", zipped([]), True
    yield "tar good", tarred([]), True
    outside = [
        "../../../../x.png",
        "/tmp/h_mut_outside.png",
        "bolts/../../x.png",
        "..\\..\\x.png",
        "C:\\x.png",
        "a/../../b.png",
    ]
    for name in outside:
        yield f"zip {name}", zipped([(name, image[0])]), False
        yield f"tar {name}", tarred([(name, image[0], {})]), "\\" in name
    link = zipfile.ZipInfo("bolts/good/link.png")
    link.external_attr = 0o120777 << 16
    yield "zip link", zipped([(link, b"/etc/passwd")]), False
    device = zipfile.ZipInfo("bolts/good/device.png")
    device.external_attr = 0o020666 << 16
    yield "zip device", zipped([(device, b"")]), False
    kinds = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE,
             "FIFO": tarfile.FIFOTYPE,
             "block device": tarfile.BLKTYPE, "sparse": tarfile.GNUTYPE_SPARSE, "unknown type": b"Z"}  # fmt: skip
    for label, kind in kinds.items():
        extra = {"type": kind, "linkname": "/etc/passwd"}
        yield f"tar {label}", tarred([("bolts/good/x.png", b"", extra)]), kind in (b"Z",)
    yield "tar setuid", tarred([("bolts/good/x.png", image[0], {"mode": 0o6777, "uid": 0})]), True
    yield "tar no rights", tarred([("bolts/good/x.png", image[0], {"mode": 0})]), True
    yield "tar time", tarred([("bolts/good/x.png", image[0], {"mtime": 2**40})]), True
    yield "tar negative time", tarred([("bolts/good/x.png", image[0], {"mtime": -1})]), True
    yield "zip twice", zipped([("bolts/good/0.png", image[1])]), False
    yield "tar twice", tarred([("bolts/good/0.png", image[1], {})]), False
    yield "zip other case", zipped([("Bolts/good/0.png", image[1])]), True
    yield "zip file and folder", zipped([("bolts/good", b"x")]), False
    yield "zip NUL", zipped([(zipfile.ZipInfo("a.png"), b"x")]), True
    yield "zip long name", zipped([("bolts/good/" + "x" * 300 + ".png", image[0])]), False
    yield "tar long name", tarred([("bolts/good/" + "x" * 300 + ".png", image[0], {})]), False
    yield "zip deep name", zipped([("a/" * 2500 + "x.png", image[0])]), False
    yield "zip bomb", zipped([("bolts/good/big.png", bytes(2 * 10**8))], compression=zipfile.ZIP_DEFLATED), True
    yield "zip nested", zipped([("bolts/good/inner.zip", zipped([]).read_bytes())]), True
    for label, place, value in (("claims 4 GiB", 24, 0xFFFFFFF0), ("claims 0", 24, 0), ("offset", 42, 2**31)):
        data = bytearray(zipped([]).read_bytes())
        at = data.rindex(b"PK\1\2")
        data[at + place : at + place + 4] = struct.pack("<I", value)
        (folder / "a.zip").write_bytes(data)
        # The sizes in the local headers are right.
        yield f"zip {label}", folder / "a.zip", label == "claims 4 GiB"
    data = bytearray(zipped([]).read_bytes())
    for at in [i for i in range(len(data) - 4) if data[i : i + 4] in (b"PK\1\2", b"PK\3\4")]:
        data[at + (8 if data[at + 2] == 1 else 6)] |= 1
    (folder / "a.zip").write_bytes(data)
    yield "zip encrypted", folder / "a.zip", False
    data = bytearray(zipped([]).read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 10 : at + 12] = struct.pack("<H", 99)
    (folder / "a.zip").write_bytes(data)
    yield "zip method 99", folder / "a.zip", False
    data = zipped([]).read_bytes()
    (folder / "a.zip").write_bytes(data[: len(data) // 2])
    yield "zip truncated", folder / "a.zip", False
    for ending, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")):
        path = tarred([], mode, ending)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        yield f"{ending} truncated", path, False
        path.write_bytes(b"not an archive" * 50)
        yield f"{ending} of text", path, False
        path.write_bytes(b"")
        yield f"{ending} empty", path, False
    path = tarred([("bolts/good/big.png", b"", {})])
    data = bytearray(path.read_bytes())
    at = data.rindex(b"bolts/good/big.png")
    data[at + 124 : at + 136] = b"77777777777\0"
    data[at + 148 : at + 156] = b"        "
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    yield "tar claims 8 GiB", path, False
    for name in (
        "$(touch OWNED)",
        "x|;e touch OWNED;#",
        "=1+1",
        "a\nb",
        "\x1b[2J",
        "<script>alert(1)</script>",
        "-rf",
        "{}",
        "all",
    ):
        members = {key.replace("bolts", name): value for key, value in base.items() if "/" not in name}
        yield f"zip class {name!r}", zipped([], members), True


def archives_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Hostile archives through prepare_data.py; hostile .onnx and .pt2 files through predict.py."""
    for name, path, allowed in hostile_archives(yard.space):
        if path.name.endswith("_outside.png"):
            continue
        outcome = command(prepare_data.main, ["--dataset", "Parts", "--root", path], yard.space, args.seconds)
        said = Outcome(outcome.kind, outcome.code, outcome.message or outcome.out, outcome.out)
        survivor = verdict(said, yard, allowed, 12)
        if Path("/tmp/h_mut_outside.png").exists():
            survivor += "; wrote to /tmp"
        yield Case(f"archive: {name}", outcome, survivor)
        for left in ("data/Parts", "experiments/Parts"):
            shutil.rmtree(yard.space / left, ignore_errors=True)
    yield from exports(yard, args)
