"""Images that a Python program hands over, as the same array that reading their files gives."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets.images import Preprocessing, as_rgb, eight_bits, is_deep_colour, pixels_of, reporting
from utils.errors import UsageError

GivenImage = str | os.PathLike | Image.Image | np.ndarray


def read_given(image: GivenImage, preprocessing: Preprocessing) -> np.ndarray:
    """An image as read_full() of its file gives it: (H,W,3) uint8 RGB, all channels equal if the model sees grey.

    Args:
        image: the path of a file; an image of Pillow; or an array, see from_array.

    Raises:
        UsageError: the file is missing or damaged, or the values are not those of an image.
    """
    grey, bits = preprocessing.color_mode == "GRAY", preprocessing.bits
    if isinstance(image, Image.Image):
        return from_pillow(image, grey, bits)
    if isinstance(image, np.ndarray):
        return from_array(image, grey, bits)
    if isinstance(image, (str, os.PathLike)):
        return preprocessing.read_full(Path(image))
    advice = "; several images go to predict_many()" if isinstance(image, (list, tuple)) else ""
    raise UsageError(f"an image is a path, a Pillow image or a numpy array, not {type(image).__name__}{advice}")


def name_of(image: GivenImage) -> str:
    """What messages call an image."""
    return str(image) if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "") or "the image"


def is_one_image(images: object) -> bool:
    """Whether this is an image where several are expected; an array (N,H,W), (N,H,W,3) or (N,H,W,4) is several."""
    if isinstance(images, np.ndarray):
        return images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
    return isinstance(images, (str, os.PathLike, Image.Image))


def pixels_given(image: object) -> int:
    """Number of pixels of an image, as far as that is known without reading it; 0 else."""
    if isinstance(image, np.ndarray):
        return image.shape[0] * image.shape[1] if image.ndim >= 2 else 0
    if isinstance(image, Image.Image):
        return image.width * image.height
    return pixels_of(image) if isinstance(image, (str, os.PathLike)) else 0


def from_pillow(opened: Image.Image, grey: bool = False, bits: int | None = None) -> np.ndarray:
    """What read_image gives for the file that Pillow has opened: (H,W,3) uint8 RGB, turned upright.

    Raises:
        UsageError: the file is damaged, or holds floating-point values. Or the camera's `bits` are set, and Pillow has
            only the upper 8 of the 16 bits of each colour.
    """
    name = name_of(opened)
    if bits is not None and is_deep_colour(opened):
        raise UsageError(f"{name}: Pillow gives 8 bits of its 16-bit colours; pass the path, or a uint16 array")
    with reporting(name):
        opened.load()
        upright = ImageOps.exif_transpose(opened)
    return as_rgb(upright, name, None, grey, bits)


def from_array(values: np.ndarray, grey: bool = False, bits: int | None = None) -> np.ndarray:
    """What read_image gives for a file with these values: (H,W,3) uint8 RGB.

    Args:
        values: (H,W) or (H,W,1) grey, (H,W,3) RGB, or (H,W,4), whose last channel is dropped; uint8, uint16, or floats
            in [0, 1], which are rounded to 8 bits.

    Raises:
        UsageError: another shape or type, or floats that are not in [0, 1].

    Example:
        >>> from_array(np.full((2, 3), 0.2)).shape, int(from_array(np.full((2, 3), 0.2)).max())
        ((2, 3, 3), 51)
    """
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or not values.size:
        raise UsageError(f"an array has to be (H,W), (H,W,3) or (H,W,4), and not empty; this one is {values.shape}")
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        # Written so that nan, which is in no range, is refused.
        if not (low >= 0 and high <= 1):
            what = f"values from {low:.4g} to {high:.4g}" if np.isfinite(values).all() else "values that are not finite"
            raise UsageError(f"an array of floats has to lie in [0, 1]; this one holds {what}")
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        values = eight_bits(values, bits)
    elif values.dtype != np.uint8:
        raise UsageError(f"an array has to be uint8, uint16, or floats in [0, 1]; this one is {values.dtype}")
    if values.ndim == 3:
        values = values[..., 0] if values.shape[2] == 1 else values[..., :3]
    return as_rgb(Image.fromarray(np.ascontiguousarray(values)), "the array", None, grey, None)
