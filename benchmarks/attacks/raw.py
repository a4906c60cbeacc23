"""Files that are no checkpoint of ours. For benchmarks/checkpoints.py."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint import load_checkpoint


class Reduced:
    """Calls something when unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], tuple(self.call[1:])


def raw_files(good: Path, folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Files that are no checkpoint of ours: (name, path, whether accepting is right)."""
    path = folder / "raw.pth.tar"

    def with_(data: bytes) -> Path:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path

    calls = {
        "os.system": (os.system, "touch OWNED"),
        "eval": (eval, "__import__('os').system('touch OWNED')"),
        "torch.load": (torch.load, "/etc/passwd"),
        "getattr": (getattr, "x", "upper"),
        "bytearray of 10**11": (bytearray, 10**11),
        "range": (list, range(10)),
        "Path": (Path, "x"),
    }
    for label, call in calls.items():
        yield f"pickle calls {label}", with_(pickle.dumps(Reduced(*call))), False
        buffer = io.BytesIO()
        torch.save({"state_dict": {"w": Reduced(*call)}}, buffer)
        yield f"zip calls {label}", with_(buffer.getvalue()), False
    data = good.read_bytes()
    yield "empty file", with_(b""), False
    yield "text", with_(b"hello\n"), False
    yield "half", with_(data[: len(data) // 2]), False
    yield "with bytes before", with_(b"x" * 100 + data), False
    yield "deep pickle", with_(b"\x80\x02" + b"(" * 100_000 + b"l." * 10), False
    yield "deep tuples", with_(b"\x80\x02" + b")" + b"\x85" * 200_000 + b"."), False
    yield "pickle of a long text", with_(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."), False
    yield "pickle of a long int", with_(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x."), False
    yield "long name", with_(pickle.dumps({"x" * 5000: Reduced(getattr, "x" * 5000, "y")})), False
    buffer = io.BytesIO()
    torch.save(load_checkpoint(good), buffer, _use_new_zipfile_serialization=False)
    yield "older format", with_(buffer.getvalue()), True
    path.unlink()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), str(path))
    yield "TorchScript", path, False
    np.save(folder / "raw.npy", np.zeros(3))
    yield "numpy", with_((folder / "raw.npy").read_bytes()), False
    for label, write in {
        "zip without pickle": lambda archive: archive.writestr("a/data/0", b"x"),
        "zip bomb": lambda archive: archive.writestr(
            zipfile.ZipInfo("a/data.pkl"), bytes(3 * 10**8), compress_type=zipfile.ZIP_DEFLATED
        ),
        "zip of nothing": lambda archive: None,
        "zip outside": lambda archive: archive.writestr("../../../x", b"x"),
    }.items():
        path.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            write(archive)
        yield label, path, False
    path.unlink()
    os.mkfifo(path)
    yield "FIFO", path, False
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "link to /dev/zero", path, False
    path.unlink()
    path.symlink_to(path.name)
    yield "link to itself", path, False
    path.unlink()


def fuzzed(good: Path, path: Path, seed: int) -> Path:
    """A checkpoint with some bytes of its pickle changed and correct checksums."""
    rng = random.Random(seed)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as out:
        for info in archive.infolist():
            data = bytearray(archive.read(info))
            if info.filename.endswith("data.pkl"):
                for _ in range(rng.choice((1, 1, 2, 8))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            out.writestr(info.filename, bytes(data))
    return path
