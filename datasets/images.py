"""Decoding, resizing, normalising, augmenting and caching of images."""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from datasets.folders import MEGAPIXELS as MEGAPIXELS
from datasets.folders import SUFFIXES as SUFFIXES
from datasets.folders import list_images as list_images
from utils.counts import counted
from utils.errors import UsageError
from utils.pictures import to_uint8

log = logging.getLogger("realnet")

# What Pillow may decode: the formats of SUFFIXES, and of single files that are named. JPEG includes MPO, of phones.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF")
RESAMPLING = Image.Resampling.BILINEAR  # antialiased in Pillow
# Pillow warns at half of its limit. What is above the limit is refused, and said in one line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")  # of odd tags; what cannot be read raises an error
Image.MAX_IMAGE_PIXELS = MEGAPIXELS * 500_000  # Pillow refuses images with more than twice this number of pixels.


def read_image(
    path: str | Path, size: Sequence[int] | None = None, grey: bool = False, bits: int | None = None
) -> np.ndarray:
    """Decode an image, turn it upright by its EXIF data, and resize it with Pillow's antialiased bilinear filter.

    Args:
        size: (height, width), or None to keep the image's own.
        grey: make the three channels equal.
        bits: bits that the camera fills in 16-bit files, e.g. 12: white is 2**bits - 1. None means 16.

    Returns:
        (H,W,3) uint8 RGB. 16-bit values are scaled to 8 bits, transparency is dropped; of several pages, the first.

    Raises:
        UsageError: the file is missing, too large, not a readable image, or holds floating-point values.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.new("L", (40, 30), 200).save(file, "PNG")
        >>> read_image(file, size=(15, 20)).shape
        (15, 20, 3)
    """
    return as_rgb(_open(path, bits), path, size, grey, bits)


def as_rgb(
    opened: Image.Image, name: str | Path, size: Sequence[int] | None, grey: bool, bits: int | None
) -> np.ndarray:
    """An upright image that Pillow has opened, as read_image returns it."""
    _refuse_floats(name, opened)
    if opened.mode.startswith("I;16") or opened.mode == "I":
        opened = Image.fromarray(eight_bits(np.asarray(opened, dtype=np.uint32), bits))
    opened = opened.convert("L" if grey else "RGB")
    if size is not None and opened.size != (size[1], size[0]):
        opened = opened.resize((size[1], size[0]), RESAMPLING)
    image = np.asarray(opened)
    return np.repeat(image[..., None], 3, axis=2) if grey else image


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize an (H,W,3) uint8 image to (height, width), with the filter of read_image."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), RESAMPLING))


def read_mask(path: str | Path, size: Sequence[int] | None = None) -> np.ndarray:
    """Decode a mask and resize it by nearest neighbour.

    Returns:
        (H,W) uint8 in {0, 1}: 1 where any channel is > 0 (> 127 in a JPEG, because compression leaves small values)
        and the pixel is not transparent.
    """
    opened = _open(path)
    opaque = None
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        opaque = np.asarray(opened.convert("RGBA"))[..., 3] > 0
    if opened.mode not in ("1", "L", "F", "I") and not opened.mode.startswith("I;16"):
        opened = opened.convert("RGB")
    values, above = np.asarray(opened), 127 if Path(path).suffix.lower() in (".jpg", ".jpeg") else 0
    anomalous = (values > above).any(axis=2) if values.ndim == 3 else values > above
    mask = (anomalous if opaque is None else anomalous & opaque).astype(np.uint8)
    if size is None or mask.shape == tuple(size):
        return mask
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright image, read from the file's header only."""
    with reporting(path), open_image(path) as opened:
        # The newer versions of Pillow give the size of a TIFF as it is upright; its tags say how it is stored.
        tags = getattr(opened, "tag_v2", {})
        width, height = tags.get(256, opened.width), tags.get(257, opened.height)
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (width, height) if turned else (height, width)


def pixels_of(path: str | Path) -> int:
    """Number of pixels of an image, by its header; 0 if it cannot be read."""
    try:
        height, width = read_size(path)
    except UsageError:
        return 0
    return height * width


def open_image(path: str | Path) -> Image.Image:
    """Open an image in one of FORMATS, whatever its ending; other decoders, as that of EPS, call other programs."""
    return Image.open(path, formats=FORMATS)


def allow_megapixels(limit: float) -> None:
    """Set the size from which images are refused, for the whole process and its loader workers."""
    Image.MAX_IMAGE_PIXELS = int(limit * 1e6 / 2)


def allowed_megapixels() -> float:
    """The size from which images are refused."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6


def count_pages(path: str | Path) -> int:
    """Number of pages of a TIFF, or of images of an animation; 1 for all other images, and for unreadable files."""
    try:
        with open_image(path) as opened:
            # The second image in a phone's JPEG (MPO) is a preview.
            return 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    except Exception:
        return 1


def header_problem(path: str | Path) -> str | None:
    """Why an image cannot be read, as far as its header tells, or None."""
    try:
        with reporting(path), open_image(path) as opened:
            _refuse_floats(path, opened)
    except UsageError as error:
        return str(error)
    return None


def same_aspect_ratio(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two (height, width) have the same aspect ratio, within rounding (1 %)."""
    cross = first[0] * second[1], first[1] * second[0]
    return abs(cross[0] - cross[1]) <= 0.01 * max(cross)


def _open(path: str | Path, bits: int | None = None) -> Image.Image:
    with reporting(path), open_image(path) as opened:
        if bits is not None and is_deep_colour(opened):
            # OpenCV turns a TIFF upright itself.
            orientation = 1 if opened.format == "TIFF" else opened.getexif().get(ExifTags.Base.Orientation, 1)
            opened = _read_deep_colour(path, bits)
            opened.getexif()[ExifTags.Base.Orientation] = orientation
        opened.load()
        return ImageOps.exif_transpose(opened)


def is_deep_colour(opened: Image.Image) -> bool:
    """Whether an image that is not loaded yet has several channels of 16 bits, of which Pillow keeps the upper 8."""
    # Before loading, its tiles name the encoding: RGB;16B, for instance.
    return len(opened.getbands()) > 1 and any(";16" in str(tile[3]) for tile in getattr(opened, "tile", []))


def _read_deep_colour(path: str | Path, bits: int) -> Image.Image:
    # Not imread: on some systems it fails if the path is not ASCII.
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise UsageError(f"{path}: its 16-bit colours cannot be read; save it as PNG or TIFF without compression")
    return Image.fromarray(eight_bits(values[..., 2::-1], bits))


def eight_bits(values: np.ndarray, bits: int | None) -> np.ndarray:
    """16-bit values, which `bits` bits are filled (None: 16), as uint8."""
    return (values >> ((bits or 16) - 8)).clip(0, 255).astype(np.uint8)


def _refuse_floats(path: str | Path, opened: Image.Image) -> None:
    if opened.mode == "F":
        raise UsageError(f"{path} holds floating-point values, whose range is not known; save it with 8 or 16 bits")


@contextmanager
def reporting(path: str | Path) -> Iterator[None]:
    """Turn any exception that Pillow raises on a broken file into a one-line UsageError."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except Image.UnidentifiedImageError:
        reason = "empty, damaged, or not PNG, JPEG, BMP, TIFF or WebP"
        raise UsageError(f"{path} is not a readable image ({reason})") from None
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+", str(error))
        megapixels = f"{int(size[0]) / 1e6:.4g}" if size else "too many"
        limit = f"the limit of {allowed_megapixels():.4g}"
        advice = (
            "pass --max-megapixels (predict.py, prepare_data.py), or set dataset.image_reader.kwargs.max_megapixels"
        )
        raise UsageError(f"{path} has {megapixels} megapixels, above {limit}; {advice}") from None
    # Pillow's decoders raise many exception types on broken input, struct.error and zlib.error among them.
    except Exception as error:
        raise UsageError(f"{path} is not a readable image ({error or type(error).__name__})") from None


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a network's input.

    Args:
        size: (height, width).
        mean, std: per channel, for values in [0, 1].
        color_mode: "RGB"; "GRAY" for three equal channels; or "BGR", the order in which the network gets the channels.
            Images outside the network are RGB.
        bits: see read_image.

    Example:
        >>> preprocessing = Preprocessing((2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> preprocessing.tensor(np.full((2, 2, 3), 255, np.uint8)).shape
        torch.Size([3, 2, 2])
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color_mode: str = "RGB"
    bits: int | None = None

    def read(self, path: str | Path) -> np.ndarray:
        """The image at `path`, (H,W,3) uint8 at the input size."""
        return self.read_full(path, self.size)

    def read_full(self, path: str | Path, size: Sequence[int] | None = None) -> np.ndarray:
        """The image at `path`, (H,W,3) uint8 at its own size, or at another one (height, width)."""
        return read_image(path, size, self.color_mode == "GRAY", self.bits)

    def tensor(self, image: np.ndarray) -> torch.Tensor:
        """(H,W,3) RGB in [0, 255] at the input size -> (3,H,W) float32, normalised."""
        return normalize(image[..., ::-1] if self.color_mode == "BGR" else image, self.mean, self.std)

    def pictures(self, tensors: np.ndarray) -> np.ndarray:
        """What `tensor` was made of: (N,3,H,W) -> (N,H,W,3) uint8 RGB."""
        images = to_uint8(tensors, self.mean, self.std)
        return np.ascontiguousarray(images[..., ::-1]) if self.color_mode == "BGR" else images


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(H,W,3) in [0, 255] -> (3,H,W) float32, (x / 255 - mean) / std."""
    scale = np.float32(1 / 255) / np.asarray(std, np.float32)
    shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return torch.from_numpy(image * scale - shift).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Augmentation:
    """Random flips and quarter turns, brightness and contrast.

    Args:
        hflip, vflip: mirror left and right, or top and bottom, with probability 1/2.
        rotate: turn by a random multiple of 90 degrees; non-square images only by 0 or 180, to keep their size.
        jitter: scale contrast (around the mean) and brightness by factors of 1 - jitter .. 1 + jitter.

    Example:
        >>> image, mask = np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), np.uint8)
        >>> [array.shape for array in Augmentation(rotate=True)([image, mask], np.random.default_rng(0))]
        [(8, 12, 3), (8, 12)]
    """

    hflip: bool = False
    vflip: bool = False
    rotate: bool = False
    jitter: float = 0.0

    def __call__(self, arrays: Sequence[np.ndarray], rng: np.random.Generator, images: int = 1) -> list[np.ndarray]:
        """Apply the same random flips and turn to all arrays (H,W,...), and jitter to the first ones, uint8 images.

        The first array decides which turns there are, and its mean is that of all images.
        """
        arrays = list(arrays)
        if self.hflip and rng.random() < 0.5:
            arrays = [a[:, ::-1] for a in arrays]
        if self.vflip and rng.random() < 0.5:
            arrays = [a[::-1] for a in arrays]
        if self.rotate:
            square = arrays[0].shape[0] == arrays[0].shape[1]
            turns = int(rng.integers(4)) if square else 2 * int(rng.integers(2))
            arrays = [np.rot90(a, turns) for a in arrays]
        if self.jitter:
            contrast, brightness = rng.uniform(1 - self.jitter, 1 + self.jitter, 2)
            mean = float(arrays[0].mean())
            values = ((np.arange(256) - mean) * contrast + mean) * brightness
            table = np.clip(values + 0.5, 0, 255).astype(np.uint8)
            arrays[:images] = [table[image] for image in arrays[:images]]
        return [np.ascontiguousarray(a) for a in arrays]


class SharedCache:
    """Cache of equally sized arrays, in memory that loader workers share; items beyond the budget are not kept.

    Args:
        count: number of items.
        shape: shape of each item; items are uint8.
        budget_mb: memory limit in MiB.
    """

    def __init__(self, count: int, shape: Sequence[int], budget_mb: int) -> None:
        item = int(np.prod(shape))
        budget = min(budget_mb << 20, _shared_memory_left() // 2)
        self.kept = min(count, budget // item)
        if self.kept < count and budget_mb:
            images = counted(count, "image")
            log.info("cache: room for %d of %s (dataset.cache_mb, shared memory)", self.kept, images)
        # Made in shared memory: share_memory_() would make it elsewhere and copy it. The system reserves all pages at
        # once, so that a full /dev/shm is noticed here and not by a worker, which it would kill.
        storage = torch.UntypedStorage._new_shared(self.kept * item)
        self.items = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (self.kept, *shape))
        self.filled = torch.zeros(self.kept, dtype=torch.bool).share_memory_()

    def get(self, index: int) -> np.ndarray | None:
        """The item, or None if it is not cached. Do not write to it."""
        return self.items[index].numpy() if index < self.kept and self.filled[index] else None

    def has_room(self, index: int) -> bool:
        """Whether the cache has a place for this index."""
        return index < self.kept

    def put(self, index: int, item: np.ndarray) -> None:
        if self.has_room(index):
            self.items[index].numpy()[...] = item
            self.filled[index] = True


def _shared_memory_left() -> int:
    """Free bytes in /dev/shm, where shared tensors live; containers often have little."""
    try:
        stat = os.statvfs("/dev/shm")
    except (AttributeError, OSError):
        return 1 << 40
    return stat.f_bavail * stat.f_frsize
