"""Reads model.onnx, which export.py wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict

from evaluation.thresholds import Thresholds, matching_thresholds, thresholds_from
from utils.config import checked
from utils.counts import counted
from utils.errors import RunError, UsageError
from utils.files import verify_checksums


def load_onnx(path: Path) -> tuple[EasyDict, Thresholds | None, Callable[[torch.Tensor], np.ndarray]]:
    """The settings, the thresholds and the forward pass of a model.onnx; a thresholds file beside it overrides them.

    Raises:
        UsageError: export.py did not write this file.
        RunError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise RunError(f"{path}: onnxruntime is not installed; pip install -r requirements-export.txt") from None
    verify_checksums(path)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        metadata = session.get_modelmeta().custom_metadata_map
        config = checked(json.loads(metadata["config"]), path, "realnet")
        exported, fingerprint = json.loads(metadata["thresholds"]), metadata["fingerprint"]
        _check_tensors(session, config)
    except UsageError:
        raise
    except Exception as error:
        # onnxruntime raises a dozen types of errors on files that export.py did not write.
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a model that export.py wrote ({reason})") from None
    # A thresholds file beside the model overrides the thresholds exported with it.
    beside = matching_thresholds(path, fingerprint)
    thresholds = beside or (thresholds_from(exported, str(path)) if exported else None)

    def infer(images: torch.Tensor) -> np.ndarray:
        maps = session.run(["anomaly_map"], {"image": images.numpy()})[0]
        if maps.shape != (len(images), *images.shape[2:]) or maps.dtype.kind != "f":
            raise RunError(f"{path}: gives {maps.dtype} maps {maps.shape} for images {tuple(images.shape)}")
        # nan is said elsewhere; the margin is for rounding.
        if maps.size and (maps.min() < -1e-3 or maps.max() > 1 + 1e-3):
            raise RunError(f"{path}: gives maps with values outside 0 .. 1")
        return maps

    return config, thresholds, infer


def _check_tensors(session: Any, config: EasyDict) -> None:
    """Raise ValueError if the input or the output of an ONNX model is not what export.py writes."""
    inputs = {entry.name: entry for entry in session.get_inputs()}
    wanted = [3, *config.dataset.input_size]
    if list(inputs) != ["image"] or inputs["image"].type != "tensor(float)":
        raise ValueError(f"its inputs are {', '.join(inputs)[:80]}, not one float tensor called image")
    shape = inputs["image"].shape
    if list(shape[1:]) != wanted:
        raise ValueError(f"its input has the shape {shape}, and its settings say {wanted} after the batch")
    if isinstance(shape[0], int):
        raise ValueError(f"it takes {counted(shape[0], 'image')} at once, and no other number")
    if "anomaly_map" not in [entry.name for entry in session.get_outputs()]:
        raise ValueError("it has no output called anomaly_map")
