"""Load a trained detector (a RealNet checkpoint, or a model that export.py wrote) and score images with it."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import preprocessing_of
from datasets.images import resize
from evaluation.exported import load_program
from evaluation.metrics import image_scores
from evaluation.score import pooling_window
from evaluation.thresholds import Thresholds, matching_thresholds, thresholds_from
from evaluation.tiling import resize_map, tiled_map
from evaluation.trained_model import TrainedModel, load_trained
from utils import distributed
from utils.checkpoint import BEST, has_finite_weights
from utils.config import checked, load_config
from utils.device import to_device, use_exact_kernels
from utils.errors import RunError, UsageError
from utils.files import verify_checksums
from utils.precision import FP32, autocast, check_forward_precision

MOST_AT_ONCE = 4  # batches, each of which takes memory
NOT_FINITE = "the model's weights, score or anomaly map hold values that are not numbers, so there is no verdict"


@dataclass(frozen=True)
class Detection:
    """The result of a detector for one image.

    Args:
        score: image score in [0, 1].
        map: (H,W) float32 anomaly map in [0, 1], at the image's own size.
        mask: (H,W) bool, True where the map reaches the pixel threshold; None without a threshold.
        is_anomalous: whether the score reaches the image threshold; None without a threshold.

    A result that is not finite has no mask and no verdict.
    """

    score: float
    map: np.ndarray
    mask: np.ndarray | None
    is_anomalous: bool | None

    @property
    def finite(self) -> bool:
        """Whether the score and the map hold numbers only."""
        return math.isfinite(self.score) and bool(np.isfinite(self.map).all())


@dataclass(frozen=True)
class Tiles:
    """How to cut large images into tiles.

    Args:
        size: side of the square tiles, in pixels of the image.
        overlap: pixels that neighbouring tiles share, 0 <= overlap < size.
        batch: tiles scored at once.
    """

    size: int
    overlap: int
    batch: int

    @property
    def name(self) -> str:
        """The key of their thresholds, "<size>/<overlap>"."""
        return f"{self.size}/{self.overlap}"


OVERLAP = 64  # pixels that neighbouring tiles share by default, or a quarter of a small tile


def tiles_of(size: int | None, overlap: int | None, batch: int) -> Tiles | None:
    """The tiles that --tile and --overlap ask for; None without --tile.

    Raises:
        UsageError: the sizes do not fit.
    """
    if size is None:
        return None
    if size < 16:
        raise UsageError(f"--tile {size}: at least 16 pixels")
    shared = min(OVERLAP, size // 4) if overlap is None else overlap
    if not 0 <= shared < size:
        raise UsageError(f"--overlap {overlap}: has to lie in 0 .. {size - 1}, below --tile")
    return Tiles(size, shared, batch)


@dataclass(frozen=True)
class Detector:
    """Scores images with a trained model.

    Args:
        config: the settings of realnet.yaml that it was trained with.
        thresholds: those that evaluation_realnet.py wrote; without them, there are scores but no verdicts.
        infer: (N,3,H,W) float32 normalised images -> (N,H,W) float32 anomaly maps in [0, 1], both on the CPU. Several
            threads may call it.
        precision: of the forward pass (utils.precision.FORWARD_PRECISIONS). Thresholds of another one are refused.
        at_once: the number of threads in which it is best called at the same time.

    Example, with the path of a class's checkpoint folder and the path of an image:
        >>> detector = Detector.load(checkpoints)
        >>> result = detector(image_path)
        >>> result.map.shape, 0 <= result.score <= 1, result.is_anomalous in (True, False)
        ((64, 64), True, True)
    """

    config: EasyDict
    thresholds: Thresholds | None
    infer: Callable[[torch.Tensor], np.ndarray]
    precision: str = FP32
    at_once: int = 1

    @classmethod
    def load(
        cls, path: str | Path, config: str | Path | None = None, device: str | None = None, precision: str = FP32
    ) -> "Detector":
        """Load a detector.

        Args:
            path: a checkpoint, a class folder with a checkpoint, or an exported .onnx or .pt2 file.
            config: a realnet.yaml, for checkpoints that hold no settings (those of the reference program).
            device: "cpu", "cuda", "mps", or None for the best available.
            precision: "fp32", "bf16" or "fp16"; exported models run in fp32 only.

        Raises:
            UsageError: the file is missing, is not a model, or does not fit its settings; or the precision is not
                available.
            RunError: onnxruntime is needed but not installed.
        """
        path = checkpoint_path(path)
        if path.suffix in (".onnx", ".pt2") and precision != FP32:
            raise UsageError(f"--precision {precision}: {path} runs in {FP32} only; use the checkpoint instead")
        if path.suffix == ".onnx":
            return _from_onnx(path)
        if path.suffix == ".pt2":
            trained, thresholds = load_program(path)
        else:
            trained = load_trained(path, None if config is None else load_config(config, script="realnet"), config)
            thresholds = trained.thresholds(path)
        return cls.of(trained, thresholds, distributed.pick_device(device), precision)

    @classmethod
    def of(
        cls, trained: TrainedModel, thresholds: Thresholds | None, target: torch.device, precision: str = FP32
    ) -> "Detector":
        """The detector of a trained model, on a device; from then on, torch computes exactly on that GPU.

        Raises:
            UsageError: the precision is not available there.
        """
        check_forward_precision(precision, target)
        use_exact_kernels(target)
        model, sound = trained.network.to(target), has_finite_weights(trained.network)

        @torch.inference_mode()
        def infer(images: torch.Tensor) -> np.ndarray:
            with autocast(target, precision):
                maps = model({"image": to_device(images, target)})["anomaly_score"][:, 0].float().cpu().numpy()
            # A nan that only chooses channels leaves the maps finite, but wrong.
            return maps if sound else np.full_like(maps, np.nan)

        # torch leaves cores idle that it may not use for one batch, as with OMP_NUM_THREADS=1.
        idle = target.type == "cpu" and torch.get_num_threads() == 1
        at_once = min(MOST_AT_ONCE, distributed.usable_cores()) if idle else 1
        return cls(trained.config, thresholds, infer, precision, at_once)

    def with_thresholds(self, thresholds: Thresholds | None) -> "Detector":
        """The same model with other thresholds."""
        return replace(self, thresholds=thresholds)

    def __call__(self, image: str | Path | np.ndarray) -> Detection:
        """Score one image: a file, or (H,W,3) uint8 RGB of any size.

        Raises:
            RunError: the model's result is not finite.
        """
        source = "the image"
        if not isinstance(image, np.ndarray):
            source, image = image, preprocessing_of(self.config.dataset).read_full(image)
        detection = next(self.detect([image]))
        if not detection.finite:
            raise RunError(f"{source}: {NOT_FINITE}")
        return detection

    def detect(self, images: Sequence[np.ndarray], tiles: Tiles | None = None) -> Iterator[Detection]:
        """Score images (H,W,3) uint8 of any sizes: all in one batch, or each one in tiles.

        Raises:
            UsageError: the thresholds were chosen on scores in another precision.
        """
        if self.thresholds is not None:
            self.thresholds.check_precision(self.precision)
        height, width = preprocessing_of(self.config.dataset).size
        window = pooling_window(self.config.evaluator)
        if tiles is None:
            for image, values in zip(images, self.maps(images), strict=True):
                yield self._detection(values, window, image.shape[:2])
            return
        for image in images:
            values = tiled_map(image, tiles.size, tiles.overlap, tiles.batch, self.maps)
            # The pooling window covers the same share of a tile as of an untiled image.
            tile = [min(tiles.size, side) for side in image.shape[:2]]
            scaled = [max(1, round(k * t / side)) for k, t, side in zip(window, tile, (height, width), strict=True)]
            yield self._detection(values, (scaled[0], scaled[1]), image.shape[:2])

    def maps(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Anomaly maps (N,h,w), at the model's input size, of images (H,W,3) uint8 of any sizes."""
        preprocessing = preprocessing_of(self.config.dataset)
        return self.infer(torch.stack([preprocessing.tensor(resize(image, preprocessing.size)) for image in images]))

    def _detection(self, values: np.ndarray, window: tuple[int, int], size: tuple[int, int]) -> Detection:
        score = float(image_scores(values[None], window)[0])
        values = resize_map(values, size)
        detection = Detection(score, values, None, None)
        if self.thresholds is None or not detection.finite:
            return detection
        image, pixel = self.thresholds.image, self.thresholds.pixel
        anomalous = None if image is None else score >= image
        mask = None if pixel is None else values >= pixel
        if anomalous and mask is not None and pixel <= image and not mask.any():
            # Resizing the map has averaged away the pixels that made the score.
            mask.flat[np.argmax(values)] = True
        return replace(detection, mask=mask, is_anomalous=anomalous)


def as_one_process() -> None:
    """Forget the ranks of a launcher that are left in the environment, for commands that need none.

    Under torchrun, all ranks but the first end here: they would write the same files.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def checkpoint_path(path: str | Path) -> Path:
    """The path itself if it is a file; for a class folder, the path of its best checkpoint.

    Raises:
        UsageError: there is no such file.
    """
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        # A folder that holds what is meant, one level too high or exported.
        classes = sorted(str(found.parent) for found in path.glob(f"*/{BEST}"))
        exported = sorted(str(found) for ending in ("onnx", "pt2") for found in path.glob(f"*.{ending}"))
        if classes or exported:
            found = ", ".join([*exported, *classes][:5])
            raise UsageError(f"--checkpoint {path}: name one of those that the folder holds: {found}")
    raise UsageError(f"--checkpoint {file} does not exist; train_realnet.py writes it")


def _from_onnx(path: Path) -> Detector:
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

    return Detector(config, thresholds, infer)


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
        raise ValueError(f"it takes {shape[0]} images at once, and no other number")
    if "anomaly_map" not in [entry.name for entry in session.get_outputs()]:
        raise ValueError("it has no output called anomaly_map")
