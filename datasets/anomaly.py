"""Synthetic local anomalies: a source image blended into a normal image inside a mask (RealNet, eq. 5)."""

import cv2
import numpy as np
import torch


def blend(image: np.ndarray, source: np.ndarray, mask: np.ndarray, delta: float) -> np.ndarray:
    """Blend source P into image I inside mask M: A = (1-M) I + M (delta P + (1-delta) I).

    Args:
        image, source: (H,W,3) uint8.
        mask: (H,W) uint8 in {0, 1}.
        delta: opacity of the source in [0, 1].

    Returns:
        (H,W,3) float32 in [0, 255].

    Example:
        >>> image, source = np.full((1, 2, 3), 100, np.uint8), np.full((1, 2, 3), 200, np.uint8)
        >>> blend(image, source, np.array([[0, 1]], np.uint8), delta=0.5)[0, :, 0]
        array([100., 150.], dtype=float32)
    """
    weight = (mask * np.float32(delta))[..., None]
    base = image.astype(np.float32)
    return base + weight * (source.astype(np.float32) - base)


def is_grey(image: np.ndarray) -> bool:
    """Whether the three channels of an (H,W,3) image are equal."""
    return np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def grey(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 RGB -> the same shape, with three equal channels (OpenCV's weights)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def augment_texture(texture: np.ndarray, rng: np.random.Generator, count: int = 3) -> np.ndarray:
    """Apply `count` different augmentations out of ten, in random order. (H,W,3) uint8 -> same shape."""
    for i in rng.permutation(len(AUGMENTATIONS))[:count]:
        texture = AUGMENTATIONS[i](texture, rng)
    return texture


def _torchvision(name: str, image: np.ndarray, *args: float) -> np.ndarray:
    """Apply a function of torchvision.transforms.v2.functional to (H,W,3) uint8."""
    # Imported where textures are augmented, because it takes seconds.
    from torchvision.transforms.v2 import functional

    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return getattr(functional, name)(tensor, *args).permute(1, 2, 0).numpy()


def gamma(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gamma contrast, per channel, exponent in [0.5, 2]."""
    table = np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.5, 2.0, 3)
    return cv2.LUT(image, (table * 255 + 0.5).astype(np.uint8)[None])


def brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply by 0.8 .. 1.2 and add -30 .. 30."""
    table = np.arange(256) * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)
    return cv2.LUT(image, np.clip(table + 0.5, 0, 255).astype(np.uint8))


def sharpness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sharpness factor in [0, 2]: 0 blurs, 1 changes nothing, 2 sharpens."""
    return _torchvision("adjust_sharpness", image, float(rng.uniform(0, 2)))


def hue_saturation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift hue and saturation by -50 .. 50 of 255 each."""
    hue, saturation = rng.integers(-50, 51, 2)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL).astype(np.int16)
    hsv[..., 0] = (hsv[..., 0] + hue) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] + saturation, 0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB_FULL)


def solarize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert values at or above a random threshold in [32, 128], half of the times."""
    if rng.random() < 0.5:
        return image
    return _torchvision("solarize", image, float(rng.integers(32, 129)))


def posterize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep the upper 4 .. 7 bits of each value."""
    return _torchvision("posterize", image, int(rng.integers(4, 8)))


def invert(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert: 255 - x."""
    del rng
    return 255 - image


def autocontrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretch each channel to 0 .. 255."""
    del rng
    return _torchvision("autocontrast", image)


def equalize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Equalise each channel's histogram."""
    del rng
    return _torchvision("equalize", image)


def rotate(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate by -45 .. 45 degrees about the centre, black outside."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), float(rng.uniform(-45, 45)), 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)


AUGMENTATIONS = (
    gamma,
    brightness,
    sharpness,
    hue_saturation,
    solarize,
    posterize,
    invert,
    autocontrast,
    equalize,
    rotate,
)
