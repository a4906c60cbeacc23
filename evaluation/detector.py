"""Load a trained detector (a RealNet checkpoint, or a model that export.py wrote) and score images with it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import preprocessing_of
from datasets.given_images import GivenImage, is_one_image, name_of, pixels_given, read_given
from datasets.images import allow_megapixels, resize
from evaluation.exported import load_program
from evaluation.exported_onnx import load_onnx
from evaluation.metrics import image_scores
from evaluation.score import pooling_window
from evaluation.thresholds import Thresholds
from evaluation.tiling import resize_map, tiled_map
from evaluation.trained_model import TrainedModel, load_trained
from utils import distributed
from utils.checkpoint import BEST, has_finite_weights
from utils.config import load_config
from utils.device import to_device, use_exact_kernels
from utils.errors import RunError, UsageError
from utils.precision import FP32, autocast, cast_weights, check_forward_precision
from utils.prefetch import PIXELS_AHEAD, groups, prefetch

MOST_AT_ONCE = 4  # batches, each of which takes memory
EXPORTED = (".onnx", ".pt2")
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
        UsageError: the sizes do not fit, or --overlap has no tiles to apply to.
    """
    if size is None:
        if overlap is not None:
            raise UsageError("--overlap needs --tile")
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
        >>> result.map.shape, result.mask.dtype, 0 <= result.score <= 1, result.is_anomalous in (True, False)
        ((64, 64), dtype('bool'), True, True)
        >>> detector(Image.open(image_path)).score == result.score
        True
        >>> pictures = [image_path, np.zeros((48, 80), np.uint8), np.full((30, 40, 3), 0.5)]
        >>> [found.map.shape for found in detector.predict_many(pictures)]
        [(64, 64), (48, 80), (30, 40)]
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
        if path.suffix in EXPORTED and precision != FP32:
            raise UsageError(f"--precision {precision}: {path} runs in {FP32} only; use the checkpoint instead")
        if path.suffix == ".onnx":
            detector = cls(*load_onnx(path))
        else:
            if path.suffix == ".pt2":
                trained, thresholds = load_program(path)
            else:
                trained = load_trained(path, None if config is None else load_config(config, script="realnet"), config)
                thresholds = trained.thresholds(path)
            detector = cls.of(trained, thresholds, distributed.pick_device(device), precision)
        # For the whole process: the limit is Pillow's.
        allow_megapixels(detector.config.dataset.image_reader.kwargs.max_megapixels)
        return detector

    @classmethod
    def of(
        cls, trained: TrainedModel, thresholds: Thresholds | None, target: torch.device, precision: str = FP32
    ) -> "Detector":
        """The detector of a trained model, which is moved to a device and, in half precision, has its weights cast.

        From then on, torch computes exactly on that GPU.

        Raises:
            UsageError: the precision is not available there.
        """
        check_forward_precision(precision, target)
        use_exact_kernels(target)
        model, sound = trained.network.to(target), has_finite_weights(trained.network)
        cast_weights(model, precision)

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

    def __call__(self, image: GivenImage) -> Detection:
        """Score one image of any size.

        Args:
            image: the path of a file; a Pillow image; or an array (H,W) grey, (H,W,3) RGB (not OpenCV's BGR) or
                (H,W,4), uint8, uint16 or floats in [0, 1].

        Raises:
            UsageError: the file is missing or damaged, or the array is not such an image.
            RunError: the model's result is not finite.
        """
        return next(self._finite([read_given(image, preprocessing_of(self.config.dataset))], [name_of(image)]))

    def predict_many(self, images: Iterable[GivenImage], batch_size: int = 8) -> Iterator[Detection]:
        """Score images one by one as they are asked for, in their order, which need not fit into memory together.

        Files are read in threads, ahead of what is asked for; with a batch size of 1, an image is taken only when its
        result is asked for, as images of a camera have to be.

        Args:
            images: what detector(image) takes, of any sizes.
            batch_size: images in one forward pass.

        Raises:
            UsageError: an image cannot be read (the results of those before it come first); there is none; `images`
                is one image; or the batch size is below 1.
            RunError: a result is not finite.
        """
        if is_one_image(images):
            raise UsageError("predict_many() takes several images, and this is one; call detector(image)")
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size}: at least 1")
        return self._in_batches(images, batch_size)

    def _in_batches(self, images: Iterable[GivenImage], batch_size: int) -> Iterator[Detection]:
        preprocessing = preprocessing_of(self.config.dataset)

        def read(item: tuple[int, GivenImage]) -> np.ndarray | UsageError:
            try:
                return read_given(item[1], preprocessing)
            # Kept for its turn: the images before it come first.
            except UsageError as error:
                return UsageError(f"image {item[0]}: {error}")

        ahead, count = (0 if batch_size == 1 else 2 * batch_size), 0
        given = prefetch(read, enumerate(images), ahead, lambda item: pixels_given(item[1]))
        for group in groups(given, batch_size, pixels_given, PIXELS_AHEAD):
            failed = next((i for i, item in enumerate(group) if isinstance(item, UsageError)), len(group))
            if failed:
                yield from self._finite(group[:failed], [f"image {count + i}" for i in range(failed)])
            if failed < len(group):
                raise group[failed]
            count += len(group)
        if not count:
            raise UsageError("predict_many() got no image")

    def _finite(self, images: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[Detection]:
        """The results of images (H,W,3) uint8; raises RunError at one that is not finite."""
        for name, detection in zip(names, self.detect(images), strict=True):
            if not detection.finite:
                raise RunError(f"{name}: {NOT_FINITE}")
            yield detection

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
        exported = sorted(str(found) for ending in EXPORTED for found in path.glob(f"*{ending}"))
        if classes or exported:
            found = ", ".join([*exported, *classes][:5])
            raise UsageError(f"{path} holds no {BEST}; name one of those in it: {found}")
    writer = "export.py" if file.suffix in EXPORTED else "train_realnet.py"
    raise UsageError(f"{file} does not exist; {writer} writes it")
