"""Pictures of 8 bits from the values in [-1, 1] that SDAS works on, and back."""

import numpy as np
import torch

from utils.pictures import to_uint8

HALF = (0.5, 0.5, 0.5)  # mean and deviation that turn [0, 1] into [-1, 1]


def to_pictures(images: torch.Tensor) -> np.ndarray:
    """(N,3,H,W) on any device -> (N,H,W,3) uint8; values outside [-1, 1] are clipped."""
    return to_uint8(images.float().cpu().numpy(), HALF, HALF)


def from_pictures(images: np.ndarray) -> torch.Tensor:
    """(N,H,W,3) uint8 -> (N,3,H,W) float32 in [-1, 1].

    Example:
        >>> pictures = np.array([0, 1, 255], np.uint8).reshape(1, 1, 1, 3)
        >>> bool((to_pictures(from_pictures(pictures)) == pictures).all())
        True
    """
    return torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
