"""A trained detector ready for use: a RealNet checkpoint, or a model that export.py wrote."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from evaluation.thresholds import Thresholds, read_thresholds, thresholds_from
from models.realnet import RealNet, build_realnet, check_realnet
from utils.checkpoint import load_checkpoint, load_weights, state_dict_of
from utils.config import check_together, checked, load_config
from utils.errors import RunError, UsageError

CHECKPOINT = "ckpt_best.pth.tar"


@dataclass(frozen=True)
class Detector:
    """Anomaly maps of pictures.

    Args:
        config: the realnet.yaml that it was trained with.
        thresholds: where it was evaluated, else None.
        maps: (N,3,H,W) float32 normalised images -> (N,H,W) float32 anomaly maps in [0, 1], both on the CPU.
    """

    config: EasyDict
    thresholds: Thresholds | None
    maps: Callable[[torch.Tensor], np.ndarray]


def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint by file, or the best of a class folder.

    Raises:
        UsageError: neither is there.
    """
    path = Path(path)
    found = path / CHECKPOINT if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"--checkpoint {found} does not exist; train_realnet.py writes it")
    return found


def load_realnet(path: Path, config_path: str | None) -> tuple[RealNet, EasyDict]:
    """A trained network in eval mode and its settings, which travel in our checkpoints.

    Args:
        config_path: a realnet.yaml to take instead; checkpoints of the reference program need it.

    Raises:
        UsageError: the file is none, does not fit its settings, or has none.
    """
    content = load_checkpoint(path)
    if config_path is not None:
        config = load_config(config_path)
    elif isinstance(content.get("config"), dict):
        config = checked(content["config"], path)
    else:
        raise UsageError(f"{path} holds no settings; name the realnet.yaml that it was trained with as --config")
    check_together(config_path or path, [("structure, net", lambda: check_realnet(config))])
    model = build_realnet(config, "checkpoint")
    load_weights(model, state_dict_of(content), path, "structure and net in the settings")
    return model.requires_grad_(False).eval(), config


def load_detector(path: Path, config_path: str | None, device: torch.device) -> Detector:
    """A detector from a checkpoint or an .onnx file."""
    if path.suffix == ".onnx":
        return _from_onnx(path)
    model, config = load_realnet(path, config_path)
    model = model.to(device)

    @torch.inference_mode()
    def maps(images: torch.Tensor) -> np.ndarray:
        return model({"image": images.to(device)})["anomaly_score"][:, 0].float().cpu().numpy()

    return Detector(config, read_thresholds(path), maps)


def _from_onnx(path: Path) -> Detector:
    try:
        import onnxruntime
    except ImportError:
        raise RunError(f"{path}: onnxruntime is not installed; pip install -r requirements-export.txt") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        metadata = session.get_modelmeta().custom_metadata_map
        config = checked(json.loads(metadata["config"]), path)
        kept = json.loads(metadata["thresholds"])
    except Exception as error:
        # onnxruntime raises a dozen kinds for what all means: no model of ours.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a model that export.py wrote ({reason})") from None
    # A sidecar beside the file goes before what it held when it was written.
    thresholds = read_thresholds(path) or (thresholds_from(kept, str(path)) if kept else None)

    def maps(images: torch.Tensor) -> np.ndarray:
        return session.run(["anomaly_map"], {"image": images.numpy()})[0]

    return Detector(config, thresholds, maps)
