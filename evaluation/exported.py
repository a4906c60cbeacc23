"""Reads model.pt2, which export.py wrote with torch.export, without running anything in it.

torch.export.load unpickles parts of the file and runs code that it holds, which no file that a user brings may do. So
the network is built anew from the settings in the file, and gets its weights, which are plain numbers.
"""

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from evaluation.thresholds import Thresholds, matching_thresholds, thresholds_from
from evaluation.trained_model import TrainedModel, trained_from
from utils.config import checked
from utils.errors import UsageError
from utils.files import verify_checksums

NETWORK = "network."  # where ExportedRealNet keeps the RealNet
_WEIGHTS = "data/weights/"
# Numbers of torch's types in the file (torch._export.serde.schema.ScalarType).
_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def load_program(path: Path) -> tuple[TrainedModel, Thresholds | None]:
    """The network, settings and thresholds in a model.pt2; a thresholds file beside it overrides the thresholds.

    Raises:
        UsageError: export.py did not write this file.
    """
    verify_checksums(path)
    try:
        state, metadata = read_program(path)
        settings, exported = json.loads(metadata["config"]), json.loads(metadata["thresholds"])
    except Exception as error:
        # A damaged or foreign file fails in a dozen ways.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise UsageError(f"{path} is not a model that this version of export.py wrote ({reason})") from None
    config = checked(settings, path, "realnet")
    trained = trained_from(state, config, path, path)
    beside = matching_thresholds(path, trained.fingerprint)
    return trained, beside or (thresholds_from(exported, str(path)) if exported else None)


def read_program(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights of the RealNet, and the texts that export.py added."""
    with zipfile.ZipFile(path) as archive:
        # All names begin with a folder that is named after the file.
        files = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in files.values()):
            raise ValueError("it is compressed")
        metadata = {name[6:]: archive.read(info).decode() for name, info in files.items() if name.startswith("extra/")}
        older = f"{_WEIGHTS}model.pt"
        if older in files:
            state = torch.load(io.BytesIO(archive.read(files[older])), map_location="cpu", weights_only=True)
        else:
            entries = json.loads(archive.read(files[f"{_WEIGHTS}model_weights_config.json"]))["config"]
            state = {
                name: _tensor(archive.read(files[_WEIGHTS + entry["path_name"]]), entry["tensor_meta"])
                for name, entry in entries.items()
            }
    return {name.removeprefix(NETWORK): tensor for name, tensor in state.items()}, metadata


def _tensor(data: bytes, meta: dict[str, Any]) -> torch.Tensor:
    """A weight from its bytes, which are in the order of its strides."""
    size, stride = ([int(value["as_int"]) for value in meta[name]] for name in ("sizes", "strides"))
    dtype, offset = _TYPES[meta["dtype"]], int(meta["storage_offset"]["as_int"])
    if not math.prod(size):
        return torch.empty(size, dtype=dtype)
    # as_strided checks that the sizes stay within the bytes.
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(size, stride, offset).clone()
